"""From the tag in a spec to the digest in its manifests, as the spec's policy has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.errors import Unavailable
from launcher.image import Reference
from launcher.manifest.container import pull_policy
from launcher.registry import resolved
from launcher.spec import JobSpec

Manifest = dict[str, Any]


def pinned(spec: JobSpec, manifests: Sequence[Manifest]) -> list[Manifest]:
    """`manifests` with the image as `NAME:TAG@DIGEST`, so that every restart runs the same code and both are on record.

    As they are where the image has a digest already, is not one of a registry, or the policy is `as_given`. Raises
    Unavailable when the registry does not tell the digest; the caller goes on without where the policy allows it.
    """
    image = spec.container_image
    reference = Reference.parse(image.reference)
    if reference.digest or image.digest_policy == "as_given" or "/" not in reference.repository:
        return list(manifests)
    exact = image.model_copy(update={"reference": str(resolved(reference))})
    return [
        _with_image(manifest, exact.reference, pull_policy(exact)) if manifest["kind"] == "JobSet" else manifest for manifest in manifests
    ]


def pinned_if_told(spec: JobSpec, manifests: Sequence[Manifest]) -> tuple[list[Manifest], str]:
    """`pinned`, or the manifests as they are and why, where the policy is content with that. Raises Unavailable otherwise."""
    try:
        return pinned(spec, manifests), ""
    except Unavailable as error:
        if spec.container_image.digest_policy == "require_digest":
            hint = f"{error.hint}; or write the digest into the spec, or take `digest_policy: when_possible`"
            raise Unavailable(f"{error}, and the spec requires its digest", hint=hint) from None
        return list(manifests), str(error)


def _with_image(jobset: Manifest, reference: str, policy: str) -> Manifest:
    def job(part: Manifest) -> Manifest:
        template = part["template"]["spec"]["template"]
        containers = [{**one, "image": reference, "imagePullPolicy": policy} for one in template["spec"]["containers"]]
        filled = {**template, "spec": {**template["spec"], "containers": containers}}
        return {**part, "template": {**part["template"], "spec": {**part["template"]["spec"], "template": filled}}}

    return {**jobset, "spec": {**jobset["spec"], "replicatedJobs": [job(part) for part in jobset["spec"]["replicatedJobs"]]}}
