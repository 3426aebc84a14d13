"""The screens of `status` and `list`: values in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from launcher.backend import Event, JobStatus, PodStatus
from launcher.cli.output import screen, table
from launcher.errors import visible
from launcher.observe.report import Report
from launcher.observe.why_refused import passes

PODS_SHOWN = 16
EVENTS_SHOWN = 6


def whole(report: Report, where: str) -> str:
    """One screen: the answer first, then the numbers, then pods and events that say something."""
    parts = [screen(_rows(report, where)), _pods(report.status)]
    everything_runs = report.status.ready == report.status.hosts
    if told := [event for event in report.events if event.warning and not (everything_runs and passes(event))][-EVENTS_SHOWN:]:
        parts.append(_events(told, report.now))
    return "\n\n".join(parts)


def line(report: Report) -> str:
    """The state in one line, without ages: it changes only when the job does."""
    status = report.status
    words = [f"{status.name}: {status.state}", f"{status.ready}/{status.hosts} hosts ready", f"attempt {status.attempt}"]
    if report.queue and report.queue.position:
        words.append(f"position {report.queue.position} of {report.queue.waiting}")
    if report.progress and report.progress.done is not None:
        words.append(_step(report))
    return visible(", ".join([*words, report.cause.sentence]))


def _rows(report: Report, where: str) -> list[tuple[str, str]]:
    status, queue, progress = report.status, report.queue, report.progress
    rows = [
        ("job", f"{status.name} ({where}), submitted {age(status.created_at, report.now)} ago"),
        ("state", str(status.state)),
        ("cause", f"{report.cause.sentence} [{report.cause.code}]"),
        ("next", report.cause.fix),
        *(("remark", str(remark)) for remark in report.remarks),
    ]
    if queue:
        place = f"position {queue.position} of {queue.waiting} waiting" if queue.position else ""
        cluster = f"cluster queue {queue.cluster_queue}" if queue.cluster_queue else ""
        rows.append(("queue", ", ".join(filter(None, [queue.name, cluster, place]))))
        rows += [("quota", f"{q.resource}: asks for {q.asked}; {q.used} of {q.limit} used") for q in queue.quota]
    slices = len(status.slices)
    rows.append(("ready", f"{report.slices_ready} of {slices} slices, {status.ready} of {status.hosts} hosts"))
    used = f"{status.restarts_used} of {status.restarts_max} restarts used, {status.restarts_free} free"
    rows.append(("attempt", f"{status.attempt}; {used}{f'; last: {report.last_restart}' if report.last_restart else ''}"))
    if progress and progress.done is not None:
        rows.append(("progress", f"{_step(report)}{f', {age(progress.at, report.now)} ago' if progress.at else ''}"))
    if progress and progress.checkpoint is not None:
        took = "" if progress.save_seconds is None else f", saved in {progress.save_seconds:.1f} s"
        rows.append(("checkpoint", f"step {progress.checkpoint}, {age(progress.checkpoint_at, report.now)} ago{took}"))
    if report.directory:
        rows.append(("directory", report.directory))
    return rows


def _step(report: Report) -> str:
    progress = report.progress
    assert progress is not None
    words = [f"{progress.done}{f' of {progress.total}' if progress.total else ''} steps done"]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.4f}")
    if progress.step_seconds is not None:
        seconds = progress.step_seconds
        words.append(f"{seconds:.2f} s a step" if seconds >= 1 else f"{1000 * seconds:.0f} ms a step")
    return ", ".join(words)


def _pods(status: JobStatus) -> str:
    """Every pod of a small job; of a large one those that are not simply running."""
    if not status.pods:
        return "no pods"
    shown: Sequence[PodStatus] = status.pods
    rest = ""
    if len(shown) > PODS_SHOWN:
        odd = [pod for pod in shown if not pod.ready or pod.leaving or pod.attempt != status.attempt]
        shown = odd[:PODS_SHOWN]
        hidden, not_ready = len(status.pods) - len(shown), len(odd) - len(shown)
        which = f"{hidden} more pods, {not_ready} of them not ready" if not_ready else f"{hidden} pods are ready"
        rest = f"\n{which}; all of them: --output json" if shown else f"{which}; all of them: --output json"
    rows = [
        (
            str(pod.slice_index), str(pod.worker), str(pod.attempt), "Leaving" if pod.leaving else pod.phase,
            "" if pod.exit_code is None else str(pod.exit_code), pod.node or "", age(pod.started_at), _short(pod.message),
        )
        for pod in shown
    ]  # fmt: skip
    return (table(rows, ("SLICE", "WORKER", "ATTEMPT", "PHASE", "EXIT", "NODE", "AGE", "MESSAGE")) if rows else "") + rest


def _events(events: Sequence[Event], now: datetime) -> str:
    rows = [(age(event.at, now), event.about, event.reason, _short(event.message)) for event in events]
    return table(rows, ("AGE", "ABOUT", "WARNING", "MESSAGE"))


def age(then: datetime | None, now: datetime | None = None) -> str:
    """`42s`, `7m`, `3h`, `5d` since `then`."""
    if then is None:
        return ""
    seconds = max(0, int(((now or datetime.now(UTC)) - then).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _short(text: str, limit: int = 100) -> str:
    words = visible(" ".join(text.split()))
    return words if len(words) <= limit else f"{words[: limit - 3]}..."
