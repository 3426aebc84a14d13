"""JobSpec: what a person writes."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from launcher.spec.accelerator import Cpu, Layout, Tpu
from launcher.spec.capacity import CapacityField, Exclusive, NoPlacement, OnDemand, Placement, PlacementField, QueueField, Spot, shorthand
from launcher.spec.pod import DEFAULT_IMAGES, EnvValue, Image, Int32, Network, Resources, Text, Volume
from trainer.config import ConfigError, Problem, TrainConfig
from trainer.config.base import Node
from trainer.config.diloco import one_world, worlds_apart

MAX_GRACE_SECONDS: Final = 3600

Security = Literal["restricted", "root_no_caps", "privileged"]


class Failure(Node):
    """What happens when a process ends badly; `nnxlaunch explain` prints what each exit code does."""

    max_restarts: Int32 = 10
    """Restarts that count: crashes, lost peers, out of memory."""
    mode: Literal["smart", "strict", "simple"] = "smart"
    """`smart`: preemption is free, an error in the program or config ends the job, the rest is restarted up to
    `max_restarts` (JobSet 0.10 and later). `strict`: the same, but preemption counts (JobSet 0.7 and later).
    `simple`: every failure is restarted, up to `max_restarts`."""


def _with_text_keys(value: Any) -> Any:
    return {str(key): item for key, item in cast("dict[Any, Any]", value).items()} if isinstance(value, dict) else value


class JobSpec(Node):
    """One training job. `train.run_directory` is `directory`/`name`; `train.data.cache_directory` defaults to `directory`/data."""

    name: Text
    """Name of the job and of its run directory."""
    tpu: Tpu | None = None
    cpu: Cpu | None = None
    image: Annotated[Image, shorthand("reference")] | None = None
    """Default: the image of this release for the accelerator, as `nnxlaunch image build` names it."""
    directory: Text
    """Folder (local or gs://) under which runs and the data cache are kept."""
    train: TrainConfig
    """The TrainConfig itself, or the path of a file with it, relative to the spec."""
    env: Annotated[dict[Text, EnvValue], BeforeValidator(_with_text_keys)] = Field(default_factory=dict)
    """Environment variables: text, or `{secretKeyRef: {name, key}}`. Never a secret itself."""
    queue: QueueField | None = None
    priority: str | None = None
    """A PriorityClass for the pods."""
    capacity: CapacityField = OnDemand()
    failure: Failure = Failure()
    security: Security = "restricted"
    """`restricted`: no root, no capabilities, read-only root file system. `root_no_caps`: the same as root, where a node
    gives TPU devices to root only. `privileged`: everything; for debugging tools and host networking."""
    volumes: tuple[Volume, ...] = ()
    resources: Resources = Resources()
    network: Network = Network()
    grace_seconds: Annotated[int, Field(ge=1, le=MAX_GRACE_SECONDS, strict=True)] | None = None
    """Time between SIGTERM and SIGKILL. Default: 25 on spot capacity, else 120."""
    placement: PlacementField | None = None
    """Default: exclusive node pools for multi-host TPU slices, none otherwise."""
    ttl_seconds: Int32 | None = 43_200
    """A finished job is deleted after this long; null keeps it."""
    labels: Annotated[dict[str, str], BeforeValidator(_with_text_keys)] = Field(default_factory=dict)
    annotations: Annotated[dict[str, str], BeforeValidator(_with_text_keys)] = Field(default_factory=dict)
    service_account: str | None = None
    """An existing service account, for example one with access to the bucket. Default: one without any rights is created."""
    scheduler: str | None = None
    jobset_version: Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")] = "0.10"
    """Oldest JobSet release the job must run on; fields it does not know are an error."""

    @model_validator(mode="before")
    @classmethod
    def _directories(cls, data: Any) -> Any:
        """Fill in what the spec already says about the trainer's directories."""
        if not isinstance(data, dict):
            return data
        spec = cast("dict[str, Any]", data)
        train = spec.get("train")
        if not isinstance(train, dict):
            return spec
        # One that is missing or is no text is a problem of its own, and not of the directories that follow from it.
        directory, name = (given if isinstance(given := spec.get(key), str) else key for key in ("directory", "name"))
        filled = {"run_directory": run_directory(directory, name), **cast("dict[str, Any]", train)}
        if isinstance(filled.get("data"), dict):
            filled["data"] = {"cache_directory": f"{directory.rstrip('/')}/data", **cast("dict[str, Any]", filled["data"])}
        return {**spec, "train": filled}

    @field_validator("directory")
    @classmethod
    def _no_tilde(cls, directory: str) -> str:
        if directory.startswith("~"):
            hint = "write the path of the home folder out: a spec means the same for everyone"
            message = f"'~' stands for a home folder in a shell only, got {directory[:80]!r}"
            raise ConfigError([Problem(path="(root)", message=message, hint=hint, code="directory", value=directory)])
        return directory

    @field_validator("cpu")
    @classmethod
    def _not_beside_tpu(cls, cpu: Cpu | None, info: ValidationInfo) -> Cpu | None:
        if cpu is not None and info.data.get("tpu") is not None:
            hint = "remove one of them; on the command line, `--set cpu=null`"
            raise ConfigError([Problem(path="(root)", message="a job has `tpu` or `cpu`, not both", hint=hint, code="accelerator")])
        return cpu

    @model_validator(mode="after")
    def _an_accelerator(self) -> Self:
        if self.tpu is None and self.cpu is None:
            hint = "such as `tpu: {type: v5e-16}`"
            raise ConfigError([Problem(path="tpu", message="is required, or `cpu`", hint=hint, code="accelerator")])
        return self

    @cached_property
    def layout(self) -> Layout:
        """Slices, hosts and devices. Raises launcher.tpu.TpuError when there is no such TPU."""
        if self.tpu is not None:
            tpu = self.tpu.slice()
            slices, hosts, devices = self.tpu.slices, tpu.hosts, tpu.devices_per_host
            return Layout(target="tpu", slices=slices, hosts_per_slice=hosts, devices_per_host=devices, tpu=tpu)
        cpu = self.cpu or Cpu()
        return Layout(target="cpu", slices=cpu.slices, hosts_per_slice=cpu.hosts, devices_per_host=cpu.devices_per_host, tpu=None)

    @cached_property
    def world(self) -> TrainConfig:
        """What one JAX world of the job trains: all of it, unless every slice is a world of its own."""
        return one_world(self.train, self.layout.slices) if worlds_apart(self.train) else self.train

    @property
    def world_slices(self) -> int:
        """Slices of one JAX world."""
        return 1 if worlds_apart(self.train) else self.layout.slices

    @property
    def grace(self) -> int:
        """Seconds between SIGTERM and SIGKILL."""
        return self.grace_seconds or (25 if isinstance(self.capacity, Spot) else 120)

    @property
    def placed(self) -> Placement:
        """The placement, with its default."""
        if self.placement is not None:
            return self.placement
        return Exclusive() if self.layout.target == "tpu" and self.layout.hosts_per_slice > 1 else NoPlacement()

    @property
    def subdomain(self) -> str:
        """Name of the headless service; unlike for two jobs of a namespace, and short, because host names contain it."""
        return self.network.subdomain or f"n{hashlib.sha256(self.name.encode()).hexdigest()[:5]}"

    @property
    def container_image(self) -> Image:
        """The image, with its default for the accelerator."""
        return self.image or Image(reference=DEFAULT_IMAGES[self.layout.target])

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change when anything in the spec does."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_directory(directory: str, name: str) -> str:
    """Where a job of this name keeps its checkpoints, metrics and logs."""
    return f"{directory.rstrip('/')}/{name}"
