"""A pipelined run is the run without a pipeline: first parameters, loss, gradients, checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from tests.trainer.pipelined_runs import Step, assert_same_step, one_step
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.state import describe_state, initial_state, state_items
from trainer.step import make_train_step

LAYERS = 4
STAGES = ("mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2")
# After one step its momentum is the gradient.
GRADIENT = ("optimizer={type: sgd, clip_norm: null}", "loss.z_loss_weight=0.01")


def run_config(*overrides: str, devices: int = 8) -> TrainConfig:
    run = config("model.matmul_precision=highest", f"model.segments.0.repeats={LAYERS}", *overrides)
    assert list(check_train(run, slices=1, devices_per_slice=devices, processes=1)) == []
    return run


@functools.cache
def in_order(*overrides: str) -> Step:
    return one_step(run_config(*GRADIENT, *overrides, devices=1), devices=1, batch=ragged_batch(0))


VARIANTS = {
    "circular, weights once a repeat, data, zero": (
        "mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.data=2", "pipeline={repeats: 2, gather: repeat}", "model.remat=minimal",
        "sharding.optimizer=over_data",
    ),
    "two layers outside, one by one, delayed, tensor, the table over stages": (
        *STAGES, "pipeline={layers: 2, delayed_forwarding: true}", "model.layers=unroll",
        "sharding.rules=[{axis: embed, mesh: [stage, fsdp], weight: embed/table}]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_parameters_are_the_same_bits_and_loss_and_gradients_those_of_the_layers_in_order(variant: str) -> None:
    assert_same_step(one_step(run_config(*GRADIENT, *VARIANTS[variant]), batch=ragged_batch(0)), in_order())


TIED = "model.tie_embeddings=true"
SLICES = ("mesh={ici: {fsdp: 2, tensor: 2}, dcn: {stage: 2}}", "pipeline={repeats: 2}")
OTHERS = {
    "tied embeddings, two layers outside": (1, (TIED, *STAGES, "pipeline={layers: 2}"), (TIED,)),
    "tied embeddings, the table over stages, zero": (
        1, (TIED, *VARIANTS["circular, weights once a repeat, data, zero"], *VARIANTS[list(VARIANTS)[1]][-1:]), (TIED,),
    ),
    "two slices, a stage on each, accumulation": (2, (*SLICES, "batch.accumulation=2"), ()),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("how", OTHERS)
def test_so_they_are_with_tied_embeddings_and_over_slices(how: str) -> None:
    slices, overrides, alone = OTHERS[how]
    run = config("model.matmul_precision=highest", f"model.segments.0.repeats={LAYERS}", *GRADIENT, *overrides)
    assert list(check_train(run, slices=slices, devices_per_slice=8 // slices, processes=1)) == []
    assert_same_step(one_step(run, slices=slices, batch=ragged_batch(0)), in_order(*alone))


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


def test_a_stage_of_one_layer_takes_dropout_too() -> None:
    """Its layer's number has no dim left. Traced only: what dropout does is shown without a pipeline."""
    run = run_config(*STAGES, "pipeline.repeats=2", "model.dropout=0.2")
    where = layout(run)
    spec, batch = describe_state(run, where), put(ragged_batch(0), where)
    _, metrics = jax.eval_shape(make_train_step(run, spec, where), spec.abstract, batch)
    assert metrics["loss"].shape == ()
