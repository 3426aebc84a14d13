"""What `explain` says an optimizer keeps is what the trainer's state has on a device."""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest
from flax import nnx

from launcher.explain.memory import device_memory
from tests.trainer.configs import config, layout
from trainer.state import describe_state, state_items

FROZEN = [{"tensors": ["axis:vocab", "*/mlp/gate"], "frozen": True}]
OPTIMIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({}, 2),
    "adamw, half in bfloat16": ({"type": "adamw", "moment_dtype": "bfloat16"}, 1.5),
    "muon": ({"type": "muon"}, 1.24),
    "sgd": ({"type": "sgd", "moment_dtype": "bfloat16"}, 0.5),
    "sgd without momentum": ({"type": "sgd", "momentum": 0.0}, 0),
    "lion": ({"type": "lion"}, 1),
    "adafactor": ({"type": "adafactor", "factored_from": 8}, 0.16),
    "frozen": ({"groups": FROZEN}, 1.29),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_an_optimizer_are_those_of_the_state_on_one_device(name: str) -> None:
    optimizer, share = OPTIMIZERS[name]
    run = config("mesh.ici.fsdp=2", "mesh.ici.data=2", "mesh.ici.tensor=2", optimizer=optimizer)
    where = layout(run)
    spec = describe_state(run, where)
    kept = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in state_items(spec.abstract)["opt"].items()
        if path != "count"
    )
    memory = device_memory(run, dict(where.mesh.shape))
    assert memory.optimizer == kept
    assert memory.optimizer == pytest.approx(share * memory.parameters, rel=0.05)
    model = nnx.filter_state(spec.abstract["model"], spec.trained)
    trained = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(model))
    assert memory.gradients == trained


def test_of_a_layer_at_work_a_device_holds_its_own_experts_only() -> None:
    run = config(model={"preset": "mixtral-8x7b"}, batch={"global_batch": 64, "sequence_length": 4096})
    whole, split = (device_memory(run, mesh).layer_at_work for mesh in ({"fsdp": 64}, {"fsdp": 8, "expert": 8}))
    experts = 8 * 3 * 4096 * 14336
    assert whole - split == 2 * (experts - experts // 8)  # bfloat16
