"""Decoding with caches, slots and buckets gives the tokens another framework gave from the same checkpoint."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.trainer.model.models import ORACLE
from trainer.config.mesh import AxisDegrees, Mesh
from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling
from trainer.decode.serve import Request, serve
from trainer.decode.source import for_decoding, load, open_source
from trainer.parallel.mesh import build_mesh
from trainer.parallel.sharding import Layout

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
