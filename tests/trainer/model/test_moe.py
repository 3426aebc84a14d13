"""A mixture of experts against a float64 oracle that goes token by token: values, gradients, what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.model.models import BLOCK, random_params, small
from tests.trainer.model.moe_oracle import Mixed, mixture
from trainer.config.model import Moe
from trainer.model.moe import MixtureOfExperts

B, T, D = 2, 7, 16
MIX: dict[str, Any] = {"type": "moe", "experts": 8, "experts_per_token": 2, "hidden": 12}
FORMS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "plain softmax": {"router": {"normalize": False}},
    "gpt-oss": {"router": {"scoring": "softmax_of_chosen", "bias": True}, "bias": True, "clamp": {"limit": 1.0}},
    "deepseek": {
        "experts_per_token": 3,
        "router": {"scoring": "sigmoid", "scale": 2.5, "groups": {"count": 4, "chosen": 2}, "bias_balancing": {}},
        "shared_hidden": 20,
    },
    "one expert of a token": {"experts_per_token": 1, "router": {"scoring": "sigmoid", "normalize": False}},
}
COTANGENT = np.random.default_rng(7).normal(size=(B, T, D))


def spec_of(**fields: Any) -> Moe:
    return Moe.model_validate({**MIX, **fields})


def params_of(spec: Moe, seed: int = 0) -> dict[str, np.ndarray]:
    """By their paths below `mlp/`; no token goes to expert 3."""
    model = small(pattern=({**BLOCK, "mlp": spec.model_dump()},), repeats=1, layers="unroll")
    found = random_params(model, seed)
    params = {path.partition("/mlp/")[2]: np.asarray(value, np.float64) for path, value in found.items() if "/mlp/" in path}
    if "router/balance" in params:
        params["router/balance"] = params["router/balance"] * 0.1
        params["router/balance"][3] = -9.0
    else:
        params["router/bias"] = params.get("router/bias", np.zeros(spec.experts)) - 30.0 * (np.arange(spec.experts) == 3)
    return params


def tokens(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Rows of D numbers and which of them are not padding: most of the first sequence, a part of the second."""
    valid = np.ones((B, T), bool)
    valid[0, -1] = valid[1, 4:] = False
    return np.random.default_rng(seed).normal(size=(B, T, D)), valid


def mixed(x: jax.Array, valid: np.ndarray, params: dict[str, jax.Array], spec: Moe) -> tuple[jax.Array, dict[str, Any]]:
    module = MixtureOfExperts(spec, {path: nnx.Param(value) for path, value in params.items()})
    with jax.default_matmul_precision("highest"):
        return module(x, jnp.asarray(valid))


def scalar_of(y: Any, load_balance: Any, z_loss: Any, valid: np.ndarray) -> Any:
    """Something that depends on every result: what is differentiated."""
    return (y * np.where(valid[..., None], COTANGENT, 0)).sum() + 0.3 * load_balance + 0.2 * z_loss


def slope_of(wanted: Callable[[dict[str, np.ndarray]], float], params: dict[str, np.ndarray], name: str, way: np.ndarray) -> float:
    """The derivative along `way` by central differences: in float64 right to nine digits."""
    step = 1e-5
    ahead, behind = ({**params, name: params[name] + sign * step * way} for sign in (1, -1))
    return (wanted(ahead) - wanted(behind)) / (2 * step)


@pytest.mark.parametrize("form", FORMS)
def test_dense_and_sparse_give_the_oracles_values_and_gradients_with_ragged_loads_and_an_idle_expert(form: str) -> None:
    spec = spec_of(**FORMS[form])
    params, (x, valid) = params_of(spec), tokens()
    oracle = mixture(x, valid, params, spec)
    assert oracle.load[3] == 0
    assert len(set(oracle.load)) > 2

    def wanted(arrays: dict[str, np.ndarray]) -> float:
        found = mixture(arrays["x"], valid, arrays, spec)
        return scalar_of(found.y, found.load_balance, found.router_z_loss, valid)

    arrays = {"x": x, **params}
    narrow = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}

    def ours(arrays: dict[str, jax.Array], spec: Moe) -> tuple[jax.Array, Any]:
        y, sums = mixed(arrays["x"], valid, {name: arrays[name] for name in params}, spec)
        return scalar_of(y, sums["load_balance"], sums["router_z_loss"], valid), (y, sums)

    both = [spec.model_copy(update={"dispatch": form}) for form in (DENSE, DROPLESS)]
    found = jax.jit(lambda arrays: [jax.value_and_grad(ours, has_aux=True)(arrays, spec) for spec in both])(narrow)
    random = np.random.default_rng(11)
    ways = {name: random.normal(size=value.shape) for name, value in arrays.items()}
    slopes = {name: slope_of(wanted, arrays, name, way) for name, way in ways.items()}
    for (_, (y, sums)), gradients in found:
        np.testing.assert_allclose(np.asarray(y)[valid], oracle.y[valid], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sums["load_balance"], oracle.load_balance, rtol=1e-5)
        np.testing.assert_allclose(sums["router_z_loss"], oracle.router_z_loss, rtol=1e-5)
        np.testing.assert_array_equal(sums["load"], oracle.load)
        assert float(sums["dropped"]) == 0
        assert not np.any(np.asarray(gradients["x"])[~valid])
        for name, way in ways.items():
            gradient = np.asarray(gradients[name], np.float64)
            if name == "router/balance":
                assert not np.any(gradient)
                continue
            size = np.linalg.norm(gradient) * np.linalg.norm(way)
            assert abs(np.sum(gradient * way) - slopes[name]) < 1e-5 * max(size, 1e-3), name
            if name.startswith("experts/"):
                assert not np.any(gradient[3]), name
                assert np.all(np.any(gradient.reshape(spec.experts, -1), axis=1) == (oracle.load > 0)), name


def dispatch(**fields: Any) -> Any:
    return spec_of(dispatch=fields).dispatch


DENSE, DROPLESS = dispatch(type="dense"), dispatch(type="dropless")


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_with_capacity_exactly_the_oracles_choices_are_dropped_sequence_by_sequence(factor: float) -> None:
    spec = spec_of(experts=4, router={"normalize": False}, dispatch={"type": "capacity", "factor": factor})
    params, (x, valid) = params_of(spec), tokens()
    oracle = mixture(x, valid, params, spec, factor=factor)
    narrow = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    y, sums = mixed(jnp.asarray(x, jnp.float32), valid, narrow, spec)
    np.testing.assert_allclose(np.asarray(y)[valid], oracle.y[valid], rtol=1e-5, atol=1e-5)
    assert float(sums["dropped"]) == len(oracle.dropped) > 0
    np.testing.assert_array_equal(sums["load"], oracle.load)
    for b in range(B):  # a sequence alone: the others take no room from it
        alone, _ = mixed(jnp.asarray(x[b : b + 1], jnp.float32), valid[b : b + 1], narrow, spec)
        np.testing.assert_array_equal(np.asarray(alone)[0][valid[b]], np.asarray(y)[b][valid[b]])


def test_with_room_for_every_choice_capacity_is_dropless() -> None:
    spec = spec_of(dispatch={"type": "capacity", "factor": 8.0})
    params, (x, valid) = params_of(spec), tokens()
    oracle: Mixed = mixture(x, valid, params, spec)
    y, sums = mixed(jnp.asarray(x, jnp.float32), valid, {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}, spec)
    np.testing.assert_allclose(np.asarray(y)[valid], oracle.y[valid], rtol=1e-5, atol=1e-5)
    assert float(sums["dropped"]) == 0
