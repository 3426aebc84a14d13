"""What a JobSet needs beside it: the TrainConfig, an identity, a fence."""

from __future__ import annotations

import json
from typing import Any

from launcher.manifest import names
from launcher.spec import JobSpec
from trainer import contract

Manifest = dict[str, Any]


def _metadata(spec: JobSpec, name: str) -> Manifest:
    return {"name": name, "labels": names.labels(spec)}


def config_map(spec: JobSpec) -> Manifest:
    """The TrainConfig in full, presets expanded and defaults written out, so that a later image cannot change them."""
    document = json.dumps(spec.train.model_dump(mode="json"), indent=2) + "\n"
    metadata = _metadata(spec, names.config_map(spec))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {contract.CONFIG_FILE: document}}


def service_account(spec: JobSpec) -> Manifest:
    """An identity without rights and without a mounted token."""
    metadata = _metadata(spec, names.service_account(spec))
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata, "automountServiceAccountToken": False}


def network_policy(spec: JobSpec) -> Manifest:
    """Admit only the job's own pods, on any port (collectives use ports of the system's choice). Does not bind host-network pods."""
    own = {"podSelector": {"matchLabels": {names.JOBSET_NAME_LABEL: spec.name}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(spec, spec.name),
        "spec": {**own, "policyTypes": ["Ingress"], "ingress": [{"from": [own]}]},
    }
