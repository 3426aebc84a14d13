"""Every optimizer against optax, layer by layer and expert by expert; what a run adds: spikes, groups, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.trainer.configs import config as train_config
from tests.trainer.configs import layout
from trainer.config.model import Model
from trainer.config.optimizer import Adafactor, Group, Lion, Muon, Optimizer, Sgd, SkipSpikes
from trainer.config.treatment import treatments
from trainer.config.weights import Normal, Weight, weights
from trainer.optim import build_optimizer

Arrays = dict[str, jax.Array]
DENSE = {"attention": {"heads": 2, "kv_heads": 2, "head_dim": 4}, "mlp": {"hidden": 10}}
MIXTURE = {**DENSE, "mlp": {"type": "moe", "experts": 2, "experts_per_token": 1, "hidden": 6}}
SEGMENTS = [{"repeats": 2, "pattern": [DENSE]}, {"repeats": 1, "pattern": [MIXTURE]}]
MODEL = Model.model_validate({"vocab_size": 12, "width": 8, "segments": SEGMENTS})
# One of each kind, so that a program of all of them compiles fast.
KINDS = ("table", "query", "out", "0/0/mlp/down", "router/kernel", "experts/up", "0/0/mlp_norm/scale")
DECLARED = sorted((weight for weight in weights(MODEL) if weight.path.endswith(KINDS)), key=lambda weight: weight.path)
# By the last part of a path: which dims of one layer's tensor a matmul contracts, and which come out. No expert dim.
MATRICES = {"query": (0, (1, 2)), "out": ((0, 1), 2), "up": (0, 1), "down": (0, 1), "router/kernel": (0, 1)}


def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    return 0.01 * (1 + jnp.asarray(step, jnp.float32))


def singles(arrays: Mapping[str, Any]) -> Arrays:
    """One entry for every layer and expert."""
    found: Arrays = {}
    for path, array in arrays.items():
        lead = path.startswith("segments/") + ("/experts/" in path)
        for index in np.ndindex(array.shape[:lead]):
            found[f"{path}#{index}"] = array[index]
    return found


def matrix(name: str) -> optax.contrib.MuonDimensionNumbers | None:
    path = name.partition("#")[0]
    found = next((dims for suffix, dims in MATRICES.items() if path.endswith(f"/{suffix}")), None)
    return None if found is None else optax.contrib.MuonDimensionNumbers(*found)


def muon(config: Muon) -> optax.GradientTransformation:
    """optax's for matrices, its AdamW for the rest; optax's own combination gives that to NAdam."""
    matrices = optax.contrib.muon(
        schedule,
        ns_steps=config.iterations,
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: {name: matrix(name) for name in params},
        consistent_rms=config.update_rms,
    )
    rest = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays)

    def parts(arrays: Any) -> tuple[Arrays, Arrays]:
        return {name: x for name, x in arrays.items() if matrix(name)}, {name: x for name, x in arrays.items() if not matrix(name)}

    def init(params: Any) -> Any:
        return tuple(tx.init(part) for tx, part in zip((matrices, rest), parts(params), strict=True))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        whole = zip((matrices, rest), parts(updates), state, parts(params), strict=True)
        (a, first), (b, second) = (tx.update(part, own, mine) for tx, part, own, mine in whole)
        return a | b, (first, second)

    return optax.GradientTransformation(init, update)


def decays(params: Any) -> dict[str, bool]:
    return {name: matrix(name) is not None or name.startswith("embed") for name in params}


OPTAX: dict[str, tuple[Optimizer, Callable[[], optax.GradientTransformation]]] = {
    "muon": (MUON := Muon(clip_norm=None, weight_decay=0.2, iterations=3), lambda: muon(MUON)),
    "muon of its first paper": (
        PLAIN := Muon(clip_norm=None, update_rms=None, nesterov=False, momentum=0.9, iterations=2),
        lambda: muon(PLAIN),
    ),
    "sgd": (Sgd(clip_norm=None, momentum=0.8), lambda: optax.sgd(schedule, momentum=0.8)),
    "nesterov": (Sgd(clip_norm=None, nesterov=True), lambda: optax.sgd(schedule, momentum=0.9, nesterov=True)),
    "no momentum": (Sgd(clip_norm=None, momentum=0), lambda: optax.sgd(schedule)),
    "lion": (
        Lion(clip_norm=None, weight_decay=0.3),
        lambda: optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=0.3, mask=decays),
    ),
    "adafactor": (Adafactor(clip_norm=None, factored_from=4), lambda: optax.adafactor(schedule, min_dim_size_to_factor=4)),
    "adafactor, whole": (
        Adafactor(clip_norm=None, scale_by_parameter=False, clip_update_rms=None, decay_exponent=0.5),
        lambda: optax.adafactor(schedule, decay_rate=0.5, multiply_by_parameter_scale=False, clipping_threshold=None),
    ),
}


def random_arrays(seed: int, declared: list[Weight] = DECLARED) -> Arrays:
    random = np.random.default_rng(seed)
    return {weight.path: jnp.asarray(random.normal(size=weight.shape), jnp.float32) for weight in declared}


def run(tx: optax.GradientTransformation, params: Arrays, gradients: list[Arrays]) -> tuple[Arrays, Any]:
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        steps, state = update(gradient, state, params)
        params = optax.apply_updates(params, steps)  # pyright: ignore[reportAssignmentType]
    return params, state


@pytest.mark.parametrize("name", OPTAX)
def test_four_updates_of_stacked_layers_equal_those_of_optax_on_every_layer_and_expert_alone(name: str) -> None:
    config, theirs = OPTAX[name]
    params, gradients = random_arrays(0), [random_arrays(seed) for seed in range(1, 5)]
    mine, _ = run(build_optimizer(config, schedule, treatments(config, DECLARED)), params, gradients)
    single = singles(params)
    other, _ = run(theirs(), single, [singles(gradient) for gradient in gradients])
    for path, value in singles(mine).items():
        scale = float(jnp.abs(other[path] - single[path]).max())
        np.testing.assert_allclose(value, other[path], rtol=1e-5, atol=1e-5 * scale, err_msg=path)


@pytest.mark.parametrize("rank", ["full", "half"])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (8, 24), (24, 8)])
def test_the_update_of_muon_is_its_polynomial_of_the_singular_values_in_float64(inputs: int, outputs: int, rank: str) -> None:
    config = Muon(clip_norm=None, momentum=0, nesterov=False, weight_decay=0, update_rms=None)
    random = np.random.default_rng(7)
    g = random.normal(size=(inputs, outputs))
    if rank == "half":
        g = random.normal(size=(inputs, 4)) @ random.normal(size=(4, outputs))
    g = g.astype(np.float32)
    weight = Weight("matrix", g.shape, ("embed", "mlp"), Normal(1), 1)
    params = {"matrix": jnp.zeros(g.shape)}
    tx = build_optimizer(config, lambda _: -1.0, treatments(config, [weight]))
    update, _ = tx.update({"matrix": jnp.asarray(g)}, tx.init(params), params)
    u, s, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(config.iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s) @ vt * max(1, outputs / inputs) ** 0.5
    assert np.linalg.norm(update["matrix"] - expected) < {"full": 1e-5, "half": 1e-4}[rank] * np.linalg.norm(expected)


@pytest.mark.parametrize("config", [Muon(), Adafactor(factored_from=4)], ids=lambda config: config.type)
def test_an_update_of_split_tensors_equals_that_of_whole_ones(config: Optimizer) -> None:
    where = layout(train_config("mesh.ici.data=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2"))
    declared = [weight for weight in DECLARED if weight.path.endswith(("out", "up"))]
    params, gradients = random_arrays(0, declared), [random_arrays(1, declared), random_arrays(2, declared)]
    tx = build_optimizer(config, schedule, treatments(config, declared))
    whole, _ = run(tx, params, gradients)

    def spread(arrays: Arrays) -> Arrays:
        return {w.path: jax.device_put(arrays[w.path], where.sharding(w.axes, w.shape, w.path)) for w in declared}

    split, _ = run(tx, spread(params), [spread(gradient) for gradient in gradients])
    for path, value in whole.items():
        assert np.linalg.norm(split[path] - value) < 1e-5 * np.linalg.norm(value - params[path]), path


@pytest.mark.parametrize("window", [4, 9])
def test_exactly_the_raw_norms_far_above_those_in_the_window_are_skipped(window: int) -> None:
    random = np.random.default_rng(window)
    norms = np.float32(random.uniform(5, 6, 80) * np.where(random.random(80) < 0.15, random.uniform(1, 40, 80), 1))
    config = Sgd(momentum=0, clip_norm=0.1, skip_spikes=SkipSpikes(window_steps=window, deviations=3))
    params = {"scale": jnp.zeros(1)}
    tx = build_optimizer(config, lambda _: 1.0, treatments(config, [Weight("scale", (1,), ("norm",), Normal(1), 0)]))
    update, state = jax.jit(tx.update), tx.init(params)
    skipped, expected = [], []
    for n, norm in enumerate(norms):
        step, state = update({"scale": jnp.asarray([norm])}, state, params)
        skipped.append(float(step["scale"][0]) == 0)
        seen = norms[max(0, n - window) : n].astype(np.float64)
        expected.append(len(seen) >= window // 2 and norm > seen.mean() + 3 * max(seen.std(), 0.01 * seen.mean()))
    assert skipped == expected
    assert 0 < int(state["spikes"]["skipped"]) == sum(skipped)


METHODS = [Muon(moment_dtype="bfloat16"), Adafactor(factored_from=4), Lion(), Sgd()]


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.type)
def test_a_skipped_step_leaves_parameters_and_moments_as_if_it_had_not_been(config: Optimizer) -> None:
    config = config.model_copy(update={"skip_spikes": SkipSpikes(window_steps=4, deviations=4)})
    tx = build_optimizer(config, lambda _: 0.01, treatments(config, DECLARED))
    calm = [random_arrays(seed) for seed in range(1, 6)]
    spike = jax.tree.map(lambda g: 1e4 * g, calm[0])
    with_spike, state = run(tx, random_arrays(0), [*calm[:4], spike, calm[4]])
    without, other = run(tx, random_arrays(0), calm)
    assert int(state["spikes"]["skipped"]) == 1 and int(other["spikes"]["skipped"]) == 0
    assert int(state["count"]) == 6
    for name in {*state} - {"count", "spikes"}:
        jax.tree.map(np.testing.assert_array_equal, state[name], other[name])
    jax.tree.map(np.testing.assert_array_equal, with_spike, without)


def test_groups_freeze_slow_down_and_choose_decay_by_axis_or_path_and_the_first_group_wins() -> None:
    groups = (
        Group(tensors=("axis:vocab",), frozen=True),
        Group(tensors=("segments/0/*",), learning_rate_factor=0.5, weight_decay=0.25),
        Group(tensors=("segments/0/*", "*/mlp/down"), learning_rate_factor=7.0),
    )
    config = Sgd(momentum=0, clip_norm=None, weight_decay=0.1, groups=groups)
    treated = {treatment.weight.path: treatment for treatment in treatments(config, DECLARED)}
    frozen = {path for path, treatment in treated.items() if treatment.frozen}
    assert frozen == {"embed/table"}
    left = [weight for weight in DECLARED if weight.path not in frozen]
    params, gradient = random_arrays(0, left), random_arrays(1, left)
    tx = build_optimizer(config, lambda _: 0.01, [treated[weight.path] for weight in left])
    after, _ = run(tx, params, [gradient])
    for weight in left:
        first = weight.path.startswith("segments/0/")
        factor = 0.5 if first else 7.0 if weight.path.endswith("/mlp/down") else 1.0
        decay = 0.25 if first else 0.1 if weight.inputs else 0.0
        p = params[weight.path]
        np.testing.assert_allclose(after[weight.path], p - 0.01 * factor * (gradient[weight.path] + decay * p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [Muon(moment_dtype="bfloat16"), Lion(moment_dtype="bfloat16")])
def test_a_first_moment_in_bfloat16_is_the_float32_one_rounded_and_a_second_one_stays_float32(config: Muon | Lion) -> None:
    gradients = [random_arrays(1)]
    _, half = run(build_optimizer(config, schedule, treatments(config, DECLARED)), random_arrays(0), gradients)
    full_config = config.model_copy(update={"moment_dtype": "float32"})
    _, full = run(build_optimizer(full_config, schedule, treatments(full_config, DECLARED)), random_arrays(0), gradients)
    for path, moment in full["mu"].items():
        assert half["mu"][path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(half["mu"][path], moment.astype(jnp.bfloat16))
    assert all(moment.dtype == jnp.float32 for moment in half.get("nu", {}).values())
