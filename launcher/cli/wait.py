"""`nnxlaunch wait`."""

from __future__ import annotations

from collections import deque
from typing import Annotated

import typer

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, duration

EXAMPLES = """  nnxlaunch wait my-run --timeout 2h && nnxlaunch status my-run
"""

Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="TIME", parser=duration, help="Give up after this long: seconds, or such as 10m or 2h.")
]


def command(
    name: JobName,
    timeout: Timeout = None,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Wait until a job ends. Exit codes: 0 it is done, 124 the time is over, 125 it failed, 1 anything else."""
    from launcher.backend import JobState
    from launcher.cli.backends import connect, flags, job
    from launcher.errors import JobFailed, NnxlaunchError, WaitTimeout, report

    try:
        target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
        latest = deque([job(target, backend, name)], maxlen=1)
        latest.extend(target.watch(name, timeout_seconds=timeout))
    except NnxlaunchError as error:
        report(error)
        raise SystemExit(1) from None
    (status,) = latest
    if not status.state.finished:
        hint = f"what it waits for: nnxlaunch why {name}{flags(backend, namespace)}"
        raise WaitTimeout(f"{name} is still {status.state}: {status.message}", hint=hint)
    if status.state is JobState.FAILED:
        raise JobFailed(f"{name} failed: {status.message}", hint=f"read its end with: nnxlaunch logs {name}{flags(backend, namespace)}")
    print(f"{name}: {status.state}")
