"""What the API server, JobSet's webhook, the Job controller and Kueue refuse, checked on a rendered JobSet.

The rules of the spec keep most of this from happening; here the JobSet itself is read, as the servers read it, so that a
change of the renderer, or of one of its inputs, is seen before anything is sent. Paths are those of the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from launcher.checks.names import DNS_LABEL, DNS_SUBDOMAIN
from launcher.checks.server_pod import (
    chips_add_up,
    job_is_accepted,
    labels_fit,
    pod_is_accepted,
    problem,
    topology_request_is_whole,
)
from launcher.manifest.names import QUEUE_LABEL
from trainer.config import Problem

Manifest = Mapping[str, Any]

REASONS: Final = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
RULE_NAME: Final = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", re.ASCII)
INT32_MAX: Final = 2**31 - 1


def check_jobset(jobset: Manifest) -> Iterator[Problem]:
    """Every rule that needs no server, on one JobSet."""
    spec = jobset["spec"]
    for rule in (_names, _network, _replicated_jobs, _policies, _coordinator, _lifetime, _claims, _queue):
        yield from rule(jobset["metadata"], spec)
    for index, replicated in enumerate(spec["replicatedJobs"]):
        path = f"spec.replicatedJobs.{index}"
        job = replicated["template"]["spec"]
        yield from job_is_accepted(f"{path}.template.spec", job)
        yield from pod_is_accepted(f"{path}.template.spec.template", job["template"])
        yield from topology_request_is_whole(f"{path}.template.spec.template.metadata.annotations", replicated, job)
        yield from chips_add_up(path, replicated, job)


def _names(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    name: str = metadata["name"]
    if not DNS_LABEL.fullmatch(name):
        yield problem("metadata.name", f"{name!r} is not a DNS-1035 label", 3, value=name)
    for index, replicated in enumerate(spec["replicatedJobs"]):
        job = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}"
        if len(job) > 63:
            yield problem(f"spec.replicatedJobs.{index}", f"Job name {job!r} has {len(job)} characters", 1, value=job, limit=63)
        pod = f"{job}-{replicated['template']['spec'].get('completions', 1) - 1}-abcde"
        if len(pod) > 63:
            yield problem(f"spec.replicatedJobs.{index}", f"pod name {pod!r} has {len(pod)} characters", 2, value=pod, limit=63)
    yield from labels_fit("metadata.labels", metadata.get("labels", {}))


def _network(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    subdomain: str = spec.get("network", {}).get("subdomain", metadata["name"])
    if len(subdomain) > 63 or not DNS_LABEL.fullmatch(subdomain) or not DNS_SUBDOMAIN.fullmatch(subdomain):
        yield problem("spec.network.subdomain", f"{subdomain!r} is not a DNS label of at most 63 characters", 5, value=subdomain)


def _replicated_jobs(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    del metadata
    seen: list[str] = []
    jobs: Sequence[Manifest] = spec["replicatedJobs"]
    for index, replicated in enumerate(jobs):
        path, name = f"spec.replicatedJobs.{index}", replicated["name"]
        group = replicated.get("groupName", "default")
        if not DNS_LABEL.fullmatch(group) or len(group) > 63:
            yield problem(f"{path}.groupName", f"{group!r} is not a DNS-1035 label", 6, value=group)
        parallelism = replicated["template"]["spec"].get("parallelism", 1)
        if replicated["replicas"] * parallelism > INT32_MAX or parallelism > 100_000:
            yield problem(path, f"{replicated['replicas']} x {parallelism} pods", 7, limit=INT32_MAX)
        depends: Sequence[Manifest] = replicated.get("dependsOn", [])
        unknown = [on["name"] for on in depends if on["name"] not in seen]
        if name in seen or unknown or len(depends) > 5 or any(on.get("status") not in ("Ready", "Complete") for on in depends):
            yield problem(path, f"{name!r}: names are unique, and dependsOn names up to 5 earlier ones, Ready or Complete", 8, value=name)
        seen.append(name)
    if len(jobs) > 18:
        yield problem("spec.replicatedJobs", f"{len(jobs)} replicated jobs; Kueue takes 18", 22, limit=18)


def _policies(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    del metadata
    known = {replicated["name"] for replicated in spec["replicatedJobs"]}
    success = set(spec.get("successPolicy", {}).get("targetReplicatedJobs", []))
    if success - known:
        yield problem("spec.successPolicy.targetReplicatedJobs", f"unknown: {sorted(success - known)}", 9)
    names: list[str] = []
    policy = spec.get("failurePolicy", {})
    for index, rule in enumerate(policy.get("rules", [])):
        path, name = f"spec.failurePolicy.rules.{index}", rule.get("name", f"failurePolicyRule{index}")
        if set(rule.get("targetReplicatedJobs", [])) - known:
            yield problem(f"{path}.targetReplicatedJobs", "names an unknown replicated job", 9)
        if not RULE_NAME.fullmatch(name) or len(name) > 128 or name in names:
            yield problem(f"{path}.name", f"{name!r} is taken, or not a rule name of at most 128 characters", 10, value=name)
        names.append(name)
        if set(rule.get("onJobFailureReasons", [])) - set(REASONS):
            yield problem(f"{path}.onJobFailureReasons", f"reasons are {', '.join(REASONS)}", 11)
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            if not _compiles(pattern):
                where = f"{path}.onJobFailureMessagePatterns"
                yield problem(where, f"{pattern!r} is not a regular expression RE2 knows", 11, value=pattern)
        if rule["action"].startswith("RestartJob") and not rule["action"].startswith("RestartJobSet"):
            if any(replicated["replicas"] > 1024 for replicated in spec["replicatedJobs"]):
                yield problem(f"{path}.action", "restarting single Jobs works for at most 1024 replicas", 16, limit=1024)
    if policy.get("restartStrategy") == "InPlaceRestart":
        for index, replicated in enumerate(spec["replicatedJobs"]):
            job = replicated["template"]["spec"]
            whole = job.get("completions") == job.get("parallelism") and job.get("podReplacementPolicy") == "Failed"
            if not whole or job.get("backoffLimit") != INT32_MAX:
                path = f"spec.replicatedJobs.{index}"
                yield problem(path, f"in-place restart needs backoffLimit {INT32_MAX}, Failed, and completions = parallelism", 16)


def _compiles(pattern: str) -> bool:
    """Whether RE2 would take it: Python's syntax without look-around and back-references."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return not re.search(r"\(\?(=|!|<=|<!|P=|\()|\\[1-9]", pattern)


def _coordinator(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    coordinator = spec.get("coordinator")
    if coordinator is None:
        return
    path, jobs = "spec.coordinator", {replicated["name"]: replicated for replicated in spec["replicatedJobs"]}
    replicated = jobs.get(coordinator["replicatedJob"])
    if replicated is None:
        yield problem(path, f"no replicated job {coordinator['replicatedJob']!r}", 12)
        return
    job_index, pod_index, job = coordinator.get("jobIndex", 0), coordinator.get("podIndex", 0), replicated["template"]["spec"]
    if not 0 <= job_index < replicated["replicas"] or job.get("completionMode") != "Indexed":
        yield problem(path, f"job index {job_index} of {replicated['replicas']}, in an Indexed Job", 12, value=job_index)
    elif not 0 <= pod_index < job.get("completions", 0):
        yield problem(path, f"pod index {pod_index} of {job.get('completions', 0)}", 12, value=pod_index)
    subdomain = spec.get("network", {}).get("subdomain", metadata["name"])
    label = f"{metadata['name']}-{coordinator['replicatedJob']}-{job_index}-{pod_index}.{subdomain}"
    if len(label) > 63:
        yield problem(path, f"coordinator label {label!r} has {len(label)} characters", 4, value=label, limit=63)


def _lifetime(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    del metadata
    manager = spec.get("managedBy")
    if manager is not None and (len(manager) > 63 or not re.fullmatch(r"[a-z0-9.-]+\.[a-z0-9.-]+/\S+", manager)):
        yield problem("spec.managedBy", f"{manager!r} is not a domain-prefixed path of at most 63 characters", 13, value=manager)
    seconds = spec.get("ttlSecondsAfterFinished", 0)
    if not 0 <= seconds <= INT32_MAX:
        yield problem("spec.ttlSecondsAfterFinished", f"{seconds} is negative or too large", 14, value=seconds, limit=INT32_MAX)


def _claims(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    templates = [template for policy in spec.get("volumeClaimPolicies", []) for template in policy.get("templates", [])]
    mounted = {
        mount["name"]
        for replicated in spec["replicatedJobs"]
        for container in replicated["template"]["spec"]["template"]["spec"]["containers"]
        for mount in container.get("volumeMounts", [])
    }
    if len(spec.get("volumeClaimPolicies", [])) > 50:
        yield problem("spec.volumeClaimPolicies", "more than 50", 15, limit=50)
    for template in templates:
        claim = template["metadata"]["name"]
        if len(f"{claim}-{metadata['name']}") > 63 or claim not in mounted:
            message = f"claim {claim!r} is too long with the JobSet's name, or mounted nowhere"
            yield problem("spec.volumeClaimPolicies", message, 15, value=claim)


def _queue(metadata: Manifest, spec: Manifest) -> Iterator[Problem]:
    del spec
    queue = metadata.get("labels", {}).get(QUEUE_LABEL)
    if queue is not None and not (DNS_SUBDOMAIN.fullmatch(queue) and len(queue) <= 63):
        yield problem("metadata.labels", f"{queue!r} is not the name of a LocalQueue", 20, value=queue)
