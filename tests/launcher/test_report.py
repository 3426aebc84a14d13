"""What `status` shows, from recorded situations and from a run's own record."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from launcher.backend.scene import Scene
from launcher.cli.show import line, whole
from launcher.labels import SPOT_LABEL
from launcher.observe.progress import last_progress, progress_in
from launcher.observe.report import Quota, report
from tests.cluster.situations import SITUATIONS
from tests.launcher.test_saves import commit
from tests.launcher.test_why import recorded
from trainer.contract import ATTEMPT_ENDED, SURVIVOR_WAIT_SECONDS

# As the trainer prints them, each after the kubelet's time.
LOG = (
    "2026-11-21T06:45:05.5Z nnxlaunch 0.1.0  jax 0.8.1  python 3.12.1  revision unknown",
    "2026-11-21T06:45:06.5Z [ 1/80]  loss 5.5413  first step after 3.1 s",
    "2026-11-21T06:45:07.5Z [10/80]  loss 4.0012  12,345 tokens/s  83 ms/step  MFU 1.2 %  ETA 0:06",
    "2026-11-21T06:45:08.0Z checkpoint committed: step 10",
    "2026-11-21T06:45:08.5Z [20/80]  loss nan  12,345 tokens/s  1.25 s/step  ETA 0:05",
    "not a line of the trainer",
)


def test_a_waiting_job_shows_its_place_and_the_quota_of_what_it_asks_for() -> None:
    queue = report(recorded("quota-used")).queue
    assert queue is not None
    assert (queue.name, queue.position, queue.waiting) == ("tpu", 1, 1)
    assert queue.quota == (
        Quota(resource="cpu", asked="40m", used="40m", limit="50m"),
        Quota(resource="memory", asked="128Mi", used="128Mi", limit="1Gi"),
    )


def test_the_log_of_process_0_tells_the_last_step_and_the_last_checkpoint() -> None:
    found = progress_in(LOG)
    assert found is not None
    assert (found.done, found.total, found.step_seconds, found.checkpoint) == (20, 80, 1.25, 10)
    assert str(found.loss) == "nan"
    assert found.at and found.checkpoint_at
    assert found.at - found.checkpoint_at == timedelta(seconds=0.5)
    assert progress_in(()) is None


def test_a_save_that_outlasts_the_grace_is_remarked_on_until_the_job_has_ended() -> None:
    running = replace(recorded("running"), log=("2026-11-21T06:45:08.0Z checkpoint committed: step 10  seconds 115.25",))
    (remark,) = report(running).remarks
    assert (remark.code, "took 115.2 s: a host that is asked to leave needs up to 126 s and has" in remark.sentence) == ("grace-save", True)
    assert "grace_seconds: 126 in the spec" in remark.fix
    assert str(remark) in whole(report(running), "here") and "saved in 115.2 s" in whole(report(running), "here")
    spot = replace(running, jobset=copy.deepcopy(running.jobset))
    pod = spot.jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["nodeSelector"] = {SPOT_LABEL: "true"}
    assert "checkpoint.every_steps" in report(spot).remarks[0].fix
    assert report(replace(recorded("completed"), log=running.log)).remarks == ()
    for fits in ("step 10", f"step 10  seconds {pod['terminationGracePeriodSeconds'] - SURVIVOR_WAIT_SECONDS:.3f}"):
        assert report(replace(running, log=(f"2026-11-21T06:45:08.0Z checkpoint committed: {fits}",))).remarks == ()


def test_what_a_code_without_a_rule_was_is_told_by_the_trainer_of_the_next_attempt() -> None:
    scene = recorded("crash-loop")
    ended = scene.status.attempt - 1
    assert "keeps no more of a replaced pod" in report(scene).last_restart
    told = "slice 0, worker 1 exited with 137: killed: out of memory"
    for attempt, known in ((ended, True), (ended - 1, False)):
        line = f"2026-11-21T06:45:05.5Z {ATTEMPT_ENDED} {attempt}: {told}"
        assert (report(replace(scene, log=(line,))).last_restart == told) is known


def test_a_run_directory_on_this_machine_tells_the_same(tmp_path: Path) -> None:
    records = [
        {"kind": "step", "time": 100.0, "done": 10, "loss": 4.0, "step_seconds": 0.5},
        {"kind": "event", "time": 101.0, "event": "checkpoint committed", "step": 10, "seconds": 2.5},
        {"kind": "step", "time": 102.0, "done": 20, "loss": "NaN", "step_seconds": 0.25},
    ]
    (tmp_path / "metrics").mkdir()
    lines = [json.dumps(record) for record in records] + ['{"kind": "step", "done": 30']
    (tmp_path / "metrics" / "metrics.jsonl").write_text("\n".join(lines))
    found = last_progress(str(tmp_path))
    assert found is not None
    assert (found.done, found.step_seconds, found.checkpoint, found.save_seconds) == (20, 0.25, 10, 2.5)
    assert str(found.loss) == "nan"


def test_a_checkpoint_counts_from_its_commit_on_and_not_from_when_the_trainer_tells_of_it(tmp_path: Path) -> None:
    told = {"kind": "event", "time": 101.0, "event": "checkpoint committed", "step": 10, "seconds": 2.5}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.jsonl").write_text(json.dumps(told))
    commit(str(tmp_path), 10, 2.0)
    assert last_progress(str(tmp_path)) == progress_in(("1970-01-01T00:01:41Z checkpoint committed: step 10  seconds 2.5",))
    commit(str(tmp_path), 20, 3.5)
    os.utime(tmp_path / "checkpoints/20/commit.json", (200.0, 200.0))
    (tmp_path / "checkpoints" / "30").mkdir()  # not committed yet
    found = last_progress(str(tmp_path))
    assert found is not None and found.checkpoint_at is not None
    assert (found.checkpoint, found.save_seconds) == (20, 3.5)
    assert found.checkpoint_at.timestamp() == 200.0


@pytest.mark.parametrize("name", [situation.name for situation in SITUATIONS])
def test_every_situation_fits_on_a_screen_and_is_plain_data_for_scripts(name: str) -> None:
    told = report(recorded(name))
    text = whole(told, "kubernetes, namespace x")
    assert len(text.splitlines()) < 50
    assert told.cause.fix in text
    assert "\n" not in line(told)
    assert json.loads(json.dumps(told.as_data()))["cause"]["code"] == told.cause.code


def large(slices: int, hosts: int) -> Scene:
    """The recorded running job, of many slices; one host is not ready."""
    small = recorded("running")
    jobset = copy.deepcopy(small.jobset)
    part = jobset["spec"]["replicatedJobs"][0]
    part["replicas"] = slices
    part["template"]["spec"] |= {"completions": hosts, "parallelism": hosts}
    pods = []
    for index in range(slices * hosts):
        pod = copy.deepcopy(small.pods[0])
        pod["metadata"]["name"] = f"train-slice-{index // hosts}-{index % hosts}-abcde"
        pod["metadata"]["labels"] |= {f"jobset.sigs.k8s.io/job-{name}": str(index // hosts) for name in ("index", "global-index")}
        pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = str(index % hosts)
        pods.append(pod)
    next(c for c in pods[min(77, len(pods) - 1)]["status"]["conditions"] if c["type"] == "Ready")["status"] = "False"
    return replace(small, jobset=jobset, pods=tuple(pods), log=LOG)


def test_of_a_large_job_only_the_hosts_that_are_not_well_are_listed() -> None:
    told = report(large(64, 8))
    text = whole(told, "kubernetes, namespace x")
    assert "63 of 64 slices, 511 of 512 hosts" in text
    assert "20 of 80 steps done, loss nan, 1.25 s a step" in text
    assert "checkpoint  step 10" in text
    assert "511 pods are ready" in text
    assert [row.split()[:2] for row in text.splitlines() if row.startswith("9 ")] == [["9", "5"]]
    assert len(text.splitlines()) < 20


def test_what_others_wrote_cannot_rewrite_the_terminal() -> None:
    scene = recorded("bad-config")
    pod = copy.deepcopy(scene.pods[0])
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = "\x1b[2J\x1b]0;owned\x07bad"
    hostile = replace(scene, pods=(pod,))
    assert "\x1b" not in whole(report(hostile), "x") + line(report(hostile))


def test_what_every_start_meets_is_not_shown_once_all_runs() -> None:
    denied = "follower pod node selector for topology domain not found. missing"
    words = f'Error creating: admission webhook "vpod.kb.io" denied the request: {denied}'
    job = {"kind": "Job", "name": "train-slice-1"}
    refused = {"involvedObject": job, "type": "Warning", "reason": "FailedCreate", "message": words, "metadata": {}}
    other = {**refused, "message": "Error creating: exceeded quota: small"}
    running, starting = replace(recorded("running"), events=(refused, other)), replace(large(2, 2), events=(refused, other))
    assert ("follower" in whole(report(running), "here"), "exceeded quota" in whole(report(running), "here")) == (False, True)
    assert "follower" in whole(report(starting), "here")
