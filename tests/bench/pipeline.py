"""CPU-seconds of the reference pipeline's train step and of its trace, beside the same layers without a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.measure import Row, child_json

SPEC = Path(__file__).parents[2] / "k8s" / "examples" / "pipeline-cpu.job.yaml"
DEVICES = 8
ROUNDS = 5
STEPS_A_TURN = 3
PEER = 2.66
LIMIT = 0.85
TRACE_LIMIT = 3.0


def rows() -> list[Row]:
    """Measure in a process of its own: the number of devices is fixed when JAX starts."""
    found = child_json(["-m", "tests.bench.pipeline"], devices=DEVICES)
    pipelined, plain = found["pipelined"], found["plain"]
    cpu = f"range {min(pipelined['cpu']):.2f}-{max(pipelined['cpu']):.2f}; the same layers over fsdp=8 {median(plain['cpu']):.2f}"
    return [
        Row("pipeline: trace of the step", "CPU-s", pipelined["trace"], TRACE_LIMIT, f"the same layers over fsdp=8 {plain['trace']:.2f}"),
        Row("pipeline: step, 8 devices", "CPU-s", median(pipelined["cpu"]), PEER * LIMIT, cpu),
    ]


def measure() -> dict[str, Any]:
    import jax
    import numpy as np

    from launcher.checks import load
    from tests.bench.measure import cpu_seconds
    from trainer.config.mesh import Mesh
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout
    from trainer.state import describe_state, initial_state
    from trainer.step import make_train_step

    pipelined = load(SPEC, target="local").train
    configs = {"pipelined": pipelined, "plain": pipelined.model_copy(update={"pipeline": None, "mesh": Mesh()})}
    B, T, V = pipelined.batch.global_batch, pipelined.batch.sequence_length, pipelined.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
    rows = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "segments": np.ones((B, T), np.int32),
        "weights": np.ones((B, T), np.float32),
    }
    found: dict[str, Any] = {}
    running: dict[str, Any] = {}
    for name, config in configs.items():
        layout = Layout(build_mesh(config.mesh, jax.devices(), slices=1))
        spec = describe_state(config, layout)
        batch = {key: jax.device_put(value, layout.sharding(("batch", "length"), value.shape)) for key, value in rows.items()}
        begin = cpu_seconds()
        traced = make_train_step(config, spec, layout).trace(spec.abstract, batch)  # pyright: ignore[reportFunctionMemberAccess]
        found[name] = {"trace": cpu_seconds() - begin, "cpu": []}
        step = traced.lower().compile()
        state, _ = step(initial_state(config, spec), batch)
        running[name] = step, jax.block_until_ready(state), batch
    for turn in range(ROUNDS):
        for name in list(running)[:: 1 if turn % 2 else -1]:
            step, state, batch = running[name]
            begin = cpu_seconds()
            for _ in range(STEPS_A_TURN):
                state, _ = step(state, batch)
            running[name] = step, jax.block_until_ready(state), batch
            found[name]["cpu"].append((cpu_seconds() - begin) / STEPS_A_TURN)
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
