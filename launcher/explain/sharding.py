"""Where every tensor of a run lies and why: the rule that won each dim, the rules that were skipped, bytes, copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from launcher.spec import JobSpec
from trainer.config import TrainConfig
from trainer.config.activations import Activation, activations, batch_tensors
from trainer.config.layouts import stored_layout, unsharded, weight_layouts
from trainer.config.mesh import used
from trainer.config.rules import RULES, Resolution, Rule, in_use, resolve
from trainer.config.treatment import treatments
from trainer.config.weights import split_repeat

DTYPE_BYTES: Final = {"float32": 4, "int32": 4, "bfloat16": 2}


def sharding_report(spec: JobSpec) -> dict[str, Any]:
    """Of a checked spec, as plain data: `mesh`, `rules` (those that name an axis of a tensor, numbered), `tensors`, `totals`.

    An entry of `tensors` stands for `count` tensors of one shape and layout. `bytes_per_device` is of all of them,
    `replicated_bytes` what all devices together hold beyond one copy. In `dims`, `further` are mesh axes that no rule but
    `sharding.optimizer` gives.
    """
    config = spec.world
    mesh = config.mesh.shape(slices=spec.world_slices, devices_per_slice=spec.layout.devices_per_slice)
    tensors = {kind: _merged(entries) for kind, entries in _tensors(config, mesh).items()}
    numbers = {dim["rule"] for entries in tensors.values() for entry in entries for dim in entry["dims"]}
    numbers |= {skip["rule"] for entries in tensors.values() for entry in entries for skip in entry["skipped"]}
    return {
        "mesh": used(mesh),
        "devices": spec.layout.devices,
        "rules": [entry for entry in _rules(config, mesh) if entry["number"] in numbers],
        "tensors": tensors,
        "totals": _totals(config, mesh, tensors),
    }


def _tensors(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    declared = [weight for weight, _ in weight_layouts(config, mesh)]
    found: dict[str, list[dict[str, Any]]] = {"weights": [], "optimizer": [], "activations": [], "batch": []}
    for weight in declared:
        layout = stored_layout(config.sharding, weight.axes, weight.shape, weight.path, mesh)
        found["weights"].append(_entry(config, mesh, weight.path, weight.path, weight.shape, weight.axes, "float32", layout))
    for treatment in treatments(config.optimizer, declared):
        for moment in treatment.moments:
            path = treatment.weight.path
            layout = stored_layout(config.sharding, moment.axes, moment.shape, path, mesh)
            entry = _entry(config, mesh, path, f"{moment.slot}/{path}", moment.shape, moment.axes, moment.dtype, layout)
            found["optimizer"].append(entry)
    for kind, listed in (("activations", activations(config)), ("batch", batch_tensors(config))):
        found[kind] = [_activation(config, mesh, activation) for activation in listed]
    return found


def _activation(config: TrainConfig, mesh: Mapping[str, int], tensor: Activation) -> dict[str, Any]:
    layout = resolve(tensor.axes, tensor.shape, mesh, config.sharding.table())
    return _entry(config, mesh, None, tensor.name, tensor.shape, tensor.axes, tensor.dtype, layout)


def _entry(
    config: TrainConfig, mesh: Mapping[str, int], weight: str | None, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
    dtype: str, layout: Resolution,
) -> dict[str, Any]:  # fmt: skip
    numbers = _numbers(config, weight)
    ways = math.prod(mesh[axis] for split in layout.spec for axis in split)
    size, devices = math.prod(shape) * DTYPE_BYTES[dtype], math.prod(mesh.values())
    return {
        "tensor": name,
        "count": 1,
        "shape": list(shape),
        "dtype": dtype,
        "dims": [
            {
                "axis": axis,
                "size": length,
                "mesh": list(split),
                "rule": numbers[winner] if winner else None,
                "further": [name for name in split if winner is None or name not in winner[1]],
            }
            for axis, length, split, winner in zip(axes, shape, layout.spec, layout.winners, strict=True)
        ],
        "skipped": [{"rule": numbers[skip.rule], "reason": skip.reason} for skip in layout.skipped if skip.matters],
        "dropped": [reason for _, _, reason in layout.dropped],
        "copies": devices // ways,
        "bytes_per_device": size // ways,
        "replicated_bytes": size // ways * devices - size,
    }


def _merged(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for all repeats of an unrolled layer."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        head, separator, rest = entry["tensor"].partition("segments/")
        path, repeat = split_repeat(separator + rest)
        name = entry["tensor"] if repeat is None else head + path.replace("/", "/*/", 3).replace("/*/", "/", 2)
        if (first := found.get(name)) is None:
            found[name] = {**entry, "tensor": name}
        else:
            found[name] = first | {key: first[key] + entry[key] for key in ("count", "bytes_per_device", "replicated_bytes")}
    return list(found.values())


def _numbers(config: TrainConfig, weight: str | None) -> dict[Rule, int]:
    """The number of each rule that may apply to a tensor: the spec's in their order, then the table's."""
    own = [(number, rule.rule) for number, rule in enumerate(config.sharding.rules, 1)]
    attached = [entry for entry, rule in zip(own, config.sharding.rules, strict=True) if weight is not None and rule.matches(weight)]
    general = [entry for entry, rule in zip(own, config.sharding.rules, strict=True) if rule.weight is None]
    found: dict[Rule, int] = {}
    for number, rule in (*attached, *general, *enumerate(RULES, len(own) + 1)):
        found.setdefault(rule, number)
    return found


def _rules(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for number, rule in enumerate(config.sharding.rules, 1):
        source = "spec" if rule.weight is None else f"spec, for {rule.weight}"
        yield {"number": number, "axis": rule.axis, "mesh": list(in_use(rule.mesh, mesh)), "from": source}
    for number, (axis, axes) in enumerate(RULES, len(config.sharding.rules) + 1):
        yield {"number": number, "axis": axis, "mesh": list(in_use(axes, mesh)), "from": "table"}


def _totals(config: TrainConfig, mesh: Mapping[str, int], tensors: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    whole = unsharded(config, mesh)
    found: dict[str, Any] = {"parameters": whole.of}
    for kind in ("weights", "optimizer", "batch"):
        found[f"{kind}_bytes_per_device"] = sum(entry["bytes_per_device"] for entry in tensors[kind])
        found[f"{kind}_replicated_bytes"] = sum(entry["replicated_bytes"] for entry in tensors[kind])
    return found | {
        "unsharded_parameters": whole.elements,
        "unsharded_share": round(whole.share, 6),
        "unsharded_limit": config.sharding.unsharded_limit,
        "largest_unsharded": [{"tensor": path, "share": round(elements / whole.of, 6), "not_over": list(axes)}
                              for path, elements, axes in whole.weights[:10]],
    }  # fmt: skip
