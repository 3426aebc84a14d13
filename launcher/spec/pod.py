"""What a pod gets: image, environment, volumes, resources, network."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from trainer import contract
from trainer.config.base import Node

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Int32 = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
"""What the API server stores for most counts."""


DEFAULT_IMAGES: Final = {"cpu": "nnxlaunch-trainer:cpu", "tpu": "nnxlaunch-trainer:tpu"}
"""What `nnxlaunch image build` names the image of each target."""


class Image(Node):
    """A container image that runs `python -m trainer`. `image: NAME` is enough."""

    reference: Text
    """Such as `registry/project/trainer@sha256:...`; a digest makes every restart run the same code."""
    pull_policy: Literal["always", "if_not_present", "never"] | None = None
    """Default: `always` for a tag of a registry, `if_not_present` for a digest or a name without a registry."""
    pull_secrets: tuple[Text, ...] = ()
    """Secrets with registry credentials, by name."""
    digest_policy: Literal["when_possible", "require_digest", "as_given"] = "when_possible"
    """What `submit` does with a tag of a registry. `when_possible`: the job runs `NAME:TAG@DIGEST`, with the digest the tag has
    now, where the registry tells it to this machine. `require_digest`: without one the job is not submitted. `as_given`: the
    registry is not asked."""


class SecretKey(Node):
    name: Text
    """Name of a Kubernetes Secret in the job's namespace."""
    key: Text


class FromSecret(Node):
    """The value comes from a Secret; the spec never holds it."""

    secretKeyRef: SecretKey  # noqa: N815  (Kubernetes' own word)


def _kind_of_value(value: Any) -> str:
    return "secret" if isinstance(value, dict | FromSecret) else "text"


EnvValue = Annotated[Annotated[str, Tag("text")] | Annotated[FromSecret, Tag("secret")], Discriminator(_kind_of_value)]


Gib = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]


class _Volume(Node):
    mount_path: Text
    """Absolute path in the container."""
    read_only: bool = False


class GcsFuse(_Volume):
    """A bucket mounted as files. Checkpoints need no mount: gs:// paths are used directly."""

    type: Literal["gcs"] = "gcs"
    bucket: Text
    only_directory: str | None = None
    """Mount only this directory of the bucket."""
    mount_options: tuple[Text, ...] = ()


class Claim(_Volume):
    """A PersistentVolumeClaim that exists."""

    type: Literal["pvc"] = "pvc"
    claim: Text


class Memory(_Volume):
    """Files in the host's memory; lost with the pod."""

    type: Literal["memory"] = "memory"
    size_gib: Gib


class EmptyDirectory(_Volume):
    """Files on the host's disk; lost with the pod."""

    type: Literal["empty_directory"] = "empty_directory"
    size_gib: Gib | None = None


Volume = Annotated[GcsFuse | Claim | Memory | EmptyDirectory, Field(discriminator="type")]


def _quantity(value: Any) -> Any:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", text, re.ASCII):
        raise ValueError("must be an amount such as 4, 500m, 1.5 or 64Gi: digits, then one of m, k, M, G, T, Ki, Mi, Gi, Ti or nothing")
    return text


Quantity = Annotated[str, BeforeValidator(_quantity)]


class Resources(Node):
    """CPU and memory of the trainer container. Under Kueue the queue must cover the CPUs and the memory named here."""

    cpu: Quantity | None = None
    """Requested CPUs; not a limit."""
    memory: Quantity | None = None
    """Requested memory, and the limit above which the kernel kills the pod."""
    shared_memory_gib: Gib = 8
    """Size of /dev/shm. What is in it counts as memory of the container."""


class Network(Node):
    host_network: bool = False
    """Use the node's own network, for speed between slices. Then: `security: privileged` and a namespace that allows it are
    needed, ports are the node's, no network policy binds the pods, and GKE's Workload Identity gives them the node's
    account instead of `service_account`."""
    subdomain: Text | None = None
    """Name of the headless service below which the pods find each other; one job each. Default: short, from the job's name."""
    coordinator_port: Annotated[int, Field(ge=1024, le=65535, strict=True)] = contract.COORDINATOR_PORT
    """Port of JAX's coordination service on the first pod."""
    isolate: bool = True
    """Admit connections only from pods of the same job, and let them out only to each other, DNS, GKE's metadata server and
    TCP 443 (a NetworkPolicy; the cluster's network plugin has to enforce it)."""
