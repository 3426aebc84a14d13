"""XLA options of the train step: the defaults of the TPU generation (`compiler_options.yaml`), then the config's own."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from trainer.config.compiler import Compiler
from trainer.config.problem import ConfigError, Problem

if TYPE_CHECKING:
    from jaxlib._jax import Device

Options = dict[str, Any]


def compiler_options(config: Compiler, mesh: Mesh) -> Options | None:
    """Options by name for the devices of `mesh`; None where there are none.

    Defaults are those of the device kind, on meshes like those they were tried on: the compiler refuses some options for
    some programs.
    """
    found: Options = {}
    entry = _defaults().get(mesh.devices.flat[0].device_kind)
    if config.default_options and entry and _tried(mesh, {*entry["axes"]}):
        found = {name: option["value"] for name, option in entry["options"].items()}
    found |= config.options
    return {name: value for name, value in found.items() if value is not None} or None


def check_options(config: Compiler, device: Device) -> None:
    """Raises ConfigError for an option the compiler of `device`, described or attached here, does not know, or a value it does not take."""
    if not config.options:
        return
    placed = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x + 1).lower(placed)
    problems: list[Problem] = []
    for name, value in config.options.items():
        try:
            lowered.compile(compiler_options={} if value is None else {name: value})
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            message = f"{device.device_kind}: {next(iter(str(error).splitlines()), '')[:200]}"
            hint = "options differ between platforms and releases; remove it"
            problems.append(Problem(path=f"compiler.options.{name}", message=message, hint=hint, code="compiler-option", value=value))
    if problems:
        raise ConfigError(problems)


def _tried(mesh: Mesh, axes: set[str]) -> bool:
    """Whether each slice has some of `axes` and no other, `fsdp` among them, and no axis of a slice goes on in the next."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0, otypes=[int])(mesh.devices)
    within: set[str] = set()
    for dim, axis in enumerate(mesh.axis_names):
        stays = np.diff(slices, axis=dim) == 0
        if stays.any():
            within.add(axis)
            if not stays.all():
                return False
    return "fsdp" in within and within <= axes


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((resources.files(__package__) / "compiler_options.yaml").read_text(encoding="utf-8"))
