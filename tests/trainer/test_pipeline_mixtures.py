"""Mixtures of experts and multi-token prediction in a pipeline: the terms, loads, biases and gradients of the layers in order."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.trainer.configs import MIXTURE, config, ragged_batch
from tests.trainer.pipelined_runs import Step, assert_same_step, one_step
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.config.terms import loss_terms

ROWS = 16
COMMON = (
    "model.multi_token={depth: 1}", "optimizer={type: sgd, clip_norm: null}", f"batch.global_batch={ROWS}",
    "loss.load_balance_weight=0.5", "loss.router_z_loss_weight=0.2", "loss.z_loss_weight=0.1", "sharding.unsharded_limit=1",
)  # fmt: skip
BALANCED = {"scoring": "sigmoid", "bias_balancing": {"update_rate": 0.01}}
CIRCULAR = ("mesh.ici.stage=2", "pipeline={repeats: 2}", "batch.accumulation=2")
FORMS: dict[str, tuple[str, ...]] = {
    "circular, expert 2, fsdp 2": (*CIRCULAR, "mesh.ici.expert=2", "mesh.ici.fsdp=2"),
}  # fmt: skip


def run_with(*overrides: str, devices: int = 8, **mlp: Any) -> TrainConfig:
    block = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": {**MIXTURE, "router": BALANCED, **mlp}}
    model = {**config().model.model_dump(mode="json"), "matmul_precision": "highest", "segments": [{"repeats": 4, "pattern": [block]}]}
    run = config(*COMMON, *overrides, model=model)
    assert list(check_train(run, slices=1, devices_per_slice=devices, processes=1)) == []
    return run


@functools.cache
def in_order(accumulation: int) -> Step:
    run = run_with(f"batch.accumulation={accumulation}", devices=1)
    return one_step(run, devices=1, batch=ragged_batch(0, batch=ROWS))


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_the_layers_in_order(form: str) -> None:
    run = run_with(*FORMS[form])
    found, wanted = one_step(run, batch=ragged_batch(0, batch=ROWS)), in_order(run.batch.accumulation)
    assert {term.name for term in loss_terms(run)} == {"z_loss", "load_balance", "router_z_loss", "multi_token_1"}
    assert all(wanted.metrics[term.name] > 0 for term in loss_terms(run))
    assert_same_step(found, wanted)
    biases = {path: value for path, value in wanted.after.items() if path.endswith("router/balance")}
    assert len(biases) == 2
    for path, value in biases.items():
        assert np.abs(value).max() == pytest.approx(0.01)
        np.testing.assert_array_equal(found.after[path], value, err_msg=path)
