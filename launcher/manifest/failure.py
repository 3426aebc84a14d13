"""Which failure ends the job, which restarts it, and which restarts it for free.

A container's exit code reaches JobSet through the Job's podFailurePolicy: a rule that matches writes its code into the
Job's failure message, where JobSet's rules look for it. Rule order: fatal first, because the first JobSet rule that
matches any failed Job wins, and the process with the cause leaves before its peers do.

Where every slice is a JAX world of its own, its Job replaces its pods itself, and the JobSet restarts nothing: the others go on.
"""

from __future__ import annotations

from typing import Any, Final

from launcher.spec import JobSpec
from trainer import contract
from trainer.config.diloco import worlds_apart

Manifest = dict[str, Any]

REASON: Final = "PodFailurePolicy"


def failure_policy(spec: JobSpec) -> Manifest:
    """Of the JobSet. A failed Job that matches no rule restarts everything, up to `maxRestarts` times."""
    restarts = 0 if worlds_apart(spec.train) else spec.failure.max_restarts
    policy: Manifest = {"maxRestarts": restarts, "restartStrategy": "BlockingRecreate"}
    if worlds_apart(spec.train):
        return policy
    match spec.failure.mode:
        case "smart":
            free = [_message(contract.FREE_EXIT_CODES), " has condition DisruptionTarget matching FailJob rule "]
            rules = [
                _rule("fatal", "FailJobSet", [_message(contract.FATAL_EXIT_CODES)]),
                _rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", free),
            ]
            return {**policy, "rules": rules}
        case "strict":
            return {**policy, "rules": [_rule("fatal", "FailJobSet", [])]}
        case "simple":
            return policy


def pod_failure_policy(spec: JobSpec) -> Manifest | None:
    """Of each Job; None where every failure is the same."""
    end = "Ignore" if worlds_apart(spec.train) else "FailJob"  # replaced without counting, or for the JobSet to restart
    fatal = _exit_codes(contract.FATAL_EXIT_CODES)
    disruption = {"action": end, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    match spec.failure.mode:
        case "smart":
            # No rule for the other codes: the Job quotes the first failed pod that any rule matches, so that a peer that
            # aborts (134) would hide the code of the pod with the cause.
            return {"rules": [fatal, _exit_codes(contract.FREE_EXIT_CODES, end), disruption]}
        case "strict":
            return {"rules": [fatal]}
        case "simple":
            return None


def backoff_limit(spec: JobSpec) -> int:
    """Pods of a slice that may fail before its Job does: none, or as many as fail in `max_restarts` restarts of the slice."""
    return spec.failure.max_restarts * spec.layout.hosts_per_slice if worlds_apart(spec.train) else 0


def _rule(name: str, action: str, patterns: list[str]) -> Manifest:
    matched = {"onJobFailureMessagePatterns": patterns} if patterns else {}
    return {"name": name, "action": action, "onJobFailureReasons": [REASON], **matched}


def _message(codes: tuple[int, ...]) -> str:
    alternatives = "|".join(map(str, codes))
    return f" failed with exit code {f'({alternatives})' if len(codes) > 1 else alternatives} matching FailJob rule "


def _exit_codes(codes: tuple[int, ...], action: str = "FailJob") -> Manifest:
    return {
        "action": action,
        "onExitCodes": {"containerName": contract.CONTAINER_NAME, "operator": "In", "values": sorted(codes)},
    }
