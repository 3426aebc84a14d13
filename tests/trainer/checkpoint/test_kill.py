"""A process killed at any moment of a save costs that save and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gcs_emulator import Gcs, gcs  # noqa: F401  (a fixture)
from tests.trainer.checkpoint.states import abstract, differences, mesh
from trainer.checkpoint import Checkpoints
from trainer.config.run import Checkpoint


def killed(directory: str, trials: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.trainer.checkpoint.killed_saves", directory, str(trials), "7"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60 + 30 * trials)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return [json.loads(line) for line in answer.stdout.splitlines()]


def require_nothing_lost(directory: str, reports: list[dict[str, Any]]) -> None:
    committed = 0
    for report in reports:
        assert report["killed"]
        assert report["wrong"] == []
        assert (report["latest"] or 0) >= committed, "a committed step was lost"
        assert all("unfinished" in reason for reason in report["skipped"]), "a kill damaged a committed step"
        committed = max(report["committed"], report["latest"] or 0)
    checkpoints = Checkpoints(Checkpoint(), directory)
    latest = checkpoints.latest_step()
    assert latest is not None and latest >= committed > 0
    assert differences(checkpoints.restore(latest, abstract(mesh(4, 2))), latest, mesh(4, 2)) == []


def test_ten_kills_at_random_moments_lose_no_committed_step(tmp_path: Path) -> None:
    reports = killed(str(tmp_path), 10)
    assert len(reports) == 10
    require_nothing_lost(str(tmp_path), reports)
    assert any(report["skipped"] for report in reports), "no kill met a save in flight"


@pytest.mark.full
def test_two_hundred_kills_lose_no_committed_step(tmp_path: Path) -> None:
    require_nothing_lost(str(tmp_path), killed(str(tmp_path), 200))


@pytest.mark.full
def test_forty_kills_lose_no_committed_step_in_a_bucket(gcs: Gcs) -> None:  # noqa: F811
    require_nothing_lost(f"{gcs.url}/killed", killed(f"{gcs.url}/killed", 40))
