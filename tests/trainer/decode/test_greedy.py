"""Decoding with caches, slots and buckets gives the tokens another framework gave from the same checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.trainer.configs import config
from tests.trainer.model.models import ORACLE
from trainer.config.mesh import AxisDegrees, Mesh
from trainer.contract import Exit
from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling
from trainer.decode.serve import Request, serve
from trainer.decode.source import for_decoding, load, open_source
from trainer.parallel.mesh import build_mesh
from trainer.parallel.sharding import Layout
from trainer.run import run

PROMPT = 8
FAMILIES = [
    pytest.param(folder.name, marks=() if folder.name in ("deepseek-v3", "gemma3", "gpt-oss", "llama3") else pytest.mark.full)
    for folder in sorted(ORACLE.iterdir())
    if (folder / "config.json").exists()
]


def answers(family: str, mesh: AxisDegrees, *, slots: int) -> tuple[list[list[int]], np.ndarray]:
    """The engine's answers to the reference's prompts, of which more are waiting than there are slots; the reference's."""
    source = open_source(str(ORACLE / family))
    model = for_decoding(source.model.model_copy(update={"matmul_precision": "highest"}), dtype="float32")
    degree = mesh.tensor * mesh.fsdp
    layout = Layout(build_mesh(Mesh(ici=mesh), jax.devices()[:degree], slices=1))
    expected = np.load(ORACLE / family / "reference.npz")["greedy"]
    length = expected.shape[1]
    engine = Engine(model, load(source, model, layout), layout, slots=slots, max_length=length + 1)
    found: list[list[int]] = [[] for _ in expected]
    for piece in serve(engine, (Request(row[:PROMPT].tolist(), length - PROMPT) for row in expected)):
        assert piece.token is not None
        found[piece.request].append(piece.token)
    return found, expected[:, PROMPT:]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_reference(family: str) -> None:
    found, expected = answers(family, AxisDegrees(), slots=1)
    np.testing.assert_array_equal(found, expected)


def test_greedy_answers_over_a_mesh_and_with_many_slots_are_those_of_the_reference() -> None:
    found, expected = answers("llama3", AxisDegrees(tensor=2, fsdp=2), slots=2)
    np.testing.assert_array_equal(found, expected)


def test_a_sampled_answer_depends_on_its_own_seed_and_prompt_alone() -> None:
    source = open_source(str(ORACLE / "llama3"))
    model = for_decoding(source.model, dtype="float32")
    layout = Layout(build_mesh(Mesh(ici=AxisDegrees()), jax.devices()[:1], slices=1))
    engine = Engine(model, load(source, model, layout), layout, slots=2, max_length=32)

    def drawn(*seeds: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in seeds]
        for piece in serve(engine, [Request([5, 7, 9], 12, Sampling(1.0, 0, 1.0, 0.0, seed=seed)) for seed in seeds]):
            assert piece.token is not None
            found[piece.request].append(piece.token)
        return found

    alone, together = drawn(3), drawn(1, 2, 3)
    assert together[2] == alone[0]
    assert len({tuple(answer) for answer in together}) == 3


def test_a_run_is_continued_from_the_command_line_and_wrong_use_is_a_sentence(tmp_path: Path) -> None:
    small = config(
        "mesh.ici.fsdp=8",
        run_directory=str(tmp_path / "run"),
        steps=1,
        schedule={"type": "constant", "learning_rate": 1e-3},
        model={
            "vocab_size": 264,
            "width": 32,
            "compute_dtype": "float32",
            "segments": [{"repeats": 2, "pattern": [{"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 48}}]}],
        },
        data={"sources": [{"type": "synthetic"}]},
        metrics={"writers": []},
    )
    assert run(small) == Exit.DONE
    words = [sys.executable, "-m", "trainer.decode", small.run_directory, "--tokenizer", "bytes", "--max-tokens", "5", "--output", "json"]
    made = subprocess.run([*words, "--prompt", "ab", "--prompt", "a longer one"], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert sorted(line["prompt"] for line in lines) == [0, 1]
    assert all(line["finish"] in ("length", "stop") and len(line["tokens"]) <= 5 for line in lines)

    nothing = subprocess.run([*words[:3], str(tmp_path), "--prompt", "a"], capture_output=True, text=True, timeout=300)
    assert nothing.returncode == Exit.CONFIG
    assert "holds no committed step" in nothing.stderr and "Traceback" not in nothing.stderr
