"""A compiled train step as a file, and the fingerprint that says whether it is this job's.

The file is one line of JSON (format, fingerprint) and JAX's serialised executable. Reading one runs code in it: it is as
trusted as the program itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

import jax
from flax import nnx
from jax.experimental import serialize_executable

from trainer.aot.lower import Compiled, abstract_batch, lower_step
from trainer.aot.report import program_hash
from trainer.checkpoint.storage import open_storage
from trainer.config.train import TrainConfig
from trainer.errors import CheckpointError
from trainer.observe.header import FLAGS, versions
from trainer.parallel.compiler import compiler_options
from trainer.parallel.sharding import Layout
from trainer.state import StateSpec
from trainer.step import Batch, Metrics, TrainStep

FORMAT: Final = 1
Fingerprint = dict[str, Any]


class CompiledStep:
    """A loaded executable with the signature of the jitted step."""

    def __init__(self, loaded: jax.stages.Compiled) -> None:
        self._loaded = loaded

    def __call__(self, state: nnx.State, batch: Batch) -> tuple[nnx.State, Metrics]:
        return self._loaded(state, batch)


def save_executable(path: str, config: TrainConfig, compiled: Compiled) -> dict[str, Any]:
    """Write the executable to `path`, local or gs://. Returns its size and fingerprint."""
    payload, _, out_tree = serialize_executable.serialize(compiled.step)
    metrics = sorted(jax.tree.unflatten(out_tree, range(out_tree.num_leaves))[1])
    fingerprint = fingerprint_of(config, compiled.layout, compiled.lowered)
    head = {"format": FORMAT, "fingerprint": fingerprint, "metrics": metrics, "config": config.model_dump(mode="json")}
    data = json.dumps(head, sort_keys=True).encode() + b"\n" + payload
    folder, name = os.path.split(path)
    open_storage(folder or ".").write(name, data)
    return {"path": path, "bytes": len(data), "program": fingerprint["program"]}


def fingerprint_of(config: TrainConfig, layout: Layout, lowered: jax.stages.Lowered) -> Fingerprint:
    """Everything the executable depends on: the program, the compiler and its options, the devices and their order."""
    found = versions()
    devices = list(layout.mesh.devices.flat)
    tpu = devices[0].platform == "tpu"
    packages = ("jax", "jaxlib", "libtpu") if tpu else ("jax", "jaxlib")
    return {
        "program": program_hash(lowered),
        "versions": {name: found[name] for name in packages if name in found},
        "options": compiler_options(config.compiler, layout.mesh) or {},
        "flags": {name: os.environ[name] for name in FLAGS if tpu and os.environ.get(name)},
        "device_kind": devices[0].device_kind,
        "devices": [[device.id, getattr(device, "slice_index", 0) or 0, *getattr(device, "coords", ())] for device in devices],
    }


def load_executable(path: str, config: TrainConfig, spec: StateSpec, layout: Layout) -> TrainStep | str:
    """The step of the file, or the reason why it is not this job's. Raises CheckpointError where there is no such file."""
    folder, name = os.path.split(path)
    try:
        head_line, _, payload = open_storage(folder or ".").read(name).partition(b"\n")
        head = json.loads(head_line)
        saved, metrics = head["fingerprint"], head["metrics"]
        if head["format"] != FORMAT:
            return f"it is of format {head['format']}, this release reads {FORMAT}"
    except OSError as error:
        hint = "`nnxlaunch compile --save` writes it; or remove compiler.executable"
        raise CheckpointError(f"{path} cannot be read: {error}", hint=hint) from None
    except (ValueError, KeyError, TypeError):
        return "it was not written by `nnxlaunch compile --save`"
    _, lowered = lower_step(config, layout)
    if reason := difference(saved, fingerprint_of(config, layout, lowered), head["config"], config.model_dump(mode="json")):
        return reason
    in_tree = jax.tree.structure(((spec.abstract, abstract_batch(config, layout)), {}))
    out_tree = jax.tree.structure((spec.abstract, dict.fromkeys(metrics, 0)))
    devices = list(layout.mesh.devices.flat)
    loaded = serialize_executable.deserialize_and_load(payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices)
    return CompiledStep(loaded)


def difference(saved: Fingerprint, present: Fingerprint, saved_config: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """What differs, in words; None where nothing does."""
    reasons: list[str] = []
    for part in ("versions", "options", "flags"):
        for key in sorted({*saved[part], *present[part]}):
            before, now = saved[part].get(key), present[part].get(key)
            if before != now:
                reasons.append(f"{key} was {before!r}, now {now!r}")
    if saved["device_kind"] != present["device_kind"]:
        reasons.append(f"devices were {saved['device_kind']}, now {present['device_kind']}")
    elif len(saved["devices"]) != len(present["devices"]):
        reasons.append(f"it was compiled for {len(saved['devices'])} devices, there are {len(present['devices'])}")
    elif saved["devices"] != present["devices"]:
        reasons.append("devices are numbered in another order")
    if saved["program"] != present["program"]:
        changed = ", ".join(_changed(saved_config, config, ""))
        reasons.append(f"the program is another one ({changed or 'the code changed'})")
    return "; ".join(reasons) or None


def _changed(saved: Any, present: Any, path: str) -> list[str]:
    """Dotted paths at which two configs differ."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        keys = dict.fromkeys([*saved, *present])
        return [found for key in keys for found in _changed(saved.get(key), present.get(key), f"{path}.{key}" if path else key)]
    return [] if saved == present else [path]
