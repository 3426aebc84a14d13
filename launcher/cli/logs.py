"""`nnxlaunch logs`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from launcher.backend import Backend, BackendKind, JobStatus, LogLine, Manifest
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, duration

EXAMPLES = """  nnxlaunch logs my-run                        every line there is: [slice/worker attempt] text
  nnxlaunch logs my-run -f                     follow it over restarts until it ends
  nnxlaunch logs my-run --slice 0 --worker 1   one host
  nnxlaunch logs my-run --previous             of the attempt before this one, from the run directory
  nnxlaunch logs my-run --since 10m --grep 'error|warning'
"""

HOSTS_SHOWN = 32
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on, over restarts, until the job has ended.")]
OneSlice = Annotated[int | None, typer.Option("--slice", min=0, help="Only this slice.")]
OneWorker = Annotated[int | None, typer.Option("--worker", min=0, help="Only this worker of each slice.")]
All = Annotated[bool, typer.Option("--all", help=f"Of all hosts, also where there are more than {HOSTS_SHOWN}.")]
Previous = Annotated[bool, typer.Option("--previous", help="Of the attempt before this one; its pods are gone, the run directory has it.")]
Since = Annotated[
    float | None,
    typer.Option(
        "--since",
        metavar="TIME",
        parser=duration,
        help="Only lines of the last seconds, or such as 10m or 2h; on a cluster (the lines of a local job have no times).",
    ),
]
Grep = Annotated[str, typer.Option("--grep", metavar="REGEX", help="Only lines that match.")]


def command(
    name: JobName,
    follow: Follow = False,
    slice_index: OneSlice = None,
    worker: OneWorker = None,
    everything: All = False,
    previous: Previous = False,
    since: Since = None,
    grep: Grep = "",
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print or follow the logs of a job: of all hosts, of a job with more than 32 of process 0, unless told otherwise.

    Lines of the hosts are in the order of their times. Colour only on a terminal.
    """
    from launcher.cli.backends import connect, flags, job

    if previous and (follow or since is not None):
        raise typer.BadParameter("--previous goes with neither --follow nor --since: an attempt that has ended is read whole")
    try:
        wanted = re.compile(grep)
    except re.error as error:
        raise typer.BadParameter(f"--grep {grep!r} is no regular expression: {error}") from None
    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    status = job(target, backend, name)
    most = max((part.hosts for part in status.slices), default=0)
    for what, number, count in (("slice", slice_index, len(status.slices)), ("worker", worker, most)):
        if number is not None and number >= count > 0:
            raise typer.BadParameter(f"{name} has {what}s 0..{count - 1}", param_hint=f"--{what}")
    if slice_index is None and worker is None and not everything and status.hosts > HOSTS_SHOWN:
        slice_index = worker = 0
        print(f"{status.hosts} hosts: this is process 0 (slice 0, worker 0); the others: --slice, --worker, --all", file=sys.stderr)
    if not previous and not status.state.finished and all(pod.started_at is None for pod in status.pods):
        print(f"{name} is {status.state}, and no pod has started; see: nnxlaunch why {name}{flags(backend, namespace)}", file=sys.stderr)
    if previous:
        lines = _previous(target, status, slice_index, worker, flags(backend, namespace))
    else:
        lines = target.logs(name, follow=follow, slice_index=slice_index, worker=worker, since_seconds=since)
    _print(lines, wanted, follow=follow)


def _previous(target: Backend, status: JobStatus, slice_index: int | None, worker: int | None, options: str) -> Iterator[LogLine]:
    from launcher.backend.selection import Selection
    from launcher.errors import NotFound
    from launcher.observe.kept_logs import kept_lines

    slices_restart_alone = _replaces_pods(target.scene(status.name).jobset)
    if status.attempt == 0 and not slices_restart_alone:
        raise NotFound(f"{status.name} has had no attempt before this one", hint=f"nnxlaunch logs {status.name}{options}")
    directory = target.run_directory(status.name)
    if not directory:
        raise NotFound(f"{status.name} has no run directory on record, so nothing is kept of pods that are gone")
    attempt = None if slices_restart_alone else status.attempt - 1
    return kept_lines(directory, attempt, Selection(slice_index=slice_index, worker=worker))


def _replaces_pods(jobset: Manifest) -> bool:
    """Whether its Jobs replace their own pods, so that the JobSet counts no attempt (DiLoCo with a world for each slice)."""
    from launcher.backend.status import replicated_jobs

    return any(job["template"]["spec"].get("backoffLimit") for job in replicated_jobs(jobset))


def _print(lines: Iterator[LogLine], wanted: re.Pattern[str], *, follow: bool) -> None:
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        for line in lines:
            if wanted.search(line.text):
                colour = COLOURS[(line.slice_index * 7 + line.worker) % len(COLOURS)]
                print(f"\x1b[{colour}m{line.prefix}\x1b[0m" if coloured else line.prefix, line.text, flush=follow)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
