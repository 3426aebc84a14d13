"""Manifests: a spec in, plain nested dicts out. Pure; `to_yaml` is the one dump at the end."""

from __future__ import annotations

from typing import Any

from launcher.manifest.jobset import jobset
from launcher.manifest.objects import config_map, network_policy, service_account
from launcher.manifest.yaml import dump_all as to_yaml
from launcher.spec import JobSpec

__all__ = ["render", "to_yaml"]


def render(spec: JobSpec) -> list[dict[str, Any]]:
    """Every object of the job, in the order to create them. The namespace is left to the backend."""
    account = [] if spec.service_account else [service_account(spec)]
    fence = [network_policy(spec)] if spec.network.isolate and not spec.network.host_network else []
    return [*account, config_map(spec), *fence, jobset(spec)]
