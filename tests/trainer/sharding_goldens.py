"""Layouts of whole models on whole meshes as text, one file each: `python -m tests.trainer.sharding_goldens` writes them anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, validate
from trainer.config.activations import activations, batch_tensors
from trainer.config.layouts import stored_layout, weight_layouts
from trainer.config.mesh import product
from trainer.config.rules import Resolution, resolve
from trainer.config.treatment import treatments

FOLDER = Path(__file__).parent / "shardings"
MIXTURE = {
    "vocab_size": 32000, "width": 4096,
    "segments": [{
        "repeats": 32,
        "pattern": [{"attention": {"heads": 32, "kv_heads": 8, "head_dim": 128},
                     "mlp": {"type": "moe", "hidden": 14336, "experts": 8, "experts_per_token": 2}}],
    }],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    ici: dict[str, int]
    dcn: dict[str, int] = field(default_factory=dict[str, int])
    slices: int = 1
    devices: int = 64
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def config(self) -> TrainConfig:
        return validate(TrainConfig, {
            "run_directory": "unused", "steps": 20000, "model": self.model, "mesh": {"ici": self.ici, "dcn": self.dcn},
            "batch": {"global_batch": 512, "sequence_length": 4096}, "schedule": {"type": "constant", "learning_rate": 3e-4},
            "data": {"sources": [{"type": "synthetic"}]}, **self.more,
        })  # fmt: skip

    @property
    def mesh(self) -> dict[str, int]:
        return self.config.mesh.shape(slices=self.slices, devices_per_slice=self.devices)


CASES = {
    "llama2-7b-fsdp": Case({"preset": "llama2-7b"}, {"fsdp": -1}),
    "llama3-70b-fsdp-tensor": Case({"preset": "llama3-70b"}, {"fsdp": 32, "tensor": 8}, devices=256),
    "llama3-8b-two-slices-over-data": Case(
        {"preset": "llama3-8b"},
        {"fsdp": 16, "tensor": 4},
        {"data": 2},
        slices=2,
        more={"sharding": {"optimizer": "over_data"}, "optimizer": {"type": "adafactor"}},
    ),
    "qwen3-32b-fsdp-transpose": Case({"preset": "qwen3-32b"}, {"fsdp": 16, "fsdp_transpose": 4}, more={"optimizer": {"type": "muon"}}),
    "mistral-7b-tensor-sequence": Case({"preset": "mistral-7b"}, {"fsdp": 8, "tensor_sequence": 8}),
    "qwen3-0.6b-context": Case({"preset": "qwen3-0.6b"}, {"fsdp": 8, "context": 4, "data": -1}),
    "mixture-of-8-expert": Case(MIXTURE, {"expert": 8, "fsdp": 8}),
    "llama3-8b-pipeline": Case({"preset": "llama3-8b"}, {"stage": 4, "fsdp": 16}, more={"pipeline": {"repeats": 2}}),
}


def golden(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def text(case: Case) -> str:
    """One tensor a line: `path: axis size/mesh axes, ...`, and what a rule gave and the size did not allow."""
    return "\n".join([product(case.mesh), *_lines(case.config, case.mesh)]) + "\n"


def _lines(config: TrainConfig, mesh: dict[str, int]) -> Iterator[str]:
    sharding = config.sharding
    declared = list(weight_layouts(config, mesh))
    yield "\nweights in a step"
    for weight, layout in declared:
        yield _line(weight.path, weight.axes, weight.shape, layout)
    if sharding.optimizer == "over_data":
        yield "\nweights as stored"
        for weight, _ in declared:
            yield _line(weight.path, weight.axes, weight.shape, stored_layout(sharding, weight.axes, weight.shape, weight.path, mesh))
    yield "\noptimizer"
    for treatment in treatments(config.optimizer, [weight for weight, _ in declared]):
        path, shape = treatment.weight.path, treatment.weight.shape
        if like := [moment.slot for moment in treatment.moments if moment.shape == shape]:
            yield f"{path}: {treatment.method}, {' and '.join(like)} lie as the weight is stored"
        for moment in treatment.moments:
            if moment.slot not in like:
                yield _line(
                    f"{moment.slot}/{path}", moment.axes, moment.shape, stored_layout(sharding, moment.axes, moment.shape, path, mesh)
                )
    yield "\nactivations and batch"
    for tensor in (*activations(config), *batch_tensors(config)):
        yield _line(tensor.name, tensor.axes, tensor.shape, resolve(tensor.axes, tensor.shape, mesh, sharding.table()))


def _line(name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], layout: Resolution) -> str:
    dims = [
        f"{axis or '-'} {size}" + (f"/{'+'.join(split)}" if split else "")
        for axis, size, split in zip(axes, shape, layout.spec, strict=True)
    ]
    return f"{name}: {', '.join(dims)}" + "".join(f"; {reason}" for _, _, reason in layout.dropped)


if __name__ == "__main__":
    for name, case in CASES.items():
        golden(name).write_text(text(case), encoding="utf-8")
        print(golden(name))
