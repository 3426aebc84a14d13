"""`nnxlaunch status`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from launcher.backend import BackendKind, Event, JobStatus
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, Output, OutputFormat

EXAMPLES = """  nnxlaunch status my-run
  nnxlaunch status my-run --output json | jq -r .state
"""

EVENTS_SHOWN = 6


def command(
    name: JobName,
    output: OutputFormat = Output.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how a job is doing: state and cause, restarts, last step and loss, every pod, what happened last."""
    from launcher.backend.status import RUN_DIRECTORY_ANNOTATION, as_data
    from launcher.cli.backends import connect, job
    from launcher.cli.output import emit
    from launcher.observe.progress import last_progress

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    status = job(target, backend, name)
    events = target.events(name)
    directory = status.annotations.get(RUN_DIRECTORY_ANNOTATION, "")
    progress = last_progress(directory) if directory else None
    if output is not Output.TABLE:
        reached = {"done": progress.done, "loss": progress.loss, "at": progress.at.isoformat(timespec="seconds")} if progress else None
        emit({**as_data(status), "progress": reached, "events": [as_data(event) for event in events]}, output)
        return
    rows = [
        ("job", f"{status.name} ({backend}, namespace {status.namespace})"),
        ("state", f"{status.state}{f': {status.message}' if status.message else ''}"),
        ("restarts", f"{status.restarts_used} of {status.restarts_max} used, {status.restarts_free} free; attempt {status.attempt}"),
    ]
    if progress:
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        rows.append(("progress", f"{progress.done} steps done{loss}, {age(progress.at)} ago"))
    if directory:
        rows.append(("directory", directory))
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{key.ljust(width)}  {value}" for key, value in rows))
    print(f"\n{_pods(status)}" if status.pods else "\nno pods")
    if events:
        print(f"\n{_events(events[-EVENTS_SHOWN:])}")


def age(then: datetime | None) -> str:
    """`42s`, `7m`, `3h`, `5d` since `then`."""
    if then is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _pods(status: JobStatus) -> str:
    from launcher.cli.output import table

    rows = [
        (
            str(pod.slice_index), str(pod.worker), str(pod.attempt), "Leaving" if pod.leaving else pod.phase,
            "" if pod.exit_code is None else str(pod.exit_code), pod.node or "", age(pod.started_at), _short(pod.message),
        )
        for pod in status.pods
    ]  # fmt: skip
    return table(rows, ("SLICE", "WORKER", "ATTEMPT", "PHASE", "EXIT", "NODE", "AGE", "MESSAGE"))


def _events(events: Sequence[Event]) -> str:
    from launcher.cli.output import table

    rows = [(age(event.at), "warning" if event.warning else "normal", event.about, event.reason, _short(event.message)) for event in events]
    return table(rows, ("AGE", "KIND", "ABOUT", "EVENT", "MESSAGE"))


def _short(text: str, limit: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
