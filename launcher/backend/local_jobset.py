"""What the JobSet and Job controllers do with a rendered JobSet, as a state machine without processes or clocks.

Semantics of JobSet 0.12 and Kubernetes 1.36 for what this launcher renders: Indexed Jobs, `backoffLimit` (without the pauses
before a pod is replaced), `podFailurePolicy` on exit codes, failure rules on reasons and messages (the first rule that matches any
failed Job wins), counted and free restarts, recreation once all pods are gone. The state is kept as API objects, so that
`launcher.backend.status` reads it as it reads a cluster's answer.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Final

from launcher.backend.status import (
    COMPLETION_INDEX_LABEL,
    JOB_INDEX_LABEL,
    JOBSET_NAME_LABEL,
    REPLICATED_JOB_LABEL,
    RESTART_ATTEMPT_LABEL,
    Event,
    Manifest,
)
from launcher.backend.values import items, mapping, strings
from trainer.contract import CONTAINER_NAME

FAIL: Final = "FailJobSet"
RESTART: Final = "RestartJobSet"
RESTART_FREE: Final = "RestartJobSetAndIgnoreMaxRestarts"
JOB_NAME_LABEL: Final = "batch.kubernetes.io/job-name"
JOB_UID_LABEL: Final = "batch.kubernetes.io/controller-uid"


class LocalJobSet:
    """One JobSet and its children. `now` gives the time of each transition."""

    def __init__(self, jobset: Manifest, now: Callable[[], datetime]) -> None:
        self._now = now
        self.jobset: Manifest = {**jobset, "status": {"restarts": 0, "restartsCountTowardsMax": 0, "conditions": []}}
        self.jobset["metadata"] = {
            "creationTimestamp": self._time(), "namespace": "default", "uid": str(uuid.uuid4()), **jobset["metadata"],
        }  # fmt: skip
        self.jobs: list[Manifest] = []
        self.pods: dict[str, Manifest] = {}  # of all attempts
        self._owed: list[tuple[Manifest, int]] = []  # Jobs and indices of pods that have failed and are replaced
        self.events: list[Event] = []

    @property
    def attempt(self) -> int:
        return self.jobset["status"]["restarts"]

    @property
    def finished(self) -> bool:
        return "terminalState" in self.jobset["status"]

    def start(self) -> list[Manifest]:
        """Create the Jobs and pods of the present attempt; the pods are pending."""
        self.jobs = [self._job(replicated, index) for replicated, index in _each_job(self.jobset)]
        created: list[Manifest] = []
        for job in self.jobs:
            created += [self._pod(job, index) for index in range(job["spec"]["completions"])]
        self.pods |= {pod["metadata"]["name"]: pod for pod in created}
        self._event(f"jobset/{self._name}", "Started", f"attempt {self.attempt}: {len(created)} pods")
        return created

    def pod_started(self, name: str) -> None:
        self._set(name, "Running", {"running": {"startedAt": self._time()}}, ready=True)

    def pod_leaving(self, name: str) -> None:
        self.pods[name]["metadata"]["deletionTimestamp"] = self._time()

    def pod_ended(self, name: str, exit_code: int, message: str) -> None:
        """A pod's main process ended; what follows for its Job and the JobSet shows in `doomed`, `recreate`, `finished`."""
        pod = self.pods[name]
        asked = pod["metadata"].pop("deletionTimestamp", None) is not None
        started = mapping(pod["status"]["containerStatuses"][0]["state"].get("running")).get("startedAt")
        ended: Manifest = {"exitCode": exit_code, "message": message, "startedAt": started, "finishedAt": self._time()}
        self._set(name, "Failed" if exit_code else "Succeeded", {"terminated": ended}, ready=False)
        job = next((job for job in self.jobs if job["metadata"]["name"] == pod["metadata"]["labels"][JOB_NAME_LABEL]), None)
        if pod["metadata"]["labels"][RESTART_ATTEMPT_LABEL] != str(self.attempt) or job is None:
            return
        words = (f": {message}" if message else "") + (" (it was told to leave)" if asked else "")
        self._event(f"pod/{name}", "Ended", f"exit code {exit_code}{words}", warning=exit_code != 0 and not asked)
        self._judge_job(job, pod, exit_code)
        self._judge_jobset()

    def replacements(self) -> list[Manifest]:
        """Create the pods that Jobs owe for failed ones; they are pending."""
        created = [self._pod(job, index) for job, index in self._owed]
        self._owed = []
        self.pods |= {pod["metadata"]["name"]: pod for pod in created}
        return created

    def doomed(self) -> list[str]:
        """Pods that run and must go, because their Job has failed or the JobSet has made up its mind."""
        failing = {job["metadata"]["name"] for job in self.jobs if _has(job, "FailureTarget")}
        return [
            name
            for name, pod in self.pods.items()
            if pod["status"]["phase"] in ("Pending", "Running") and (self._decided or pod["metadata"]["labels"][JOB_NAME_LABEL] in failing)
        ]

    @property
    def recreate(self) -> bool:
        """The decision was to restart, and nothing of the old attempt is left (BlockingRecreate)."""
        return self._decided in (RESTART, RESTART_FREE) and not self._alive()

    def restart(self) -> list[Manifest]:
        """Begin the next attempt; its pods, pending."""
        status = self.jobset["status"]
        if self._decided == RESTART:
            status["restartsCountTowardsMax"] += 1
        status["restarts"] += 1
        self._decided = ""
        return self.start()

    _decided = ""

    def _judge_job(self, job: Manifest, pod: Manifest, exit_code: int) -> None:
        name = job["metadata"]["name"]
        mine = self._latest(name)
        if exit_code and not _has(job, "FailureTarget"):
            action = pod_action(job["spec"], exit_code)[0]
            job["status"]["failed"] = job["status"].get("failed", 0) + (action != "Ignore")
            replaced = action != "FailJob" and not self._decided
            if replaced and job["status"]["failed"] <= job["spec"].get("backoffLimit", 0):
                self._owed.append((job, int(pod["metadata"]["labels"][COMPLETION_INDEX_LABEL])))
                counted = "without counting" if action == "Ignore" else f"{job['status']['failed']} of {job['spec']['backoffLimit']}"
                self._event(f"job/{name}", "PodReplaced", f"pod {pod['metadata']['name']} is replaced, {counted}", warning=True)
                return
            reason, message = job_failure(job["spec"], pod, exit_code)
            self._condition(job, "FailureTarget", reason, message)
        if _has(job, "FailureTarget") and not any(_alive(pod) for pod in mine):
            target = next(condition for condition in job["status"]["conditions"] if condition["type"] == "FailureTarget")
            self._condition(job, "Failed", target["reason"], target["message"])
            self._event(f"job/{name}", target["reason"], target["message"], warning=True)
        elif all(pod["status"]["phase"] == "Succeeded" for pod in mine):
            self._condition(job, "Complete", "CompletionsReached", "all pods succeeded")

    def _judge_jobset(self) -> None:
        if self._decided:
            return
        failed = [job for job in self.jobs if _has(job, "Failed")]
        if failed:
            action, rule = decide(self.jobset["spec"].get("failurePolicy"), failed)
            maximum = self.jobset["spec"].get("failurePolicy", {}).get("maxRestarts", 0)
            used = self.jobset["status"]["restartsCountTowardsMax"]
            first = f"(first failed job: {failed[0]['metadata']['name']})"
            if action == FAIL:
                reason = "FailJobSetFailurePolicyAction" if rule else "FailedJobs"
                self._finish("Failed", reason, f"jobset failed due to {f'failure rule {rule}' if rule else 'a failed job'} {first}")
            elif action == RESTART and used >= maximum:
                words = f"jobset failed due to reaching max number of restarts ({used} of {maximum} used) {first}"
                self._finish("Failed", "ReachedMaxRestarts", words)
            else:
                self._decided = action
                counted = f"restart {used + 1} of {maximum}" if action == RESTART else "restart without using the budget"
                words = f"applying {action} failure policy action {first}: {counted}{f' by rule {rule}' if rule else ''}"
                self._event(f"jobset/{self._name}", f"{action}FailurePolicyAction", words, warning=True)
        elif all(_has(job, "Complete") for job in self.jobs):
            self._finish("Completed", "AllJobsCompleted", "jobset completed successfully")

    def _finish(self, state: str, reason: str, message: str) -> None:
        self._decided = FAIL
        self._condition(self.jobset, state, reason, message)
        self.jobset["status"]["terminalState"] = state
        self._event(f"jobset/{self._name}", reason, message, warning=state == "Failed")

    @property
    def _name(self) -> str:
        return self.jobset["metadata"]["name"]

    def _of_attempt(self) -> list[Manifest]:
        return [pod for pod in self.pods.values() if pod["metadata"]["labels"][RESTART_ATTEMPT_LABEL] == str(self.attempt)]

    def _latest(self, job: str) -> list[Manifest]:
        """The last pod of each index of a Job."""
        mine = [pod for pod in self._of_attempt() if pod["metadata"]["labels"][JOB_NAME_LABEL] == job]
        return list({pod["metadata"]["labels"][COMPLETION_INDEX_LABEL]: pod for pod in mine}.values())

    def _alive(self) -> bool:
        return any(_alive(pod) for pod in self.pods.values())

    def _job(self, replicated: Manifest, index: int) -> Manifest:
        template = replicated["template"]
        name = f"{self._name}-{replicated['name']}-{index}"
        labels = {
            JOBSET_NAME_LABEL: self._name,
            REPLICATED_JOB_LABEL: replicated["name"],
            JOB_INDEX_LABEL: str(index),
            RESTART_ATTEMPT_LABEL: str(self.attempt),
        }
        own, uid = mapping(template.get("metadata")), str(uuid.uuid4())
        spec = {**template["spec"]}
        spec.setdefault("completions", spec.get("parallelism", 1))
        return {
            "metadata": {
                "name": name,
                "uid": uid,
                "labels": {**mapping(own.get("labels")), **labels},
                "annotations": mapping(own.get("annotations")),
            },
            "spec": spec,
            "status": {"conditions": []},
        }

    def _pod(self, job: Manifest, index: int) -> Manifest:
        template = job["spec"]["template"]
        own = mapping(template.get("metadata"))
        labels = {**mapping(own.get("labels")), **job["metadata"]["labels"]}
        labels |= {JOB_NAME_LABEL: job["metadata"]["name"], JOB_UID_LABEL: job["metadata"]["uid"], COMPLETION_INDEX_LABEL: str(index)}
        name = f"{job['metadata']['name']}-{index}-a{self.attempt}"
        earlier = sum(other == name or other.startswith(f"{name}-r") for other in self.pods)
        metadata: dict[str, Any] = {
            "name": f"{name}-r{earlier}" if earlier else name,
            "namespace": self.jobset["metadata"]["namespace"],
            "uid": str(uuid.uuid4()),
            "labels": labels,
            "annotations": {**job["metadata"]["annotations"], **mapping(own.get("annotations"))},
        }
        waiting = {"name": container_of(template["spec"])["name"], "state": {"waiting": {"reason": "ContainerCreating"}}}
        return {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending", "containerStatuses": [waiting]}}

    def _set(self, name: str, phase: str, state: Manifest, *, ready: bool) -> None:
        status = self.pods[name]["status"]
        status["phase"] = phase
        status["containerStatuses"][0]["state"] = state
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]

    def _condition(self, owner: Manifest, kind: str, reason: str, message: str) -> None:
        found = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": self._time()}
        owner["status"]["conditions"].append(found)

    def _event(self, about: str, reason: str, message: str, *, warning: bool = False) -> None:
        self.events.append(Event(at=self._now(), warning=warning, reason=reason, message=message, about=about))

    def _time(self) -> str:
        return self._now().isoformat(timespec="milliseconds")


def pod_action(job_spec: Manifest, exit_code: int) -> tuple[str, int]:
    """What a Job does about a pod that ended with `exit_code`, and the index of the rule that says so: `Count` where none does."""
    container = container_of(job_spec["template"]["spec"])["name"]
    for index, rule in enumerate(items(mapping(job_spec.get("podFailurePolicy")).get("rules"))):
        on = rule.get("onExitCodes")
        if on and on.get("containerName") in (None, container) and (exit_code in on["values"]) == (on["operator"] == "In"):
            return rule["action"], index
    return "Count", -1


def job_failure(job_spec: Manifest, pod: Manifest, exit_code: int) -> tuple[str, str]:
    """Reason and message of a Job that fails because a pod ended with `exit_code`, as the Job controller writes them."""
    action, index = pod_action(job_spec, exit_code)
    if action == "FailJob":
        container = container_of(job_spec["template"]["spec"])["name"]
        where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        return (
            "PodFailurePolicy",
            f"Container {container} for pod {where} failed with exit code {exit_code} matching FailJob rule at index {index}",
        )
    return (
        "BackoffLimitExceeded",
        f"Job has reached the specified backoff limit: pod {pod['metadata']['name']} ended with exit code {exit_code}",
    )


def decide(policy: Manifest | None, failed_jobs: list[Manifest]) -> tuple[str, str]:
    """The JobSet's action and the name of the rule it comes from (empty: the default)."""
    if policy is None:
        return FAIL, ""
    for rule in items(policy.get("rules")):
        for job in failed_jobs:
            condition = next(condition for condition in job["status"]["conditions"] if condition["type"] == "Failed")
            targets, reasons = strings(rule.get("targetReplicatedJobs")), strings(rule.get("onJobFailureReasons"))
            patterns = strings(rule.get("onJobFailureMessagePatterns"))
            if (
                (not targets or job["metadata"]["labels"][REPLICATED_JOB_LABEL] in targets)
                and (not reasons or condition["reason"] in reasons)
                and (not patterns or any(re.search(pattern, condition["message"]) for pattern in patterns))
            ):
                return rule["action"], rule["name"]
    return RESTART, ""


def container_of(pod_spec: Manifest) -> Manifest:
    """The container that decides; the others, if any, are sidecars."""
    return next((c for c in pod_spec["containers"] if c["name"] == CONTAINER_NAME), pod_spec["containers"][0])


def _each_job(jobset: Manifest) -> Iterator[tuple[Manifest, int]]:
    for replicated in jobset["spec"]["replicatedJobs"]:
        for index in range(replicated.get("replicas", 1)):
            yield replicated, index


def _has(job: Manifest, kind: str) -> bool:
    return any(condition["type"] == kind for condition in job["status"]["conditions"])


def _alive(pod: Manifest) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")
