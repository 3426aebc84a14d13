"""`nnxlaunch resume`."""

from __future__ import annotations

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch resume my-run
"""


def command(
    name: JobName,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let a suspended job go on, from its last committed checkpoint.

    In a queue it waits for quota like a new one.
    """
    from launcher.cli.backends import connect, job

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    job(target, backend, name)
    status = target.resume(name)
    print(f"{name}: {status.state}{f': {status.message}' if status.message else ''}")
