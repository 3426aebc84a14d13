"""A config and its header for the reporter, and a storage server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tests.gcs_emulator import gcs
from tests.trainer.configs import config
from trainer.config import TrainConfig
from trainer.observe import Reporter, make_header

__all__ = ["gcs"]


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NNX_PEAK_BF16_TFLOPS_PER_DEVICE", raising=False)


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(*overrides: str, run_directory: str | None = None, writers: tuple[str, ...] = ("jsonl",), **changes: Any) -> TrainConfig:
        return config(*overrides, run_directory=run_directory or str(tmp_path), metrics={"writers": list(writers)}, **changes)

    return make


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def reporter(config: TrainConfig, clock: Clock, *, primary: bool = True) -> Reporter:
    return Reporter(config, config.run_directory, make_header(config, {"data": 1, "fsdp": 8, "tensor": 1}), primary, clock=clock)


def metrics(loss: float) -> dict[str, Any]:
    """Device metrics of a step with 100 valid tokens."""
    return {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(1), "tokens": jnp.float32(100)}
