"""Decoding with caches, slots and buckets gives the tokens another framework gave from the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.trainer.model.models import ORACLE, mean_loss, one_document
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
    if (folder / "trajectory.npz").exists()
]


def engine_of(family: str, mesh: AxisDegrees) -> tuple[Engine, dict[str, jax.Array], np.ndarray]:
    """An engine of two slots in float32, its parameters, and the reference's prompts with its answers."""
    source = open_source(str(ORACLE / family))
    model = for_decoding(source.model.model_copy(update={"matmul_precision": "highest"}), dtype="float32")
    layout = Layout(build_mesh(Mesh(ici=mesh), jax.devices()[: mesh.tensor * mesh.fsdp], slices=1))
    expected = np.load(ORACLE / family / "reference.npz")["greedy"]
    params = load(source, model, layout)
    return Engine(model, params, layout, slots=len(expected), max_length=expected.shape[1] + 1), params, expected


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_references_and_logits_at_every_place_those_of_a_whole_forward_pass(family: str) -> None:
    engine, params, expected = engine_of(family, AxisDegrees())
    rows, length = expected.shape
    slots, greedy = engine.empty(), Sampling()
    prefixes = [engine.prefill(row[:PROMPT].tolist(), max_tokens=length - PROMPT, sampling=greedy) for row in expected]
    for slot, prefix in enumerate(prefixes):
        slots = engine.insert(slots, prefix, slot)
    found = [[int(prefix.token[0]) for prefix in prefixes]]
    logits = [np.concatenate([prefix.logits for prefix in prefixes])]
    for _ in range(length - PROMPT - 1):
        slots, step = engine.generate(slots)
        found.append(np.asarray(step.token).tolist())
        logits.append(np.asarray(step.logits))
    np.testing.assert_array_equal(np.transpose(found), expected[:, PROMPT:])
    whole = jax.jit(lambda params, batch: mean_loss(engine.model, params, batch)[1])
    batch = one_document(expected[:, :-1], rows=rows, length=length)
    compiled = whole.lower(params, batch).compile({"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True})
    wanted = np.asarray(compiled(params, batch))[:, PROMPT - 1 : length - 1]
    np.testing.assert_allclose(np.stack(logits, axis=1), wanted, rtol=1e-5, atol=1e-5)
    assert (engine._prefill._cache_size(), engine._generate._cache_size()) == (1, 1)  # pyright: ignore[reportAttributeAccessIssue]


def test_greedy_answers_over_a_mesh_and_with_many_slots_are_those_of_the_reference() -> None:
    engine, _, expected = engine_of("llama3", AxisDegrees(tensor=2, fsdp=2))
    found: list[list[int]] = [[] for _ in expected]
    requests = (Request(row[:PROMPT].tolist(), expected.shape[1] - PROMPT) for row in expected)
    for piece in serve(engine, requests):
        assert piece.token is not None
        found[piece.request].append(piece.token)
    np.testing.assert_array_equal(found, expected[:, PROMPT:])


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

    alone, together = drawn(3), drawn(1, 2, 3)  # of three requests one waits for a slot
    assert together[2] == alone[0]
    assert len({tuple(answer) for answer in together}) == 3


def test_end_tokens_that_the_model_does_not_have_end_nothing(tmp_path: Path) -> None:
    config = json.loads((ORACLE / "llama3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 50279}))
    assert open_source(str(tmp_path)).end_tokens == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 50279, 3]}))
    source = open_source(str(tmp_path))
    assert (source.end_tokens, source.longest) == ((2, 3), config["max_position_embeddings"])
