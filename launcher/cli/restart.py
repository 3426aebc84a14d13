"""`nnxlaunch restart`."""

from __future__ import annotations

import sys

from launcher.backend import BackendKind, JobState
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch restart my-run
"""


def command(
    name: JobName,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop all pods of a job and start them again, from its last committed checkpoint.

    For a job that runs but does not go on: no restart is counted. In a queue it gives its quota back and queues again. A job
    that has ended is started again by `submit --replace`.
    """
    from launcher.cli.backends import connect, flags, job
    from launcher.errors import Unavailable

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    before = job(target, backend, name)
    if backend is BackendKind.LOCAL:
        raise Unavailable(
            "a job of this machine cannot be restarted in place",
            hint="nnxlaunch submit SPEC --replace --backend local goes on from its last committed checkpoint",
        )
    try:
        if before.state not in (JobState.SUSPENDED, JobState.QUEUED):
            target.suspend(name)
        status = target.resume(name)
    except KeyboardInterrupt:
        print(f"interrupted: {name} may be suspended now; go on with: nnxlaunch resume {name}{flags(backend, namespace)}", file=sys.stderr)
        raise
    print(f"{name}: {status.state}{f': {status.message}' if status.message else ''}")
