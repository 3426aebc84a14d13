"""Does the JobSet that is installed know what is rendered? Read from the schema the server publishes, before anything is sent.

A pure walk of a manifest along an OpenAPI schema; what it finds is said with the field, the release that brought it and
the release there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from launcher.backend.kubernetes_errors import JOBSET_INSTALL
from launcher.backend.status import Manifest
from launcher.backend.values import items, mapping
from launcher.errors import Unavailable

_JOB_SPEC: Final = "spec.replicatedJobs.template.spec"

FIRST_RELEASE: Final[dict[str, str]] = {
    "spec.managedBy": "0.5",
    "spec.ttlSecondsAfterFinished": "0.5",
    "spec.coordinator": "0.6",
    "spec.network.publishNotReadyAddresses": "0.6",
    "spec.failurePolicy.rules": "0.6",
    "spec.failurePolicy.restartStrategy": "0.7",
    "spec.replicatedJobs.dependsOn": "0.8",
    "spec.replicatedJobs.groupName": "0.9",
    "spec.failurePolicy.rules.onJobFailureMessagePatterns": "0.10",
    "spec.volumeClaimPolicies": "0.11",
    "status.replicatedJobsStatus.jobRestarts": "0.12",
}
"""The JobSet release whose schema had the field first (read in its releases' CRDs); the newest one present tells the release."""

WAY_OUT: Final[dict[str, str]] = {
    "spec.failurePolicy.rules.onJobFailureMessagePatterns": "take `failure: {mode: strict}`, in which preemption counts as a restart",
    "spec.failurePolicy.rules": "take `failure: {mode: simple}`, in which every failure is restarted",
    "spec.ttlSecondsAfterFinished": "take `ttl_seconds: null`",
}
"""What a spec can say instead, where it can."""


@dataclass(frozen=True, kw_only=True)
class Unknown:
    path: str  # with indexes: `spec.failurePolicy.rules.0.onJobFailureMessagePatterns`
    value: str | None  # the value that is none of the schema's, where the field itself is known

    @property
    def field(self) -> str:
        """The path without indexes."""
        return re.sub(r"\.\d+(?=\.|$)", "", self.path)


class OldJobSet(Unavailable):
    """The JobSet of the cluster does not know a field that is rendered."""


def jobset_schema(published: Manifest) -> Manifest | None:
    """The JobSet's schema in the OpenAPI document of its API group."""
    for schema in mapping(mapping(published.get("components")).get("schemas")).values():
        if any(kind.get("kind") == "JobSet" for kind in items(schema.get("x-kubernetes-group-version-kind"))):
            return schema
    return None


def installed_release(schema: Manifest) -> str:
    """The newest release the schema has a field of: `0.12` stands for 0.12 and newer, `0.4` for anything older than 0.5."""
    found = [_number(release) for field, release in FIRST_RELEASE.items() if _has(schema, field)]
    major, minor = max(found, default=(0, 4))
    return f"{major}.{minor}"


def unknown_fields(schema: Manifest, manifest: Manifest) -> list[Unknown]:
    """Fields of the manifest's `spec` that the schema lacks, and values that its lists of values lack."""
    return list(_walk(mapping(schema["properties"]).get("spec", {}), manifest["spec"], "spec"))


def require_known(schema: Manifest, manifest: Manifest, *, where: str) -> None:
    """Raises OldJobSet naming every unknown field, the release it needs and the one there is."""
    unknown = unknown_fields(schema, manifest)
    if not unknown:
        return
    found = installed_release(schema)
    said = [_sentence(one) for one in unknown]
    ways = [WAY_OUT[one.field] for one in unknown if one.field in WAY_OUT]
    update = f"an administrator updates JobSet with: {JOBSET_INSTALL}"
    name = manifest["metadata"]["name"]
    raise OldJobSet(
        f"cannot submit {name!r}: {'; '.join(dict.fromkeys(said))}; {where} serves JobSet {found}",
        hint="; or ".join([*dict.fromkeys(ways), update]),
    )


def _sentence(one: Unknown) -> str:
    release = FIRST_RELEASE.get(one.field)
    what = one.path if one.value is None else f"{one.path}: {one.value}"
    if release:
        return f"{what} needs JobSet {release}"
    if one.field.startswith(f"{_JOB_SPEC}."):
        return f"{what} needs a JobSet built for a newer Kubernetes"
    return f"{what} needs another JobSet"


def _walk(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[Unknown]:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        fields, rest = mapping(schema.get("properties")), schema.get("additionalProperties")
        for key, item in entries.items():
            if key in fields:
                yield from _walk(fields[key], item, f"{path}.{key}")
            elif isinstance(rest, dict):
                yield from _walk(cast("dict[str, Any]", rest), item, f"{path}.{key}")
            elif rest is not True:
                yield Unknown(path=f"{path}.{key}", value=None)
    elif isinstance(value, list):
        elements = cast("list[Any]", value)
        for index, item in enumerate(elements):
            yield from _walk(mapping(schema.get("items")), item, f"{path}.{index}")
    elif "enum" in schema and value not in schema["enum"]:
        yield Unknown(path=path, value=str(value))


def _has(schema: Mapping[str, Any], field: str) -> bool:
    for key in field.split("."):
        schema = mapping(schema.get("items")) or schema
        fields = mapping(schema.get("properties"))
        if key not in fields:
            return False
        schema = fields[key]
    return True


def _number(release: str) -> tuple[int, int]:
    major, minor = release.split(".")
    return int(major), int(minor)
