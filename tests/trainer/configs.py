"""Small configs and batches the trainer's tests share."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from trainer.config import TrainConfig, apply_overrides, validate
from trainer.parallel.sharding import Layout

BATCH, LENGTH, VOCABULARY = 8, 16, 64


def config(*overrides: str, run_directory: str = "unused", **changes: Any) -> TrainConfig:
    """Two tiny layers in float32 at highest precision; `overrides` as with `--set`."""
    document: dict[str, Any] = {
        "run_directory": run_directory,
        "steps": 20,
        "model": {
            "vocab_size": VOCABULARY,
            "width": 32,
            "compute_dtype": "float32",
            "initializer_stddev": 0.1,
            "segments": [{"repeats": 2, "pattern": [{"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 48}}]}],
        },
        "batch": {"global_batch": BATCH, "sequence_length": LENGTH},
        "schedule": {"type": "cosine", "learning_rate": 3e-3, "warmup_steps": 2},
        "data": {"sources": [{"type": "synthetic"}]},
        **changes,
    }
    return validate(TrainConfig, apply_overrides(document, overrides))


def layout(config: TrainConfig, devices: int = 8, slices: int = 1) -> Layout:
    return Layout.of(config, jax.devices()[:devices], slices=slices)


def ragged_batch(seed: int, *, batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> dict[str, np.ndarray]:
    """Two documents in most rows, padding of random length, one row of nothing but padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocabulary, (batch, length + 1), dtype=np.int32)
    segments = np.zeros((batch, length), np.int32)
    positions = np.zeros((batch, length), np.int32)
    weights = np.zeros((batch, length), np.float32)
    for row in range(batch - 1):
        end = int(random.integers(length // 2, length + 1))
        border = int(random.integers(1, end))
        segments[row, :border], segments[row, border:end] = 1, 2
        positions[row, :end] = [*range(border), *range(end - border)]
        weights[row, :end] = 1
        weights[row, border - 1] = 0
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": segments, "weights": weights}


def put(batch: dict[str, np.ndarray], layout: Layout) -> dict[str, jax.Array]:
    return {name: jax.device_put(rows, layout.sharding(("batch", "length"), rows.shape)) for name, rows in batch.items()}


MIXTURE: dict[str, Any] = {"type": "moe", "experts": 4, "experts_per_token": 2, "hidden": 24}


def mixture(*overrides: str, pattern: str = "dense+sparse", mlp: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """A model with mixtures of experts: a dense layer, then (`dense+sparse`: every second) layers with one."""
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    plain, mixed = ({"attention": attention, "mlp": mlp} for mlp in ({"hidden": 48}, {**MIXTURE, **(mlp or {})}))
    segments = [
        {"repeats": 1, "pattern": [plain]},
        {"repeats": 2, "pattern": [plain, mixed] if pattern == "dense+sparse" else [mixed]},
    ]
    model = {**config().model.model_dump(mode="json"), "segments": segments, "matmul_precision": "highest"}
    return config(*overrides, model=model, **changes)
