"""A pipelined run is the run without a pipeline: first parameters, loss, gradients, checkpoints, eight steps of everything together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.config.weights import stacked_path
from trainer.loss import LossSums
from trainer.state import describe_state, initial_state, state_from_items, state_items
from trainer.step import make_eval_step, make_train_step

LAYERS = 4
STAGES = ("mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2")
# After one step its momentum is the gradient.
GRADIENT = ("optimizer={type: sgd, clip_norm: null}", "loss.z_loss_weight=0.01")


def run_config(*overrides: str, devices: int = 8) -> TrainConfig:
    run = config("model.matmul_precision=highest", f"model.segments.0.repeats={LAYERS}", *overrides)
    assert list(check_train(run, slices=1, devices_per_slice=devices, processes=1)) == []
    return run


def by_weight(values: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Every weight's repeats stacked, in order, whatever form they were in."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path, array in values.items():
        value, place = np.asarray(array), path.split("/")[3:5]
        digits = [int(part) for part in place if part.isdigit()]
        if "pipeline" in place:
            parts.setdefault(stacked_path(path), []).append((-1, value.reshape(-1, *value.shape[3:])))
        else:
            parts.setdefault(stacked_path(path), []).append((digits[0], value[None]) if digits else (0, value))
    return {
        path: np.concatenate([value for _, value in sorted(found, key=lambda part: part[0])]) if len(found) > 1 else found[0][1]
        for path, found in parts.items()
    }


def one_step(run: TrainConfig, devices: int = 8) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """First parameters, metrics of a step on a ragged batch, gradients."""
    where = layout(run, devices)
    spec = describe_state(run, where)
    state = initial_state(run, spec)
    initial = by_weight(state_items(state)["params"])
    after, metrics = make_train_step(run, spec, where)(state, put(ragged_batch(0), where))
    moments = {path.removeprefix("mu/"): value for path, value in state_items(after)["opt"].items() if path.startswith("mu/")}
    return initial, jax.tree.map(np.asarray, metrics), by_weight(moments)


def assert_same_step(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """First parameters bitwise, metrics at 1e-6, every gradient at 1e-5 of its norm."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
    for path, value in wanted[0].items():
        np.testing.assert_array_equal(found[0][path], value, err_msg=path)
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5 if name == "gradient_norm" else 1e-6, err_msg=name)
    for path, gradient in wanted[2].items():
        assert np.linalg.norm(found[2][path] - gradient) <= 1e-5 * np.linalg.norm(gradient), path


@pytest.fixture(scope="module")
def in_order() -> tuple[Any, ...]:
    return one_step(run_config(*GRADIENT, devices=1), devices=1)


VARIANTS = {
    "circular, weights once a repeat, data, zero": (
        "mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.data=2", "pipeline={repeats: 2, gather: repeat}", "model.remat=minimal",
        "sharding.optimizer=over_data",
    ),
    "two layers outside, one by one, delayed, tensor": (*STAGES, "pipeline={layers: 2, delayed_forwarding: true}", "model.layers=unroll"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_parameters_are_the_same_bits_and_loss_and_gradients_those_of_the_layers_in_order(
    variant: str, in_order: tuple[Any, ...]
) -> None:
    assert_same_step(one_step(run_config(*GRADIENT, *VARIANTS[variant])), in_order)


@pytest.mark.full
def test_mixtures_in_a_pipeline_lose_neither_a_term_nor_a_statistic() -> None:
    mixture = "model.segments.0.pattern.0.mlp={type: moe, hidden: 16, experts: 4, experts_per_token: 2}"
    terms = ("loss.load_balance_weight=0.1", "loss.router_z_loss_weight=0.1")
    wanted = one_step(run_config(*GRADIENT, mixture, *terms, devices=1), devices=1)
    assert {"load_balance", "router_z_loss"} <= wanted[1].keys()
    assert_same_step(one_step(run_config(*GRADIENT, mixture, *terms, *STAGES, "pipeline={repeats: 2}")), wanted)


SHAPES = {
    "stacked": (),
    "two of four layers, the others one by one": ("mesh.ici.stage=2", "mesh.ici.fsdp=4", "pipeline.layers=2", "model.layers=unroll"),
    "two stages, two repeats": (*STAGES, "pipeline.repeats=2"),
    "four stages": ("mesh.ici.stage=4", "mesh.ici.fsdp=2", "pipeline={}"),
    "two of four layers": ("mesh.ici.stage=2", "mesh.ici.fsdp=4", "pipeline.layers=2"),
    "one by one": ("model.layers=unroll",),
}
CIRCLE = list(zip(SHAPES, [*list(SHAPES)[1:], "stacked"], strict=True))


@pytest.mark.parametrize(
    "pairs",
    [CIRCLE[1:3], pytest.param([(saved, wanted) for saved in SHAPES for wanted in SHAPES], marks=pytest.mark.full)],
    ids=["some", "all"],
)
def test_a_checkpoint_of_any_shape_restores_under_any_other_bit_for_bit(pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    """The first parameters are the same bits under every shape, so they are what must come back."""
    specs, first = {}, {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        run = run_config(*SHAPES[name])
        specs[name] = describe_state(run, layout(run))
        first[name] = state_items(initial_state(run, specs[name]))["params"]
    for saved in dict.fromkeys(saved for saved, _ in pairs):
        folder = str(tmp_path / saved)
        checkpoints = Checkpoints(run_config().checkpoint, folder)
        moments = {f"mu/{path}": array for path, array in first[saved].items()}
        checkpoints.save(1, {"params": first[saved], "opt": moments, "rest": {"step": jnp.zeros(())}}, {})
        checkpoints.close()
        for wanted in [other for one, other in pairs if one == saved]:
            abstract = state_items(specs[wanted].abstract)["params"]
            opt = {f"mu/{path}": leaf for path, leaf in abstract.items()}
            found = checkpoints.restore(1, {"params": abstract, "opt": opt})
            for path, array in first[wanted].items():
                for restored in (found["params"][path], found["opt"][f"mu/{path}"]):
                    np.testing.assert_array_equal(np.asarray(restored), np.asarray(array), err_msg=f"{saved} -> {wanted}: {path}")
                    assert restored.sharding == abstract[path].sharding


@pytest.mark.full
def test_pipeline_tensor_zero_muon_accumulation_and_a_change_to_fsdp_give_the_losses_of_one_device(tmp_path: Path) -> None:
    common = ("optimizer={type: muon}", "schedule.learning_rate=1e-2", "loss.z_loss_weight=0.01")
    everything = ("pipeline={repeats: 2}", "batch.accumulation=2", "sharding.optimizer=over_data")

    def train(run: TrainConfig, devices: int, steps: range, begin: str | None, end: str | None) -> tuple[list[float], float]:
        where = layout(run, devices)
        spec = describe_state(run, where)
        state = initial_state(run, spec)
        if begin is not None:
            state = state_from_items(spec, Checkpoints(run.checkpoint, begin).restore(steps.start, state_items(spec.abstract)))
        step, losses = make_train_step(run, spec, where), []
        for n in steps:
            state, metrics = step(state, put(ragged_batch(n), where))
            losses.append(float(metrics["loss"]))
        zero = jax.device_put(LossSums.zero(), where.replicated)
        sums = make_eval_step(run, spec, where)(state, zero, put(ragged_batch(100), where))
        if end is not None:
            checkpoints = Checkpoints(run.checkpoint, end)
            checkpoints.save(steps.stop, state_items(state), {})
            checkpoints.close()
        return losses, float(sums.cross_entropy / sums.tokens)

    wanted, evaluated = train(run_config(*common, devices=1), 1, range(8), None, None)
    first, _ = train(run_config(*STAGES, *common, *everything), 8, range(4), None, str(tmp_path))
    second, found = train(run_config("mesh.ici.fsdp=8", *common), 8, range(4, 8), str(tmp_path), None)
    np.testing.assert_allclose([*first, *second], wanted, rtol=1e-5)
    np.testing.assert_allclose(found, evaluated, rtol=1e-5)
