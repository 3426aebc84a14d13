"""`nnxlaunch logs`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch logs my-run                        every line there is: [slice/worker attempt] text
  nnxlaunch logs my-run -f                     follow it over restarts until it ends
  nnxlaunch logs my-run --slice 0 --worker 1   one host
"""

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on, over restarts, until the job has ended.")]
OneSlice = Annotated[int | None, typer.Option("--slice", min=0, help="Only this slice.")]
OneWorker = Annotated[int | None, typer.Option("--worker", min=0, help="Only this worker of each slice.")]


def command(
    name: JobName,
    follow: Follow = False,
    slice_index: OneSlice = None,
    worker: OneWorker = None,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print or follow the logs of a job, of all hosts unless told otherwise."""
    from launcher.cli.backends import connect, job

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    job(target, backend, name)
    try:
        for line in target.logs(name, follow=follow, slice_index=slice_index, worker=worker):
            print(line.prefix, line.text, flush=follow)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
