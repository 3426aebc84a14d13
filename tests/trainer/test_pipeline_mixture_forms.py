"""More forms of mixtures in a pipeline, and every loss term's own gradient under each: longer than what CI has time for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.trainer.configs import layout, put, ragged_batch
from tests.trainer.pipelined_runs import assert_same_step, one_step
from tests.trainer.test_pipeline_mixtures import CIRCULAR, ROWS, in_order, run_with
from trainer.config import TrainConfig
from trainer.config.terms import loss_terms
from trainer.state import describe_state, initial_state
from trainer.step import make_term_probe

pytestmark = pytest.mark.full

EXPERTS = (*CIRCULAR, "mesh.ici.expert=2", "mesh.ici.fsdp=2")
FORMS: dict[str, tuple[str, ...]] = {
    "weights once a repeat, expert 4, products kept": (
        "mesh.ici.stage=2", "mesh.ici.expert=4", "mesh.ici.fsdp=1", "pipeline={repeats: 2, gather: repeat}", "model.remat=minimal",
    ),
    "delayed, expert 2, tensor 2, one by one, nothing recomputed": (
        "mesh.ici.stage=2", "mesh.ici.expert=2", "mesh.ici.tensor=2", "mesh.ici.fsdp=1", "pipeline={delayed_forwarding: true}",
        "model.layers=unroll", "model.remat=none", "batch.accumulation=2",
    ),
    "half of the layers, weights once, over data": (
        "mesh.ici.stage=2", "mesh.ici.data=2", "mesh.ici.fsdp=2", "pipeline={layers: 2, gather: once}", "sharding.optimizer=over_data",
        "batch.accumulation=2",
    ),
    "four stages": ("mesh.ici.stage=4", "mesh.ici.expert=2", "mesh.ici.fsdp=1", "pipeline={}", "batch.accumulation=2"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_the_layers_in_order(form: str) -> None:
    run = run_with(*FORMS[form])
    found, wanted = one_step(run, batch=ragged_batch(0, batch=ROWS)), in_order(run.batch.accumulation)
    assert all(wanted.metrics[term.name] > 0 for term in loss_terms(run))
    assert_same_step(found, wanted)


def measured(run: TrainConfig, devices: int) -> dict[str, dict[str, np.ndarray]]:
    """Of every term: value, what it was divided by, norm of its own gradient."""
    where = layout(run, devices)
    spec = describe_state(run, where)
    state, batch, probe = initial_state(run, spec), put(ragged_batch(0, batch=ROWS), where), make_term_probe(run, spec, where)
    return {term.name: jax.tree.map(np.asarray, dict(probe(state, batch, number))) for number, term in enumerate(loss_terms(run))}


def test_every_term_has_the_value_and_the_gradient_it_has_without_a_pipeline() -> None:
    run = run_with(*EXPERTS)
    found, wanted = measured(run, 8), measured(run_with(f"batch.accumulation={run.batch.accumulation}", devices=1), 1)
    for term, numbers in wanted.items():
        assert all(number > 0 for number in numbers.values())
        for name, number in numbers.items():
            np.testing.assert_allclose(found[term][name], number, rtol=1e-5, err_msg=f"{term} {name}")
