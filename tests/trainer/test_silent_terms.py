"""Loss terms that are enabled and do nothing are told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.trainer.configs import BATCH, LENGTH, config, layout, put, ragged_batch
from trainer.config.train import TrainConfig
from trainer.contract import Exit
from trainer.run import run as run_all
from trainer.silent import SilentTerms, TermProbe
from trainer.state import describe_state, initial_state
from trainer.step import make_term_probe

ONE_STEP = nnx.State({}), dict[str, jax.Array]()
Z_LOSS = "loss.z_loss_weight=0.1"


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def silences(self) -> list[tuple[int, str]]:
        return [(fields["step"], fields["term"]) for kind, fields in self.events if kind == "silent loss term"]


def measured(gradient_norm: float, tokens: float = 5.0) -> TermProbe:
    values = {"value": 1.0, "tokens": tokens, "gradient_norm": gradient_norm}
    return lambda state, batch, number: {name: jnp.float32(value) for name, value in values.items()}


def watched(run: TrainConfig, probe: TermProbe, values: list[float]) -> Log:
    """`values` are those of the z-loss, step by step."""
    log = Log()
    silent = SilentTerms(run, probe, log)
    for n, value in enumerate(values):
        silent.step(n, *ONE_STEP, {"step": float(n - 1), "cross_entropy": 2.0, "z_loss": value} if n else None)
    return log


def test_a_term_that_is_exactly_zero_for_so_many_steps_in_a_row_is_told_of_once_for_each_silence() -> None:
    values = [9, 0, 0, 0, 0.1, 0, 0, 0.1, 0, 0, 0, 0, 0]
    log = watched(config(Z_LOSS, "loss.silent_term_steps=3"), measured(1.0), values)
    assert log.silences() == [(2, "z_loss"), (9, "z_loss")]
    [first, _] = [fields for kind, fields in log.events if kind == "silent loss term"]
    assert first == {"level": "error", "step": 2, "term": "z_loss", "weight": 0.1, "reason": "exactly 0 for 3 steps"}


def test_a_term_without_a_gradient_is_told_of_unless_nothing_counted() -> None:
    run, values = config(Z_LOSS, "loss.silent_term_steps=4"), [1.0] * 14
    log = watched(run, measured(0.0), values)
    assert log.silences() == [(3, "z_loss")]
    assert [fields["step"] for kind, fields in log.events if kind == "loss terms"] == [3, 7, 11]
    assert watched(run, measured(0.0, tokens=0), values).silences() == []
    assert watched(run, measured(0.5), values).silences() == []


def test_a_term_that_is_not_enabled_may_be_zero() -> None:
    assert watched(config("loss.silent_term_steps=2"), measured(0.0), [0.0] * 6).events == []


def test_what_is_measured_is_the_norm_of_the_terms_own_gradient_by_what_is_trained_on_the_first_microbatch() -> None:
    groups = [{"tensors": ["segments/*", "axis:vocab"], "frozen": True}]
    run = config(Z_LOSS, "batch.accumulation=2", "mesh.ici.fsdp=4", "mesh.ici.data=2", optimizer={"groups": groups})
    where = layout(run)
    spec = describe_state(run, where)
    state, batch = initial_state(run, spec), ragged_batch(0)
    found = make_term_probe(run, spec, where)(state, put(batch, where), 0)
    whole = nnx.merge(spec.graphdef, jax.tree.map(jnp.asarray, jax.device_get(state)))
    model_def, norm, rest = nnx.split(whole.model, nnx.PathContains("final_norm"), ...)
    rows = {name: jnp.asarray(values[::2]) for name, values in batch.items()}

    def z_loss(norm: nnx.State) -> jax.Array:
        """By its definition."""
        logits = nnx.merge(model_def, norm, rest)(rows["inputs"], rows["positions"], rows["segments"])  # pyright: ignore[reportCallIssue]
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return jnp.sum(jnp.where(rows["weights"] > 0, squares, 0)) / jnp.sum(rows["weights"])

    value, gradient = jax.jit(jax.value_and_grad(z_loss))(norm)
    np.testing.assert_allclose(found["value"], value, rtol=1e-6)
    np.testing.assert_allclose(found["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert float(found["tokens"]) == rows["weights"].sum()


def test_a_run_logs_its_terms_with_their_gradient_norms(tmp_path: Path) -> None:
    source = {"sources": [{"type": "synthetic"}]}
    overrides = Z_LOSS, "loss.silent_term_steps=2", "mesh.ici.fsdp=2", "mesh.ici.data=4"
    assert run_all(config(*overrides, run_directory=str(tmp_path), steps=4, data=source, metrics={"writers": ["jsonl"]})) == Exit.DONE
    records = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()]
    [event] = [record for record in records if record.get("event") == "loss terms"]
    term = event["terms"]["z_loss"]
    assert event["step"] == 1 and term["weight"] == 0.1 and term["tokens"] == BATCH * LENGTH
    assert term["gradient_norm"] > 0 and term["value"] > 0
