"""What a JobSet needs beside it: the TrainConfig, an identity, a fence."""

from __future__ import annotations

import json
from typing import Any, Final

from launcher.manifest import names
from launcher.spec import JobSpec
from trainer import contract

Manifest = dict[str, Any]


METADATA: Final = {"169.254.169.252": (987, 988), "169.254.169.254": (80, 8080)}
"""GKE's metadata server as a pod meets it: behind Dataplane V2 and on other data planes, both before and after translation."""


def _port(number: int, protocol: str = "TCP") -> Manifest:
    return {"protocol": protocol, "port": number}


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
    """The job's own pods reach each other on any port (collectives use ports of the system's choice), and nobody else reaches them.

    Beyond the job they reach names (DNS), GKE's metadata servers, which give out the bucket's credentials, and TCP 443.
    Does not bind host-network pods.
    """
    own = {"podSelector": {"matchLabels": {names.JOBSET_NAME_LABEL: spec.name}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(spec, spec.name),
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}],
            "egress": [
                {"to": [own]},
                {"ports": [_port(53, "UDP"), _port(53)]},
                *(
                    {"to": [{"ipBlock": {"cidr": f"{address}/32"}}], "ports": list(map(_port, ports))}
                    for address, ports in METADATA.items()
                ),
                {"ports": [_port(443)]},
            ],
        },
    }
