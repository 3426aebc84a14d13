"""`nnxlaunch wait`."""

from __future__ import annotations

import re
from collections import deque
from typing import Annotated

import typer

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch wait my-run --timeout 2h && nnxlaunch status my-run
"""

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise typer.BadParameter("a number of seconds, or such as 90s, 10m, 2h, 1d")
    return float(match[1]) * _UNITS[match[2]]


Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="TIME", parser=_seconds, help="Give up after this long: seconds, or such as 10m or 2h.")
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
        raise WaitTimeout(f"{name} is still {status.state}: {status.message}")
    if status.state is JobState.FAILED:
        raise JobFailed(f"{name} failed: {status.message}", hint=f"read its end with: nnxlaunch logs {name}{flags(backend, namespace)}")
    print(f"{name}: {status.state}")
