"""The controllers of the local backend, on the policies that `render` really gives. No processes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.backend import JobState, JobStatus, Manifest, job_status
from launcher.backend.local_jobset import LocalJobSet, decide, job_failure
from launcher.backend.status import failure_cause, pod_status
from tests.launcher.local_jobs import TRAIN, jobset_of, manifests
from trainer.contract import FATAL_EXIT_CODES

COUNTED = (3, 76, 134, 137, 139, 143)


class Clock:
    """A second passes with every look."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


def started(*, hosts: int = 2, slices: int = 1, max_restarts: int = 3, mode: str = "smart") -> LocalJobSet:
    failure = {"max_restarts": max_restarts, "mode": mode}
    jobset = jobset_of(manifests(Path("runs"), "", hosts=hosts, slices=slices, failure=failure))
    control = LocalJobSet(jobset, Clock())
    run(control, control.start())
    return control


def run(control: LocalJobSet, pods: list[Manifest]) -> None:
    for created in pods:
        control.pod_started(created["metadata"]["name"])


def end_all(control: LocalJobSet, first: str, code: int, others: int) -> None:
    """`first` ends with `code`; everything that must go then, ends with `others`."""
    control.pod_ended(first, code, "")
    while doomed := control.doomed():
        control.pod_leaving(doomed[0])
        control.pod_ended(doomed[0], others, "")


def pod(control: LocalJobSet, slice_index: int = 0, worker: int = 0) -> str:
    return f"job-slice-{slice_index}-{worker}-a{control.attempt}"


def status(control: LocalJobSet) -> JobStatus:
    present = [p for p in control.pods.values() if pod_status(p).attempt == control.attempt]
    return job_status(control.jobset, present, control.jobs)


@pytest.mark.parametrize("code", FATAL_EXIT_CODES)
def test_a_fatal_exit_code_ends_the_job_at_once_and_its_cause_is_reported(code: int) -> None:
    control = started(slices=2)
    end_all(control, pod(control, 1, 1), code, 75)
    assert control.finished and not control.recreate
    found = status(control)
    assert found.state is JobState.FAILED and found.restarts_used == 0 and found.attempt == 0
    assert found.message.startswith(f"slice 1, worker 1 exited with {code} (")


def test_a_preempted_process_restarts_everything_without_using_the_budget() -> None:
    control = started(slices=2, max_restarts=0)
    for attempt in (1, 2, 3):
        end_all(control, pod(control, 1, 0), 75, 143)
        assert control.recreate
        run(control, control.restart())
        assert (status(control).attempt, status(control).restarts_used, status(control).restarts_free) == (attempt, 0, attempt)


@pytest.mark.parametrize("code", COUNTED)
def test_any_other_failure_restarts_within_the_budget_and_then_fails_with_its_cause(code: int) -> None:
    control = started(max_restarts=1)
    end_all(control, pod(control), code, 75)
    assert control.recreate
    run(control, control.restart())
    assert (status(control).restarts_used, status(control).state) == (1, JobState.RUNNING)
    end_all(control, pod(control), code, 75)
    assert control.finished and not control.recreate
    assert status(control).reason == "ReachedMaxRestarts"
    assert f"slice 0, worker 0 exited with {code}" in status(control).message and "1 of 1 used" in status(control).message


def test_of_several_failed_jobs_the_first_rule_that_matches_any_wins() -> None:
    control = started(hosts=1, slices=3)
    for index, code in ((0, 75), (1, 64), (2, 137)):
        control.pods[pod(control, index)]["status"]["phase"] = "Running"
        job = control.jobs[index]
        reason, message = job_failure(job["spec"], control.pods[pod(control, index)], code)
        job["status"]["conditions"] = [{"type": "Failed", "status": "True", "reason": reason, "message": message}]
    assert decide(control.jobset["spec"]["failurePolicy"], control.jobs) == ("FailJobSet", "fatal")
    assert decide(control.jobset["spec"]["failurePolicy"], [control.jobs[2], control.jobs[0]])[0] == "RestartJobSetAndIgnoreMaxRestarts"
    assert decide(control.jobset["spec"]["failurePolicy"], [control.jobs[2]]) == ("RestartJobSet", "")
    assert decide(None, [control.jobs[0]]) == ("FailJobSet", "")


def test_pods_are_recreated_only_after_the_last_one_is_gone() -> None:
    control = started(hosts=2, slices=2)
    control.pod_ended(pod(control, 0, 0), 76, "")
    assert control.doomed() == [pod(control, 0, 1)]  # first the rest of the failed slice ...
    control.pod_ended(pod(control, 0, 1), 75, "")
    assert control.doomed() == [pod(control, 1, 0), pod(control, 1, 1)] and not control.recreate  # ... then the other slices
    control.pod_ended(pod(control, 1, 0), 0, "")
    assert not control.recreate
    control.pod_ended(pod(control, 1, 1), 0, "")
    assert control.recreate and not control.finished


def test_the_job_is_complete_when_every_pod_ended_with_zero() -> None:
    control = started(hosts=2, slices=2)
    for slice_index, worker in ((0, 0), (1, 1), (1, 0)):
        control.pod_ended(pod(control, slice_index, worker), 0, "")
        assert not control.finished
    control.pod_ended(pod(control, 0, 1), 0, "")
    assert status(control).state is JobState.COMPLETED and not control.doomed()


def test_without_a_pod_failure_policy_every_failure_counts() -> None:
    control = started(mode="simple", max_restarts=1)
    end_all(control, pod(control), 64, 0)
    assert control.recreate
    control.restart()
    assert status(control).restarts_used == 1


def apart(*, hosts: int = 1, max_restarts: int = 1) -> LocalJobSet:
    """Two slices that are JAX worlds of their own."""
    train = {**TRAIN, "diloco": {"sync_every_steps": 2, "transport": "files"}}
    jobset = jobset_of(manifests(Path("runs"), "", hosts=hosts, slices=2, train=train, failure={"max_restarts": max_restarts}))
    control = LocalJobSet(jobset, Clock())
    run(control, control.start())
    return control


def test_a_slice_of_its_own_has_its_pods_replaced_while_the_others_go_on() -> None:
    control = apart(hosts=2)
    for code, worker in ((137, 1), (76, 0), (75, 1)):  # two failures count, of max_restarts x hosts
        name = next(name for name in reversed(control.pods) if name.startswith(f"job-slice-1-{worker}-"))
        control.pod_ended(name, code, "")
        assert not control.doomed() and not control.recreate and not control.finished
        (new,) = control.replacements()
        assert new["metadata"]["name"].startswith(f"job-slice-1-{worker}-a0-r") and not control.replacements()
        run(control, [new])
    found = status(control)
    assert (found.state, found.attempt, [part.failed for part in found.slices]) == (JobState.RUNNING, 0, [0, 0])
    for name in ("job-slice-0-0-a0", "job-slice-0-1-a0", "job-slice-1-0-a0-r1", "job-slice-1-1-a0-r2"):
        control.pod_ended(name, 0, "")
    assert status(control).state is JobState.COMPLETED


@pytest.mark.parametrize(("codes", "words"), [((64,), "exit code 64"), ((137, 137), "backoff limit")])
def test_a_slice_of_its_own_that_fails_for_good_ends_the_job(codes: tuple[int, ...], words: str) -> None:
    control = apart()
    for attempt, code in enumerate(codes):
        name = f"job-slice-1-0-a0-r{attempt}" if attempt else "job-slice-1-0-a0"
        if attempt:
            run(control, control.replacements())
        control.pod_ended(name, code, "")
    assert control.doomed() == ["job-slice-0-0-a0"]
    control.pod_leaving("job-slice-0-0-a0")
    control.pod_ended("job-slice-0-0-a0", 75, "")
    assert control.finished and not control.recreate and not control.replacements()
    failed = next(job for job in control.jobs if job["metadata"]["name"] == "job-slice-1")
    assert words in failed["status"]["conditions"][-1]["message"] and status(control).state is JobState.FAILED


def test_the_cause_is_the_pod_that_failed_its_job_not_the_one_told_to_leave() -> None:
    control = started(hosts=3)
    control.pod_ended(pod(control, 0, 2), 70, "a bug")
    for name in control.doomed():
        control.pod_leaving(name)
        control.pod_ended(name, 143, "")
    cause = failure_cause([pod_status(p) for p in control.pods.values()], control.jobs)
    assert cause == "slice 0, worker 2 exited with 70 (software error, or several attempts without progress): a bug"


def test_of_pods_that_ended_in_one_second_one_that_was_asked_to_leave_is_not_the_cause() -> None:
    def ended(worker: int, code: int) -> Manifest:
        state = {"terminated": {"exitCode": code, "finishedAt": "2026-11-21T10:00:00Z"}}
        labels = {"batch.kubernetes.io/job-completion-index": str(worker)}
        status = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}]}
        return {"metadata": {"name": f"job-slice-0-{worker}-abcde", "labels": labels}, "spec": {}, "status": status}

    assert failure_cause([pod_status(ended(0, 143)), pod_status(ended(1, 137))], []).startswith("slice 0, worker 1 exited with 137")
