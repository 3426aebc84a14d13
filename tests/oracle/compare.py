"""How far this trainer's model is from what another framework computed from the same checkpoint (tests/oracle/README.md).

python -m tests.oracle.compare FOLDER ...: one line for each reference checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.trainer.model.models import load, mean_loss, one_document
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.config.model import Model
from trainer.config.optimizer import AdamW
from trainer.config.treatment import trained, treatments
from trainer.config.weights import weights
from trainer.optim import build_optimizer

ROWS, LENGTH = 4, 32


class Distance(NamedTuple):
    """From the reference: the largest absolute error of a logit, relative errors of the others (of a trajectory the largest)."""

    logits: float
    loss: float
    gradient_norm: float
    greedy_ids: int  # that differ
    trajectory_loss: float
    trajectory_norm: float


BARS = Distance(2e-4, 1e-5, 1e-4, 0, 1e-4, 1e-4)


class Stepped(NamedTuple):
    params: Any
    opt: Any
    loss: jax.Array
    logits: jax.Array
    gradient_norm: jax.Array


def distance(folder: Path) -> Distance:
    """Of one reference checkpoint: everything comes from one compiled step."""
    model = model_from_huggingface(json.loads((folder / "config.json").read_text()))
    model = model.model_copy(update={"compute_dtype": "float32", "matmul_precision": "highest"})
    params = load(folder, model)
    step, opt = _step(model, params)
    reference, trajectory = np.load(folder / "reference.npz"), np.load(folder / "trajectory.npz")

    ids = reference["input_ids"]
    first = step(params, opt, one_document(ids, rows=ROWS, length=LENGTH))
    logits = np.asarray(first.logits)[: ids.shape[0], : ids.shape[1]]

    expected = reference["greedy"]
    ids = expected[:, :8]
    while ids.shape[1] < expected.shape[1]:
        found = step(params, opt, one_document(ids, rows=ROWS, length=LENGTH)).logits
        following = np.argmax(found[: ids.shape[0], ids.shape[1] - 1], axis=-1)
        ids = np.concatenate([ids, following[:, None]], axis=1)

    losses, norms = [], []
    for rows, counted in zip(trajectory["ids"], trajectory["weights"], strict=True):
        batch = one_document(rows[:, :-1], rows=ROWS, length=LENGTH, targets=rows[:, 1:]) | {"weights": counted}
        after = step(params, opt, batch)
        params, opt = after.params, after.opt
        losses.append(after.loss)
        norms.append(after.gradient_norm)
    return Distance(
        logits=float(np.abs(logits - reference["logits"]).max()),
        loss=_relative(first.loss, reference["loss"]),
        gradient_norm=_relative(first.gradient_norm, reference["grad_norm"]),
        greedy_ids=int(np.sum(ids != expected)),
        trajectory_loss=_relative(losses, trajectory["loss"]),
        trajectory_norm=_relative(norms, trajectory["grad_norm"]),
    )


def _step(model: Model, params: dict[str, jax.Array]) -> tuple[Callable[..., Stepped], Any]:
    """One step of AdamW, and its first state."""
    adamw = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    treated = sorted(trained(treatments(adamw, weights(model))), key=lambda treatment: treatment.weight.path)
    tx = build_optimizer(adamw, lambda _: jnp.float32(1e-3), treated)

    def mine(params: Any) -> Any:
        return {treatment.weight.path: params[treatment.weight.path] for treatment in treated}

    @jax.jit
    def step(params: Any, opt: Any, batch: Any) -> Stepped:
        evaluate = jax.value_and_grad(lambda mine: mean_loss(model, {**params, **mine}, batch), has_aux=True)
        (loss, logits), gradients = evaluate(mine(params))
        updates, opt = tx.update(gradients, opt, mine(params))
        after = {**params, **optax.apply_updates(mine(params), updates)}
        return Stepped(after, opt, loss, logits, optax.tree.norm(gradients))

    # Of a tiny model's time XLA's passes over generated code take most.
    quick = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
    opt = tx.init(mine(params))
    compiled = step.lower(params, opt, one_document(np.zeros((1, 2), np.int32), rows=ROWS, length=LENGTH)).compile(quick)
    return compiled, opt


def _relative(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected) / np.abs(expected)))


if __name__ == "__main__":
    print(f"{'':32}" + "".join(f"{name:>17}" for name in Distance._fields))
    for argument in sys.argv[1:]:
        found = distance(Path(argument))
        marks = (f"{value:.1e}" + ("" if value <= bar else " FAIL") for value, bar in zip(found, BARS, strict=True))
        print(f"{Path(argument).name:32}" + "".join(f"{mark:>17}" for mark in marks), flush=True)
