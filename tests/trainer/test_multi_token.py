"""Multi-token prediction against a reference that goes document by document, each in a row of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from tests.trainer.model.models import random_params, with_params
from trainer.config import TrainConfig
from trainer.config.terms import eval_terms, loss_terms, model_terms
from trainer.ledger import forward_sums
from trainer.model import Transformer
from trainer.model.layers import under
from trainer.state import describe_state, initial_state, state_items
from trainer.step import _forward, make_train_step

DEPTH = 2
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 8}
MIXTURE = {"type": "moe", "experts": 4, "experts_per_token": 2, "hidden": 24}


def run_with(*overrides: str, mlp: dict[str, Any] | None = None) -> TrainConfig:
    segments = [{"repeats": 2, "pattern": [{"attention": ATTENTION, "mlp": mlp or {"hidden": 48}}]}]
    model = {**config().model.model_dump(mode="json"), "matmul_precision": "highest", "segments": segments, "multi_token": {"depth": DEPTH}}
    return config(*overrides, model=model, optimizer={"type": "sgd", "momentum": 0.0, "clip_norm": None})


def unrolled(model: Transformer, params: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> tuple[list[float], list[float], list[int]]:
    """Of each depth: summed cross-entropy, accepted tokens, tokens. Every document alone; the joint projection as one matrix."""
    summed, accepted, count = [0.0] * DEPTH, [0.0] * DEPTH, [0] * DEPTH

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + model.spec.final_norm.epsilon) * scale[None]

    for row in range(len(batch["inputs"])):
        for document in range(1, batch["segments"][row].max() + 1):
            places = np.flatnonzero(batch["segments"][row] == document)
            length = len(places)
            tokens, targets, weights = (batch[name][row, places] for name in ("inputs", "targets", "weights"))
            positions, segments = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
            hidden = model.hidden(jnp.asarray(tokens)[None], positions, segments)[0]
            own = np.argmax(model.logits(hidden[None], segments)[0], axis=-1)
            for k in range(1, DEPTH + 1):
                module = under(params, f"multi_token/{k - 1}")
                embedded = params["embed/table"][np.append(tokens[k:], [0] * min(k, length))]
                joint = jnp.concatenate([norm(hidden, module["hidden_norm/scale"]), norm(embedded, module["token_norm/scale"])], axis=-1)
                x = joint @ jnp.concatenate([module["from_hidden"], module["from_token"]])
                x, _ = model.multi_token[k - 1].block(x[None], model.context(positions, segments))
                hidden = norm(x[0], module["final_norm/scale"])
                logits = np.asarray(model.logits(hidden[None], segments)[0], np.float64)
                for t in range(length - k):
                    if weights[t + k] > 0:
                        summed[k - 1] += np.log(np.exp(logits[t]).sum()) - logits[t, targets[t + k]]
                        accepted[k - 1] += np.argmax(logits[t]) == own[t + k]
                        count[k - 1] += 1
    return summed, accepted, count


def test_terms_and_acceptance_equal_an_unrolled_reference_and_every_part_gets_a_gradient() -> None:
    run = run_with("model.layers=unroll")
    params, batch = random_params(run.model), ragged_batch(4, batch=3, length=8)
    with jax.default_matmul_precision("highest"):
        summed, accepted, count = unrolled(with_params(run.model, params), params, batch)
    terms = eval_terms(run)

    def value(params: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        sums = forward_sums(run, _forward(run, with_params(run.model, params), batch, terms), batch, terms)
        return sums.terms["multi_token_1"] + sums.terms["multi_token_2"], sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    for k in range(1, DEPTH + 1):
        np.testing.assert_allclose(sums.terms[f"multi_token_{k}"], summed[k - 1], rtol=1e-6)
        assert float(sums.counts[f"depth_{k}"]) == count[k - 1] > 0
        assert float(sums.terms[f"accepted_{k}"]) == accepted[k - 1]
    for path, gradient in gradients.items():
        assert np.linalg.norm(gradient) > 0, path


@pytest.mark.full
@pytest.mark.parametrize(
    "form",
    [
        ("batch.accumulation=2", "mesh.ici.fsdp=4", "mesh.ici.tensor=2"),
        ("model.layers=unroll", "model.remat=none", "batch.accumulation=8", "mesh.ici.fsdp=1"),
    ],
    ids=["scanned, accumulation 2, fsdp 4, tensor 2", "unrolled, accumulation 8"],
)
def test_in_a_step_the_terms_are_those_of_a_whole_forward_pass_and_move_the_modules(form: tuple[str, ...]) -> None:
    run = run_with(*form)
    where = layout(run, 8 if "mesh.ici.fsdp=4" in form else 1)
    spec = describe_state(run, where)
    state, batch = initial_state(run, spec), ragged_batch(4)
    before = {path: np.asarray(value) for path, value in state_items(state)["params"].items()}
    terms = model_terms(run)
    held = {path: jnp.asarray(value) for path, value in before.items()}
    wanted = jax.jit(lambda held: forward_sums(run, _forward(run, with_params(run.model, held), batch, terms), batch, terms))(held)
    state, metrics = make_train_step(run, spec, where)(state, put(batch, where))
    loss = float(metrics["cross_entropy"])
    for k in range(1, DEPTH + 1):
        value = wanted.terms[f"multi_token_{k}"] / wanted.counts[f"depth_{k}"]  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(metrics[f"multi_token_{k}"], value, rtol=1e-6)
        loss += run.loss.multi_token_weight / DEPTH * float(metrics[f"multi_token_{k}"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    after = state_items(state)["params"]
    assert [path for path in before if "multi_token" in path and np.array_equal(before[path], after[path])] == []


@pytest.mark.full
def test_a_module_with_a_mixture_of_experts_balances_it_too() -> None:
    run = run_with("loss.load_balance_weight=0.1", mlp={**MIXTURE, "router": {"bias_balancing": {}}})
    where = layout(run, 1)
    spec = describe_state(run, where)
    state, metrics = make_train_step(run, spec, where)(initial_state(run, spec), put(ragged_batch(4), where))
    for k in range(DEPTH):
        load = np.asarray(metrics[f"expert_load/multi_token/{k}"])
        balance = np.asarray(state_items(state)["params"][f"multi_token/{k}/block/mlp/router/balance"])
        np.testing.assert_allclose(balance, 0.001 * np.sign(1 - load[0]), atol=1e-9)


def test_the_terms_are_declared_with_the_model() -> None:
    run = run_with("loss.multi_token_weight=0.3")
    assert [(term.name, term.weight, term.counts) for term in loss_terms(run)] == [
        ("multi_token_1", 0.15, "depth_1"),
        ("multi_token_2", 0.15, "depth_2"),
    ]
