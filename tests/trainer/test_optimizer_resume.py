"""A run of every optimizer goes on from its checkpoint as if it had never stopped, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.checkpoint import Checkpoints
from trainer.state import describe_state, initial_state, state_from_items, state_items
from trainer.step import make_train_step

SPIKES = {"window_steps": 4}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"type": "muon", "moment_dtype": "bfloat16", "skip_spikes": SPIKES, "groups": [{"tensors": ["axis:vocab"], "frozen": True}]},
    "adafactor": {"type": "adafactor", "factored_from": 8, "skip_spikes": SPIKES},
    "lion": {"type": "lion", "gradient_dtype": "bfloat16"},
    "sgd": {"type": "sgd"},
}
BLOCK = {"attention": {"heads": 2, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 32}}


# The others keep less of the same kinds.
@pytest.mark.parametrize("name", ["muon", *(pytest.param(name, marks=pytest.mark.full) for name in ("adafactor", "lion", "sgd"))])
def test_two_steps_after_a_checkpoint_are_bitwise_those_of_a_run_that_did_not_stop(name: str, tmp_path: Path) -> None:
    model = {**config().model.model_dump(mode="json"), "segments": [{"repeats": 1, "pattern": [BLOCK]}], "width": 16, "dropout": 0.1}
    run = config("mesh.ici.fsdp=2", "mesh.ici.data=2", optimizer=OPTIMIZERS[name], model=model)
    where = layout(run, 4)
    spec = describe_state(run, where)
    step, state = make_train_step(run, spec, where), initial_state(run, spec)
    first = {path: np.asarray(value) for path, value in state_items(state)["params"].items()}
    checkpoints = Checkpoints(run.checkpoint, str(tmp_path))
    for n in range(4):
        if n == 2:
            checkpoints.save(n, state_items(state), {})
            checkpoints.wait()
        state, _ = step(state, put(ragged_batch(n), where))
    resumed = state_from_items(spec, checkpoints.restore(2, state_items(spec.abstract)))
    for n in (2, 3):
        resumed, _ = step(resumed, put(ragged_batch(n), where))
    wanted, found = state_items(state), state_items(resumed)
    for item, arrays in wanted.items():
        assert found[item].keys() == arrays.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(np.asarray(found[item][path]), np.asarray(value), err_msg=f"{item}/{path}")
    for path, value in wanted["params"].items():
        still = name == "muon" and path in ("embed/table", "head/kernel")
        assert np.array_equal(value, first[path]) == still, path
