"""The model computes and trains what another framework computed and trained from the same checkpoint (tests/oracle/README.md)."""

from __future__ import annotations

import pytest

from tests.oracle.compare import BARS, distance
from tests.trainer.model.models import ORACLE

FAMILIES = sorted(folder.name for folder in ORACLE.iterdir() if (folder / "trajectory.npz").exists())
RARE = {"gemma", "gemma2", "mistral", "mixtral", "qwen2-windows"}
"""Only in the long run: each has a near relation among the others."""


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.full) if name in RARE else name for name in FAMILIES])
def test_logits_loss_gradients_greedy_ids_and_ten_steps_of_adamw_agree_with_the_reference(family: str) -> None:
    found = distance(ORACLE / family)
    over = {name: (value, bar) for name, value, bar in zip(found._fields, found, BARS, strict=True) if not value <= bar}
    assert not over
