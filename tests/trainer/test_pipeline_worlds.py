"""Whole runs with a pipeline over data, processes and slices, and resumed with dropout: longer than what CI has time for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.configs import layout
from tests.trainer.test_pipeline_runs import LEFT_AT, PIPELINED, STEPS, dense, records, run_until, start
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.contract import Exit
from trainer.run import run
from trainer.state import describe_state, state_items

pytestmark = pytest.mark.full

TURNS = PIPELINED[3:]
OVER_DATA = ("mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.data=2", *TURNS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """A run on one device."""
    directory = tmp_path_factory.mktemp("alone")
    start(dense(directory, cache), devices=1)
    return directory


SPREAD = {
    "over data, with ZeRO": (1, 1, "mesh.ici={stage: 2, fsdp: 2, data: 2}"),
    "a stage in each of two processes": (2, 1, "mesh.ici={stage: 2, fsdp: 4}"),
    "a stage on each of two slices": (2, 2, "mesh={ici: {fsdp: 2, tensor: 2}, dcn: {stage: 2}}"),
}


@pytest.mark.parametrize("how", SPREAD)
def test_it_has_the_losses_of_one_device(how: str, tmp_path: Path, cache: str, alone: Path) -> None:
    processes, slices, mesh = SPREAD[how]
    start(dense(tmp_path, cache, *TURNS, mesh), processes=processes, devices=8 // processes, slices=slices)
    for kind, count in (("step", STEPS), ("eval", STEPS // 2)):
        found, wanted = (records(directory, kind, "loss") for directory in (tmp_path, alone))
        assert found.keys() == wanted.keys() and len(wanted) == count
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


def saved(wanted: TrainConfig) -> dict[str, np.ndarray]:
    abstract = state_items(describe_state(wanted, layout(wanted)).abstract)
    restored = Checkpoints(wanted.checkpoint, wanted.run_directory).restore(STEPS, abstract)
    return {f"{item}/{name}": np.asarray(value) for item, values in restored.items() for name, value in values.items()}


def test_over_data_with_zero_and_dropout_a_resumed_run_ends_with_the_bits_of_one_that_was_not_left(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (dense(tmp_path / name, cache, *OVER_DATA, "model.dropout=0.2") for name in ("whole", "parts"))
    assert run(whole) == Exit.DONE
    run_until(LEFT_AT, parts, monkeypatch)
    assert run(parts) == Exit.DONE
    for kind in ("step", "eval"):
        ours, theirs = (records(tmp_path / name, kind, "loss") for name in ("parts", "whole"))
        if kind == "eval":
            del theirs[LEFT_AT - 1]  # asked to leave, a run does not evaluate
        assert ours == theirs
    found = saved(parts)
    for name, value in saved(whole).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
