"""The average of the parameters: against its recurrence in numpy, at a resume, in evaluation, export and decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.trainer.configs import config, layout
from trainer import run as run_module
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.config.terms import eval_terms
from trainer.contract import Exit
from trainer.data import BatchLoader, open_data
from trainer.decode.source import for_decoding, load, open_source
from trainer.errors import CheckpointError, Preempted
from trainer.export import export
from trainer.feed import Feed
from trainer.loss import LossSums
from trainer.parallel.sharding import Layout
from trainer.run import run
from trainer.state import describe_state, state_from_items, state_items
from trainer.step import make_eval_step, make_train_step

STEPS = 4
EMA = {"decay": 0.6, "warm_up": True}
DECAYS = [1 / 10, 2 / 11, 3 / 12, 4 / 13]  # in step n at most (1 + n) / (10 + n): all below 0.6
Values = dict[str, dict[str, np.ndarray]]


def averaged(directory: Path, *overrides: str, **changes: Any) -> TrainConfig:
    """Every step is saved; the optimizer's state, and with it what is stored of the weights, is split over `data`."""
    mesh = () if any(word.startswith("mesh") for word in overrides) else ("mesh.ici.data=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2")
    fixed: dict[str, Any] = {
        "steps": STEPS,
        "data": {"sources": [{"type": "synthetic", "distinct_batches": 4}]},
        "metrics": {"writers": ["jsonl"]},
        "checkpoint": {"every_steps": 1, "keep_last": 10},
        "sharding": {"optimizer": "over_data"},
    }
    return config(*mesh, *overrides, run_directory=str(directory), **{**fixed, "ema": EMA, **changes})


def saved(run_config: TrainConfig, step: int) -> Values:
    checkpoints = Checkpoints(run_config.checkpoint, run_config.run_directory)
    wanted = state_items(describe_state(run_config, layout(run_config)).abstract)
    assert checkpoints.items(step) == wanted.keys()
    found = checkpoints.restore(step, wanted)
    return {item: {name: np.asarray(value) for name, value in values.items()} for item, values in found.items()}


def assert_follows(mean: dict[str, np.ndarray], states: list[Values], decays: list[float]) -> None:
    """`mean`, and from it on what each of `states` has, is the recurrence over the parameters of these states."""
    for state, decay in zip(states, decays, strict=True):
        mean = {name: decay * value + (1 - decay) * state["params"][name].astype(np.float64) for name, value in mean.items()}
        for name, value in mean.items():
            np.testing.assert_allclose(state["ema"][name], value, rtol=0, atol=1e-6, err_msg=name)


def lines(directory: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


Leaves = Callable[[TrainConfig, int], None]


@pytest.fixture(scope="module")
def leaves() -> Leaves:
    """Runs a config until it is asked to leave after so many steps. Equal steps are compiled once for all tests of this file."""
    programs: dict[str, Any] = {}

    def step_of(run_config: TrainConfig, *arguments: Any) -> Any:
        key = json.dumps([run_config.model_dump(mode="json", exclude={"run_directory", "eval", "checkpoint"})])
        return programs.setdefault(key, make_train_step(run_config, *arguments))

    def go(run_config: TrainConfig, steps: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "make_train_step", step_of)
            patch.setattr(run_module.distributed, "preemption_requested", lambda done: done == steps < STEPS)
            if steps < STEPS:
                with pytest.raises(Preempted):
                    run(run_config)
            else:
                assert run(run_config) == Exit.DONE

    return go


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, leaves: Leaves) -> Path:
    """A run that keeps an average and was resumed in the middle."""
    directory = tmp_path_factory.mktemp("resumed")
    leaves(averaged(directory), 2)
    leaves(averaged(directory), STEPS)
    return directory


def test_the_average_is_the_recurrence_over_the_parameters_also_behind_a_resume(resumed: Path) -> None:
    run_config = averaged(resumed)
    states = [saved(run_config, step) for step in range(1, STEPS + 1)]
    for name, value in states[0]["params"].items():
        assert np.any(states[0]["ema"][name] != value), name
    assert_follows({name: value.astype(np.float64) for name, value in states[0]["ema"].items()}, states[1:], DECAYS[1:])


@pytest.mark.full
def test_beginning_an_average_at_a_resume_starts_it_at_the_parameters_and_changes_no_bit_of_training(
    leaves: Leaves, resumed: Path, tmp_path: Path
) -> None:
    leaves(averaged(tmp_path, ema=None), 2)
    leaves(averaged(tmp_path, eval={"every_steps": STEPS, "weights": "ema"}), STEPS)
    own, other = averaged(tmp_path), averaged(resumed)
    assert [line["loss"] for line in lines(tmp_path, "step")] == [line["loss"] for line in lines(resumed, "step")]
    before = saved(averaged(tmp_path, ema=None), 2)["params"]
    states = [saved(own, step) for step in (3, 4)]
    assert_follows({name: value.astype(np.float64) for name, value in before.items()}, states, DECAYS[2:])
    for item in ("params", "opt", "rest"):
        for name, value in saved(other, STEPS)[item].items():
            np.testing.assert_array_equal(states[-1][item][name], value, err_msg=name)
    assert_evaluated(own, states[-1])


def assert_evaluated(run_config: TrainConfig, state: Values) -> None:
    """The last evaluation of the run is that of a model whose parameters are the average."""
    plain = run_config.model_copy(update={"ema": None})
    where = layout(plain)
    spec = describe_state(plain, where)
    arrays = Checkpoints(plain.checkpoint, plain.run_directory).restore(STEPS, state_items(spec.abstract) | {
        "ema": state_items(describe_state(run_config, where).abstract)["ema"]
    })  # fmt: skip
    model = state_from_items(spec, {**arrays, "params": arrays["ema"]})
    evaluated = averaged(Path(run_config.run_directory), ema=None, eval={"every_steps": STEPS})
    split, sums = open_data(evaluated).eval, LossSums.zero(eval_terms(evaluated))
    assert split is not None
    step, feed = make_eval_step(evaluated, spec, where), Feed(where, split.global_batch, 16)
    for _, batch in BatchLoader(split):
        sums = step(model, sums, feed(batch))
    (line,) = lines(Path(run_config.run_directory), "eval")
    assert line["loss"] == float(sums.cross_entropy) / float(sums.tokens)
    assert any(np.any(state["ema"][name] != value) for name, value in state["params"].items())


def test_export_and_decoding_take_the_average_and_refuse_where_there_is_none(resumed: Path, tmp_path: Path, leaves: Leaves) -> None:
    found = saved(averaged(resumed), STEPS)
    written = export(str(resumed), str(tmp_path / "out"), form="parameters", weights="ema")
    assert written["source"] == f"step {STEPS} of {resumed}, averaged"
    exported = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert exported.keys() == found["ema"].keys()
    for name, value in found["ema"].items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
    where = Layout.of(averaged(resumed), layout(averaged(resumed)).mesh.devices.flatten().tolist())
    source = open_source(str(resumed), weights="ema")
    table = load(source, for_decoding(source.model), where)["embed/table"]
    np.testing.assert_array_equal(np.asarray(table), found["ema"]["embed/table"])
    with pytest.raises(CheckpointError, match="no run directory and has one set of weights"):
        open_source(str(tmp_path / "out"), weights="ema")
    without = averaged(tmp_path / "without", ema=None)
    leaves(without, 1)
    for refused in (lambda: open_source(str(tmp_path / "without"), weights="ema"),
                    lambda: export(str(tmp_path / "without"), str(tmp_path / "no"), form="parameters", weights="ema")):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"step 1 of .* has no average of its parameters"):
            refused()


@pytest.mark.full
def test_the_average_of_pipelined_layers_is_exported_as_the_model(tmp_path: Path) -> None:
    mesh = ("mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2", "optimizer.state_memory=host")
    run_config = averaged(tmp_path, *mesh, pipeline={}, sharding={})
    assert run(run_config) == Exit.DONE
    states = [saved(run_config, step) for step in range(1, STEPS + 1)]
    assert_follows({name: value.astype(np.float64) for name, value in states[0]["ema"].items()}, states[1:], DECAYS[1:])
    export(str(tmp_path), str(tmp_path / "out"), form="parameters", weights="ema")
    exported = load_file(next((tmp_path / "out").glob("*.safetensors")))
    stages = states[-1]["ema"]["segments/0/0/pipeline/attention/query"]
    np.testing.assert_array_equal(exported["segments/0/0/attention/query"], stages.reshape(-1, *stages.shape[3:]))
