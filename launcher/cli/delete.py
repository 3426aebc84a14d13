"""`nnxlaunch delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch delete my-run other-run
"""

JobNames = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of jobs.")]


def command(
    names: JobNames,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Remove jobs, running or ended, and all that was made for them; returns when their processes are gone.

    Any name is taken as it is, also one that no spec could have today. Run directories stay. Every name is tried; the first
    that is not there decides the exit code.
    """
    from launcher.cli.backends import connect, job
    from launcher.errors import NotFound, report

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace)
    code = 0
    for name in names:
        try:
            job(target, backend, name)
            target.delete(name)
            print(f"{name}: deleted", flush=True)
        except NotFound as error:
            failed = report(error)
            code = code or failed
    raise SystemExit(code)
