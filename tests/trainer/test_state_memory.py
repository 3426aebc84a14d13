"""The optimizer state in the host's memory: the same numbers, and it stays there, also over a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.state import Items, describe_state, initial_state, state_from_items, state_items
from trainer.step import make_train_step

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "adamw", "moment_dtype": "bfloat16", "skip_spikes": {"window_steps": 4}},
    "muon": {"type": "muon"},
    "adafactor": {"type": "adafactor", "factored_from": 8},
}


BLOCK = {"attention": {"heads": 2, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 32}}


def run_config(optimizer: dict[str, Any], memory: str) -> TrainConfig:
    model = {**config().model.model_dump(mode="json"), "segments": [{"repeats": 1, "pattern": [BLOCK]}], "width": 16, "layers": "unroll"}
    return config("mesh.ici.fsdp=2", optimizer={**optimizer, "state_memory": memory}, model=model)


def trained(run: TrainConfig, folder: Path | None = None) -> Items:
    """The state after two steps; with a folder, by way of a checkpoint between them."""
    where = layout(run, 2)
    spec = describe_state(run, where)
    step, state = make_train_step(run, spec, where), initial_state(run, spec)
    for n in range(2):
        if n == 1 and folder is not None:
            checkpoints = Checkpoints(run.checkpoint, str(folder))
            checkpoints.save(n, state_items(state), {})
            checkpoints.wait()
            state = state_from_items(spec, checkpoints.restore(n, state_items(spec.abstract)))
        state, _ = step(state, put(ragged_batch(n), where))
    return state_items(state)


# Adafactor's factors are sums, which the compiler fuses with what follows where nothing is copied in between: there the last bit of a
# few weights differs.
@pytest.mark.full
@pytest.mark.parametrize(("name", "differs"), [("adamw", 0.0), ("muon", 0.0), ("adafactor", 1e-6)])
def test_state_kept_by_the_host_is_bitwise_that_kept_by_the_device_and_survives_a_checkpoint(
    name: str, differs: float, tmp_path: Path
) -> None:
    wanted = trained(run_config(OPTIMIZERS[name], "device"))
    found = trained(run_config(OPTIMIZERS[name], "host"), tmp_path)
    for item, arrays in wanted.items():
        for path, value in arrays.items():
            np.testing.assert_allclose(np.asarray(found[item][path]), np.asarray(value), rtol=differs, atol=0, err_msg=f"{item}/{path}")
            moment = item == "opt" and isinstance(value, jax.Array) and value.ndim > 0 and "spikes" not in path
            assert found[item][path].sharding.memory_kind == ("pinned_host" if moment else "device"), path


def test_replicas_with_state_kept_by_the_host_are_refused() -> None:
    run = config("mesh.ici={diloco: 2, fsdp: 4}", diloco={"sync_every_steps": 2}, optimizer={"state_memory": "host"})
    (problem,) = [p for p in check_train(run, slices=1, devices_per_slice=8, processes=1) if p.code == "state-memory"]
    assert (problem.path, problem.hint) == ("optimizer.state_memory", "device")
