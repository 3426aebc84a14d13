"""The hardware a step is compiled for, as the launcher tells it to `python -m trainer.aot`. No JAX here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from trainer.config.base import Node, PositiveFloat, PositiveInt


class Target(Node):
    """Slices of one TPU topology, or forced CPU devices."""

    platform: Literal["tpu", "cpu"]
    name: str
    """What a person calls it, such as `v5p-128`."""
    topology: str | None = None
    """libtpu's name of one slice, such as `v5p:4x4x4`; TPU only."""
    torus: tuple[PositiveInt, ...] = ()
    """Chips of a slice along each dim of its torus."""
    wraps: tuple[bool, ...] = ()
    """Whether the last chip of each dim is linked to the first."""
    slices: PositiveInt = 1
    devices_per_slice: PositiveInt
    hbm_bytes: PositiveInt | None = None
    """High-bandwidth memory of one device; without it nothing is said about fit."""
    peak_flops: PositiveFloat | None = None
    """Dense bfloat16 operations a second of one device."""
    hbm_bytes_per_second: PositiveFloat | None = None
    ici_link_bytes_per_second: PositiveFloat | None = None
    """One link, one direction, one device's share."""
    dcn_bytes_per_second: PositiveFloat | None = None
    """One device's share of its host's network, one direction."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.platform == "tpu" and self.topology is None:
            raise ValueError("a TPU target needs `topology`")
        if len(self.torus) != len(self.wraps):
            raise ValueError(f"torus has {len(self.torus)} dims, wraps {len(self.wraps)}")
        return self

    @property
    def devices(self) -> int:
        return self.slices * self.devices_per_slice
