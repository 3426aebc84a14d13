"""`nnxlaunch generate` on a run: streamed or as JSON, with the average of its parameters and with drafts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.configs import config
from trainer.contract import Exit
from trainer.run import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one step that keeps an average and has a module of multi-token prediction."""
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    small = config(
        "mesh.ici.fsdp=8",
        run_directory=str(tmp_path_factory.mktemp("generate") / "run"),
        steps=1,
        schedule={"type": "constant", "learning_rate": 1e-3},
        ema={"decay": 0.9},
        model={
            "vocab_size": 264,
            "width": 32,
            "compute_dtype": "float32",
            "segments": [{"repeats": 2, "pattern": [{"attention": attention, "mlp": {"hidden": 48}}]}],
            "multi_token": {"depth": 1},
        },
        metrics={"writers": []},
    )
    assert run(small) == Exit.DONE
    return small.run_directory


def generate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "generate", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_is_continued_and_says_what_it_read_and_how_many_drafts_were_right(trained: str) -> None:
    words = ("--tokenizer", "bytes", "--max-tokens", "5", "--output", "json", "--weights", "ema", "--draft")
    made = generate(trained, *words, "--prompt", "ab", "--prompt", "a longer one")
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert sorted(line["prompt"] for line in lines) == [0, 1]
    assert all(line["finish"] in ("length", "stop") and len(line["tokens"]) <= 5 for line in lines)
    first, *_, last = made.stderr.splitlines()
    assert first.startswith(f"step 1 of {trained}, averaged: ") and last.startswith("drafts: ") and last.endswith("%)")


def test_wrong_use_is_a_sentence(tmp_path: Path) -> None:
    nothing = generate(str(tmp_path), "--prompt", "a")
    assert nothing.returncode == Exit.CONFIG
    assert "holds no committed step" in nothing.stderr and "Traceback" not in nothing.stderr
