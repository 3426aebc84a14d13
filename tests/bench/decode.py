"""Decoding: a token with caches against the naive loop, which runs the whole sequence for every token; early tokens against late ones.

python -m tests.bench.decode: one line of JSON with CPU-milliseconds of a token. The model is that of the step figures (`work.py`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

from tests.bench import work
from tests.bench.measure import Row, child_json, cpu_seconds

LENGTH, SLOTS, STEPS, ROUNDS = 512, 8, 10, 5
EARLY, LATE = 16, 448


def rows() -> list[Row]:
    measured = child_json(["-m", "tests.bench.decode"])
    early, late, naive = measured["early"], measured["late"], measured["naive"]
    shape = f"{SLOTS} sequences, {LENGTH} tokens"
    return [
        Row("decode: a token, of the naive loop's", "%", 100 * late / naive, 10, f"CPU {late:.1f} of {naive:.1f} ms; {shape}"),
        Row("decode: a late token, of an early one's", "%", 100 * late / early, 115, f"CPU {late:.1f} of {early:.1f} ms; {LATE}, {EARLY}"),
    ]


def main() -> None:
    """Rounds of early, late and naive tokens take turns, so that a busier minute meets all of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from trainer.config.mesh import Mesh
    from trainer.decode.engine import Engine
    from trainer.decode.sampling import Sampling
    from trainer.decode.source import for_decoding
    from trainer.initial import initial_keys, initial_parameters
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout, use_layout

    model = for_decoding(work.config(1).model)
    layout = Layout(build_mesh(Mesh(), jax.devices(), slices=1))
    params = initial_parameters(model, jax.tree.map(jnp.asarray, initial_keys(model, 0)))
    engine = Engine(model, params, layout, slots=SLOTS, max_length=LENGTH)
    prompt = np.random.default_rng(0).integers(0, work.VOCABULARY, LENGTH).tolist()

    def cached(position: int) -> Callable[[], None]:
        slots = engine.empty()
        for slot in range(SLOTS):
            prefix = engine.prefill(prompt[:position], max_tokens=LENGTH - position, sampling=Sampling())
            slots = engine.insert(slots, prefix, slot)

        def token() -> None:
            nonlocal slots
            slots, step = engine.generate(slots)
            step.token.block_until_ready()

        return token

    @jax.jit
    def whole(params: object, tokens_BT: jax.Array) -> jax.Array:
        with use_layout(layout):
            positions_BT = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens_BT.shape)
            return engine._merged(params)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[:, LATE].argmax(-1)  # pyright: ignore

    tokens_BT = np.tile(np.array(prompt, np.int32), (SLOTS, 1))
    forms = {"early": cached(EARLY), "late": cached(LATE), "naive": lambda: whole(engine._params, tokens_BT).block_until_ready()}
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(ROUNDS + 1):  # the first compiles
        for name, token in forms.items():
            steps = 1 if name == "naive" else STEPS
            begin = cpu_seconds()
            for _ in range(steps):
                token()
            if turn:
                spent[name].append(1000 * (cpu_seconds() - begin) / steps)
    print(json.dumps({name: statistics.median(values) for name, values in spent.items()}))


if __name__ == "__main__":
    main()
