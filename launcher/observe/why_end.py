"""Why a job has failed, restarts again and again, or is on its way out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import SUBMIT_INTERRUPTED, SUPERVISOR_LOST, JobState, explain_exit, first_to_end
from launcher.backend.values import items, mapping
from launcher.observe.cause import Cause, Pod, all_pods_of, condition_line, counted, named, one_line, pods_of, said_by
from launcher.observe.history import JOB_FAILURES, KILLERS, Ended, restarts
from trainer.contract import FATAL_EXIT_CODES, Exit

LOOP: Final = 3
"""Restarts in a row that make a loop."""
HINT_CHARACTERS: Final = 1000
"""More than of other words: it holds what is to be typed."""
LOOP_MINUTES: Final = 60
SETTLED_MINUTES: Final = 5

_ADVICE: Final[dict[int, str]] = {
    Exit.CONFIG: "correct what its last words name, then: nnxlaunch validate SPEC; nnxlaunch submit SPEC --replace",
    Exit.NUMERICS: "look at the loss before it; a lower learning rate, clipping or an earlier checkpoint, then submit with --replace",
    Exit.SOFTWARE: "a defect or several attempts without progress; its last words say which",
}


def failed(scene: Scene) -> Cause:
    status = scene.status
    ending = next((c for c in status.conditions if c.type == "Failed" and c.status), None)
    pod = _culprit(scene)
    code = pod.status.exit_code if pod else None
    history = restarts(scene)
    evidence = (
        *((_last_words(pod),) if pod else ()),
        *((f"jobset/{scene.name}: {ending.reason}: {one_line(ending.message)}",) if ending else ()),
        *said_by(*[event for event in scene.said(about="job") if event.reason in JOB_FAILURES][:2]),
    )
    if ending and ending.reason in (SUPERVISOR_LOST, SUBMIT_INTERRUPTED):
        begun = ending.reason == SUPERVISOR_LOST
        return Cause(
            code="supervisor-lost" if begun else "submit-interrupted",
            sentence=one_line(ending.message),
            fix="nnxlaunch submit SPEC --replace: the same spec goes on from its last committed checkpoint" if begun
            else "nnxlaunch submit SPEC, the same spec as before",
            evidence=evidence,
        )  # fmt: skip
    logs = _logs(scene, pod)
    out_of_budget = bool(ending and ending.reason == "ReachedMaxRestarts")
    used = f"the restart budget ({status.restarts_max}) is used up" if status.restarts_max else "its restart budget is 0"
    if pod and _out_of_memory(pod):
        limit = mapping(mapping(pod.spec["containers"][0].get("resources")).get("limits")).get("memory", "none")
        return Cause(
            code="out-of-memory",
            sentence=f"{pod.where} used more memory than its limit ({limit}) and was killed; {used}",
            fix="raise resources.memory of the spec, or use less (a smaller batch, fewer data workers), and submit with --replace",
            evidence=evidence,
        )
    if pod and code in (126, 127, 128):
        return Cause(
            code="command",
            sentence=f"{pod.where}: the container cannot be started: {one_line(pod.status.message) or explain_exit(code)}",
            fix=f"is {pod.image} an image of the trainer? See: nnxlaunch image --help",
            evidence=evidence,
        )
    if pod and code in FATAL_EXIT_CODES and not out_of_budget:
        words = f": {one_line(pod.status.words)}" if pod.status.words not in ("", "Error") else ""
        hint = one_line(pod.status.hint, HINT_CHARACTERS)
        advice = (
            f"{hint}; then: nnxlaunch submit SPEC --replace"
            if hint
            else _ADVICE.get(code, "its last lines say why" if words else f"is {pod.image} an image of the trainer? Its last lines say why")
        )
        return Cause(
            code="fatal-exit",
            sentence=f"{pod.where} exited with {explain_exit(code)}{words}; a restart cannot help, so the job was stopped",
            fix=f"{advice}; {logs}",
            evidence=evidence,
        )
    if out_of_budget:
        times = f" after {counted(status.restarts_used, 'counted restart')}" if status.restarts_used else ""
        return Cause(
            code="budget-used",
            sentence=f"{_how(pod) or (history[0].sentence if history else status.message)}, and {used}{times}",
            fix=f"{logs}; then submit with --replace (it resumes from its last checkpoint), with a larger failure.max_restarts "
            "if it is the machines' fault",
            evidence=evidence,
        )
    return Cause(
        code="failed",
        sentence=one_line(status.message) or "the job has failed",
        fix=f"{logs}; nnxlaunch events {scene.name}",
        evidence=evidence,
    )


def looping(scene: Scene) -> Iterator[Cause]:
    """Three restarts or more, one after the other, and the present attempt has not settled."""
    history = restarts(scene)
    recent = [ended for ended in history if ended.at and scene.now - ended.at < timedelta(minutes=LOOP_MINUTES)]
    if scene.status.attempt < LOOP or len(recent) < LOOP or _settled(scene):
        return
    status, last = scene.status, recent[0]
    logs = f"read how it ended: nnxlaunch logs {scene.name} --previous"
    if all(ended.free for ended in recent[:LOOP]):
        yield Cause(
            code="free-restarts",
            sentence=f"restarted {status.attempt} times, the last {LOOP} for free: {last.sentence}",
            fix=f"its hosts are taken away again and again: use other capacity, or ask who does it; {logs}",
            evidence=said_by(*last.evidence),
        )
        return
    budget = f"{status.restarts_used} of {status.restarts_max} used"
    culprit = _culprit(scene)
    present = _how(culprit) if culprit and culprit.status.attempt == status.attempt else ""
    yield Cause(
        code="crash-loop",
        sentence=f"crash loop: restarted {status.attempt} times ({budget}); {f'now {present}' if present else f'last: {last.sentence}'}",
        fix=f"{logs}; nnxlaunch cancel {scene.name} stops it, its checkpoints stay",
        evidence=said_by(*last.evidence),
    )


def leaving(scene: Scene) -> Iterator[Cause]:
    """Pods that have been told to end."""
    pods = [pod for pod in all_pods_of(scene) if pod.status.leaving]
    if not pods:
        return
    grace = max(int(pod.spec.get("terminationGracePeriodSeconds", 30)) for pod in pods)
    names = named([pod.status.name for pod in pods])
    waits = f"waiting for {counted(len(pods), 'pod')} to leave (grace {grace} s): {names}"
    evidence = tuple(f"pod/{pod.status.name}: deletionTimestamp {pod.manifest['metadata']['deletionTimestamp']}" for pod in pods[:4])
    force = f"kubectl delete pod -n {scene.namespace} --grace-period=0 --force {pods[0].status.name}"
    if scene.status.state is JobState.CANCELLING:
        yield Cause(
            code="leaving", sentence=f"the job is being removed; {waits}",
            fix=f"wait at most the grace period; a pod that stays longer is on a node that does not answer: {force}", evidence=evidence,
        )  # fmt: skip
        return
    for pod in pods:
        if disrupted := pod.conditions.get("DisruptionTarget"):
            why = str(disrupted.get("reason", ""))
            preempted = why == "PreemptionByScheduler"
            yield Cause(
                code="preempted" if preempted else "disrupted",
                sentence=f"{pod.where} is being taken away: "
                + ("preempted for a pod of higher priority" if preempted else one_line(str(disrupted.get("message")) or why))
                + "; the job restarts for free",
                fix="nothing: it resumes from its last checkpoint when it has a place again"
                + ("; a higher `priority` would protect it" if preempted else ""),
                evidence=(
                    condition_line(f"pod/{pod.status.name}", disrupted),
                    *said_by(*(event for event in scene.said(about=f"pod/{pod.status.name}") if event.reason in KILLERS)),
                ),
            )
    culprit = _culprit(scene)
    yield Cause(
        code="restarting",
        sentence=f"{f'{_how(culprit)}; ' if culprit else ''}the job restarts: {waits}",
        fix="wait: at most the grace period, then new pods are made",
        evidence=(*((_last_words(culprit),) if culprit else ()), *evidence),
    )


def restarted(scene: Scene) -> Iterator[Cause]:
    """The new attempt's pods are coming, and nothing is wrong with them."""
    history = restarts(scene)
    if not history or scene.status.attempt == 0:
        return
    last = history[0]
    budget = "for free" if last.free else f"{scene.status.restarts_used} of {scene.status.restarts_max} used"
    disk = last.evicted is not None and "mptyDir" in last.evicted.message
    fix = (
        "write less there (files of /tmp count), or raise the size limit of that volume in `volumes`, and submit with --replace"
        if disk
        else "wait: it resumes from its last checkpoint"
    )
    yield Cause(
        code="evicted" if last.evicted and last.evicted.reason == "Evicted" else "restarting",
        sentence=f"attempt {scene.status.attempt} is starting ({budget}): {last.sentence}",
        fix=fix,
        evidence=said_by(*last.evidence),
    )


def last_restart(scene: Scene) -> str:
    """`; restarted once, ...` for a job that runs; empty without restarts."""
    status = scene.status
    if not status.attempt:
        return ""
    history: list[Ended] = restarts(scene)
    times = "once" if status.attempt == 1 else f"{status.attempt} times"
    return f"; restarted {times} ({status.restarts_free} free)" + (f", last: {history[0].sentence}" if history else "")


def _settled(scene: Scene) -> bool:
    """Whether all pods of the attempt have run for some minutes."""
    starts = [pod.status.started_at for pod in pods_of(scene) if pod.status.phase == "Running"]
    known = [start for start in starts if start]
    if scene.status.state is not JobState.RUNNING or not known or len(known) < len(starts):
        return False
    return scene.now - max(known) > timedelta(minutes=SETTLED_MINUTES)


def _culprit(scene: Scene) -> Pod | None:
    """The pod that `status` names: its Job's failure message does, else the first that ended badly.

    Of the present attempt; while that has no pods yet, of the last one of which pods are left.
    """
    pods = pods_of(scene) or all_pods_of(scene)
    newest = max((pod.status.attempt for pod in pods), default=0)
    ended = [pod for pod in pods if pod.status.exit_code and pod.status.attempt == newest]
    said = [
        str(condition.get("message", ""))
        for job in scene.jobs
        for condition in items(mapping(job.get("status")).get("conditions"))
        if condition["type"] in ("Failed", "FailureTarget") and condition["status"] == "True"
    ]
    if named_ := next((pod for pod in ended if any(pod.status.name in words for words in said)), None):
        return named_
    first = first_to_end(pod.status for pod in ended)
    return next((pod for pod in ended if pod.status is first), None)


def _how(pod: Pod | None) -> str:
    return f"{pod.where} exited with {explain_exit(pod.status.exit_code)}" if pod and pod.status.exit_code is not None else ""


def _out_of_memory(pod: Pod) -> bool:
    containers = items(mapping(pod.manifest.get("status")).get("containerStatuses"))
    return "out of memory" in pod.status.message or any(
        mapping(mapping(container.get("state")).get("terminated")).get("reason") == "OOMKilled" for container in containers
    )


def _last_words(pod: Pod) -> str:
    return f"pod/{pod.status.name}: exit code {pod.status.exit_code}: {one_line(pod.status.words) or 'no words'}"


def _logs(scene: Scene, pod: Pod | None) -> str:
    place = f" --slice {pod.status.slice_index} --worker {pod.status.worker}" if pod else ""
    return f"nnxlaunch logs {scene.name}{place}"
