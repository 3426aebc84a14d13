"""Drafts of the modules of multi-token prediction change the number of steps and no token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.model.models import BLOCK, random_params, small, with_params
from trainer.config.mesh import AxisDegrees, Mesh
from trainer.config.model import Model
from trainer.decode import DraftingEngine, Drafts, Engine, Piece, Request, Sampling, serve
from trainer.model import Transformer
from trainer.parallel.mesh import build_mesh
from trainer.parallel.sharding import Layout

LENGTH = 40
WINDOWED = {**BLOCK, "attention": {**BLOCK["attention"], "window": 5}}
LATENT = {
    "type": "latent", "heads": 4, "query_rank": 8, "key_value_rank": 8, "plain_dim": 8, "rope_dim": 4, "value_dim": 8,
}  # fmt: skip
MIXED = {"attention": LATENT, "mlp": {"type": "moe", "experts": 4, "experts_per_token": 2, "hidden": 16}}


def requests() -> list[Request]:
    """More than there are slots; one fills its slot to the last entry, one ends at a stop token, some are drawn."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 6, length).tolist() for length in (1, 16, 7, 3, 15)]
    drawn = Sampling(temperature=0.7, top_k=4, seed=5)
    return [
        Request(prompts[0], LENGTH - 1),
        Request(prompts[1], 12, stop=(3,)),
        Request(prompts[2], 15, drawn),
        Request(prompts[3], 1),
        Request(prompts[4], LENGTH - 15, Sampling(temperature=1.0, top_p=0.9, seed=6)),
    ]


def answers(engine: Engine, drafts: Drafts | None = None) -> list[list[Piece]]:
    found: list[list[Piece]] = [[] for _ in requests()]
    for piece in serve(engine, requests(), drafts):
        found[piece.request].append(piece)
    return found


def one_device(**axes: int) -> Layout:
    return Layout(build_mesh(Mesh(ici=AxisDegrees(**axes)), jax.devices()[: int(np.prod([*axes.values(), 1]))], slices=1))


def assert_same_answers(model: Model, params: dict[str, jax.Array], layout: Layout) -> tuple[list[list[Piece]], DraftingEngine]:
    drafts = Drafts()
    plain, drafting = (kind(model, params, layout, slots=2, max_length=LENGTH) for kind in (Engine, DraftingEngine))
    assert isinstance(drafting, DraftingEngine)
    expected, found = answers(plain), answers(drafting, drafts)
    assert found == expected
    assert len(found[0]) == LENGTH - 1 and found[0][-1].finish == "length"
    assert 0 < drafts.accepted < drafts.proposed
    return found, drafting


def by_hand(model: Transformer, request: Request, answer: list[Piece]) -> Drafts:
    """How many drafts a request has and how many are right, by one pass of the training model over prompt and greedy answer."""
    tokens = [*request.prompt, *(piece.token for piece in answer)]
    inputs, places = jnp.asarray([tokens], jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32)[None]
    graphdef, state = nnx.split(model)

    def logits(state: nnx.State) -> list[jax.Array]:
        whole = nnx.merge(graphdef, state)
        return [whole.logits(x, jnp.ones_like(inputs)) for x in whole.run(inputs, places, jnp.ones_like(inputs)).further]

    best = [np.argmax(np.asarray(found)[0], axis=-1) for found in jax.jit(logits)(state)]  # m at i: what is thought of i + m + 2
    newest, found = len(request.prompt), Drafts()
    while newest < len(tokens) - 1:
        right = 0
        while right < len(best) and newest + right < len(tokens) - 2:  # the step makes newest + 1 + right, and there is room for another
            found.proposed += 1
            if best[right][newest - 1] != tokens[newest + right + 1]:
                break
            right += 1
        found.accepted += right
        newest += 1 + right
    return found


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(4, marks=pytest.mark.full)])
def test_greedy_and_drawn_answers_are_those_without_drafts_and_drafts_are_those_of_the_trained_modules(depth: int) -> None:
    model = small(pattern=(BLOCK, WINDOWED), repeats=1, vocab_size=6, layers="unroll", multi_token={"depth": depth})
    params = random_params(model, seed=3)
    found, engine = assert_same_answers(model, params, one_device())
    alone, request = Drafts(), requests()[0]
    assert [piece.token for piece in serve(engine, [request], alone)] == [piece.token for piece in found[0]]
    assert alone == by_hand(with_params(model, params), request, found[0])


@pytest.mark.full
@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("block", [WINDOWED, MIXED], ids=["window", "latent mixture"])
def test_they_are_so_for_latent_attention_mixtures_and_stacked_layers_over_a_mesh(block: dict[str, Any], layers: str) -> None:
    model = small(pattern=(block,), repeats=2, vocab_size=6, layers=layers, multi_token={"depth": 2})
    assert_same_answers(model, random_params(model, seed=4), one_device(tensor=2, fsdp=2))


def test_a_model_without_a_module_cannot_draft() -> None:
    model = small()
    with pytest.raises(ValueError, match="no module of multi-token prediction"):
        DraftingEngine(model, random_params(model), one_device(), slots=1, max_length=LENGTH)
