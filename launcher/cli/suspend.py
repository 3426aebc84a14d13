"""`nnxlaunch suspend`."""

from __future__ import annotations

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch suspend my-run
"""


def command(
    name: JobName,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a job's pods and keep the job; returns when they are gone.

    The trainer gets its grace period to save. In a queue the quota is free for others; `resume` queues the job again.
    """
    from launcher.cli.backends import connect, flags, job

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    job(target, backend, name)
    target.suspend(name)
    print(f"{name}: suspended")
    print(f"go on with: nnxlaunch resume {name}{flags(backend, namespace)}")
