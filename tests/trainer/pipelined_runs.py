"""One step of a run whose layers are pipelined, in the terms of a run whose layers are not: what their tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tests.trainer.configs import layout, put
from trainer.config import TrainConfig
from trainer.config.weights import stacked_path
from trainer.state import describe_state, initial_state, state_items
from trainer.step import make_train_step

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """Of the first step of a run."""

    initial: Arrays  # parameters before it, every weight's repeats stacked
    metrics: dict[str, Any]
    gradients: Arrays
    after: Arrays  # parameters after it


def one_step(run: TrainConfig, *, devices: int = 8, slices: int = 1, batch: dict[str, np.ndarray]) -> Step:
    """`run.optimizer` is SGD with momentum and without clipping: after one step its momentum is the gradient."""
    where = layout(run, devices, slices)
    spec = describe_state(run, where)
    state = initial_state(run, spec)
    initial = by_weight(state_items(state)["params"])
    after, metrics = make_train_step(run, spec, where)(state, put(batch, where))
    items = state_items(after)
    moments = {path.removeprefix("mu/"): value for path, value in items["opt"].items() if path.startswith("mu/")}
    return Step(initial, jax.tree.map(np.asarray, metrics), by_weight(moments), by_weight(items["params"]))


def by_weight(values: dict[str, jax.Array]) -> Arrays:
    """Every weight's repeats stacked, in order, whatever form they were in."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path, array in values.items():
        value, place = np.asarray(array), path.split("/")[3:5] if path.startswith("segments/") else []
        digits = [int(part) for part in place if part.isdigit()]
        if "pipeline" in place:
            parts.setdefault(stacked_path(path), []).append((-1, value.reshape(-1, *value.shape[3:])))
        else:
            parts.setdefault(stacked_path(path), []).append((digits[0], value[None]) if digits else (0, value))
    return {
        path: np.concatenate([value for _, value in sorted(found, key=lambda part: part[0])]) if len(found) > 1 else found[0][1]
        for path, found in parts.items()
    }


def assert_same_step(found: Step, wanted: Step) -> None:
    """First parameters bitwise, metrics at 1e-6, every gradient at 1e-5 of its norm."""
    for name in ("initial", "metrics", "gradients", "after"):
        assert getattr(found, name).keys() == getattr(wanted, name).keys()
    for path, value in wanted.initial.items():
        np.testing.assert_array_equal(found.initial[path], value, err_msg=path)
    for name, value in wanted.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5 if name == "gradient_norm" else 1e-6, err_msg=name)
    for path, gradient in wanted.gradients.items():
        assert np.linalg.norm(gradient) > 0, path
        assert np.linalg.norm(found.gradients[path] - gradient) <= 1e-5 * np.linalg.norm(gradient), path
