"""XLA options of the train step: the defaults of the TPU generation (`compiler_options.yaml`), then the config's own."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import jax
import yaml
from jax.sharding import Mesh

from trainer.config.compiler import Compiler
from trainer.config.mesh import used
from trainer.config.problem import ConfigError, Problem

if TYPE_CHECKING:
    from jaxlib._jax import Device

Options = dict[str, Any]

# Generations whose options were also tried on steps of several slices.
_TRIED_ON_SLICES: Final = ("TPU v5 lite", "TPU v6 lite")


def compiler_options(config: Compiler, mesh: Mesh) -> Options | None:
    """Options by name for the devices of `mesh`; None where there are none.

    Defaults are those of the device kind, where `fsdp` alone splits anything, or on some kinds where slices hold copies of weights that
    `fsdp` splits: the compiler refuses some options for some programs, and they were tried on such steps.
    """
    found: Options = {}
    kind = mesh.devices.flat[0].device_kind
    axes = _axes_within_a_slice(mesh) if kind in _TRIED_ON_SLICES else used(dict(mesh.shape)).keys()
    if config.default_options and axes == {"fsdp"}:
        found = {name: entry["value"] for name, entry in _defaults().get(kind, {}).items()}
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


def _axes_within_a_slice(mesh: Mesh) -> set[str]:
    """Mesh axes of more than one device, without `data` where it counts the slices."""
    shape = used(dict(mesh.shape))
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    return {axis for axis, size in shape.items() if not (axis == "data" and slices > 1 and size == slices)}


@cache
def _defaults() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.safe_load((resources.files(__package__) / "compiler_options.yaml").read_text(encoding="utf-8"))
