"""What is promised of every answer, for every family: prompts of any length, alone or beside others, in any slot."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from tests.trainer.decode.test_greedy import engine_of
from tests.trainer.model.models import ORACLE, mean_loss, one_document
from trainer.config.mesh import AxisDegrees
from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling
from trainer.decode.serve import Request, serve

FAMILIES = [folder.name for folder in sorted(ORACLE.iterdir()) if (folder / "trajectory.npz").exists()]
LENGTHS = (1, 5, 16, 17, 30)
"""Of prompts: one token, less than the windows of the oracles (5 to 7) and more, both ends of a bucket, two buckets."""
NEW, MAX_LENGTH = 12, 42


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    for piece in serve(engine, requests):
        assert piece.token is not None
        found[piece.request].append(piece.token)
    return found


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_any_length_leave_the_logits_of_a_whole_pass_and_answers_depend_on_nothing_beside_them(family: str) -> None:
    first, params, _ = engine_of(family, AxisDegrees())
    model, layout = first.model, first.layout
    engine = Engine(model, params, layout, slots=3, max_length=MAX_LENGTH)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, model.vocab_size, length).tolist() for length in LENGTHS]
    requests = [Request(prompt, NEW, Sampling(0.8 * (number % 2), 9, 0.95, seed=number)) for number, prompt in enumerate(prompts)]

    together = answers(engine, requests)  # more than there are slots
    assert answers(engine, requests[::-1])[::-1] == together
    assert [answers(engine, [request])[0] for request in requests] == together
    assert (engine._prefill._cache_size(), engine._generate._cache_size(), engine._insert._cache_size()) == (2, 1, 1)  # pyright: ignore[reportAttributeAccessIssue]

    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, together, strict=True)]
    length = max(map(len, texts))
    batches = [one_document(np.array([text]), rows=1, length=length) for text in texts]
    batch = {name: np.concatenate([part[name] for part in batches]) for name in batches[0]}
    whole = jax.jit(lambda params, batch: mean_loss(model, params, batch)[1])
    compiled = whole.lower(params, batch).compile({"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True})
    wanted = np.asarray(compiled(params, batch))
    for number, request in enumerate(requests):
        slot = number % engine.slots
        prefix = engine.prefill(request.prompt, max_tokens=NEW, sampling=request.sampling)
        slots, found = engine.insert(engine.empty(), prefix, slot), [np.asarray(prefix.logits[0])]
        for _ in range(NEW - 1):
            slots, step = engine.generate(slots)
            found.append(np.asarray(step.logits[slot]))
        last = len(request.prompt) - 1
        np.testing.assert_allclose(found, wanted[number, last : last + NEW], rtol=1e-5, atol=1e-5, err_msg=f"prompt {number}")
