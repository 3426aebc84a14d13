"""`nnxlaunch status`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from launcher.backend import Backend, BackendKind, Scene
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, Output, OutputFormat

EXAMPLES = """  nnxlaunch status my-run
  nnxlaunch status my-run --watch
  nnxlaunch status my-run --output json | jq -r .state
"""

REFRESH_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
CLEAR = "\x1b[H\x1b[J"

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Go on until the job has ended: in place on a terminal, else a line a change.")]


def command(
    name: JobName,
    watch: Watch = False,
    output: OutputFormat = Output.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how a job is doing: its state with cause and next action, queue, hosts, restarts, last step, last checkpoint.

    At most five requests to the cluster each time, however large the job is.
    """
    from launcher.cli.backends import connect, flags, look
    from launcher.cli.output import emit
    from launcher.cli.show import line, whole
    from launcher.observe.report import Report, report

    def seen(scene: Scene) -> Report:
        found = report(scene)
        return replace(found, cause=found.cause.told_with(flags(backend, namespace)))

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    first = look(target, backend, name)
    where = f"{backend}, namespace {first.namespace}"
    if not watch:
        told = seen(first)
        print(whole(told, where)) if output is Output.TABLE else emit(told.as_data(), output)
        return
    if output is not Output.TABLE:
        raise typer.BadParameter("--watch is for people; a script asks again, or uses: nnxlaunch wait")
    terminal, last = sys.stdout.isatty(), ""
    for scene in _refreshed(target, name, first):
        text = whole(seen(scene), where) if terminal else line(seen(scene))
        if terminal:
            print(f"{CLEAR}{text}", flush=True)
        elif text != last:
            print(text, flush=True)
        last = text


def _refreshed(target: Backend, name: str, scene: Scene) -> Iterator[Scene]:
    """Scenes until the job has ended; faults of the connection are lived through for some minutes."""
    from launcher.errors import Unavailable

    silent_since: float | None = None
    while True:
        yield scene
        if scene.status.state.finished:
            return
        time.sleep(REFRESH_SECONDS)
        try:
            scene, silent_since = target.scene(name), None
        except Unavailable:
            now = time.monotonic()
            silent_since = silent_since or now
            if now - silent_since > PATIENCE_SECONDS:
                raise
