"""Fixtures of the data tests: small real files, and the smallest config that uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gcs_emulator import gcs
from trainer.config import TrainConfig, validate

__all__ = ["gcs"]

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """`configure(sources, sequence_length=16, ...)` -> a config whose cache is in tmp_path / cache."""

    def build(
        *sources: dict[str, Any],
        sequence_length: int = 16,
        global_batch: int = 4,
        vocab_size: int = 512,
        evaluate: bool = False,
        seed: int = 0,
        **data: Any,
    ) -> TrainConfig:
        document = {
            "run_directory": str(tmp_path / "run"),
            "steps": 100,
            "seed": seed,
            "model": {"preset": "tiny", "vocab_size": vocab_size},
            "batch": {"global_batch": global_batch, "sequence_length": sequence_length},
            "schedule": {"type": "constant", "learning_rate": 0.001},
            "eval": {"every_steps": 10} if evaluate else None,
            "data": {"sources": list(sources), "cache_directory": str(tmp_path / "cache"), "held_out": 0.0, **data},
        }
        return validate(TrainConfig, document)

    return build


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Thirty text files of 0 to 300 words, one of them empty, some with characters of several bytes."""
    folder = tmp_path / "corpus"
    for index in range(30):
        path = folder / f"part{index % 3}" / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(f"wörd{index}-{word}" for word in range(index * 10)))
    return folder
