"""`nnxlaunch cancel`."""

from __future__ import annotations

import sys

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch cancel my-run
"""


def command(
    name: JobName,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a job and remove it; returns when its processes are gone.

    A running trainer gets its grace period to save. The run directory stays; the same spec submitted again resumes.
    """
    from launcher.cli.backends import connect, job

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    found = job(target, backend, name)
    try:
        target.delete(name)
    except KeyboardInterrupt:
        print(f"interrupted: {name} goes on being removed, once that was asked for", file=sys.stderr)
        raise
    print(f"{name}: removed; it had {found.state}" if found.state.finished else f"{name}: cancelled")
