"""CPU-seconds of a train step, trainer and floor in turn, and what XLA says of the two programs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.bench.measure import Row, child_json

ROUNDS = 5
STEPS_A_TURN = 3
PEER = {1: 2.20, 8: 3.67}
LIMIT = {1: 0.80, 8: 0.87}


def rows(devices: int) -> list[Row]:
    """Measure in a process of its own: the number of devices is fixed when JAX starts."""
    found = child_json(["-m", "tests.bench.step", str(devices)], devices=devices)
    trainer, floor = found["trainer"], found["floor"]
    name = f"step, {devices} device{'s' * (devices > 1)}"
    limit = PEER[devices] * LIMIT[devices]
    cpu = f"{min(trainer['cpu']):.2f}-{max(trainer['cpu']):.2f}"
    return [
        Row(name, "CPU-s", median(trainer["cpu"]), limit, f"range {cpu}; floor {median(floor['cpu']):.2f}"),
        Row(f"{name}: trainer / floor, CPU-s", "ratio", median(found["ratios"]), 1.05, "median over neighbouring turns"),
        Row(f"{name}: trainer / floor, XLA flops", "ratio", trainer["flops"] / floor["flops"], 1.01, f"floor {floor['flops']:.4g}"),
        Row(f"{name}: trainer / floor, XLA bytes", "ratio", trainer["bytes"] / floor["bytes"], 1.01, f"floor {floor['bytes']:.4g}"),
    ]


@dataclass
class Contestant:
    step: Any
    state: Any
    turns: list[float] = field(default_factory=list[float])  # CPU-seconds of one step, per turn


def measure(devices: int) -> dict[str, Any]:
    import jax

    from tests.bench import work
    from tests.bench.floor import make_floor
    from tests.bench.measure import cpu_seconds
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout
    from trainer.state import describe_state, initial_state
    from trainer.step import make_train_step

    assert jax.device_count() == devices, f"{jax.device_count()} devices, not {devices}"
    config = work.config(devices)
    layout = Layout(build_mesh(config.mesh, jax.devices(), slices=1))
    batch = {name: jax.device_put(rows, layout.sharding(("batch", "length"), rows.shape)) for name, rows in work.batch(devices).items()}
    spec = describe_state(config, layout)
    floor, floor_state = make_floor(config, layout.mesh)
    made = {"trainer": (make_train_step(config, spec, layout), initial_state(config, spec)), "floor": (floor, floor_state)}
    found: dict[str, Any] = {}
    contestants: dict[str, Contestant] = {}
    for name, (step, state) in made.items():
        compiled = step.lower(state, batch).compile()
        cost = compiled.cost_analysis()
        found[name] = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
        state, _ = compiled(state, batch)
        contestants[name] = Contestant(compiled, jax.block_until_ready(state))
    for turn in range(ROUNDS):
        for contestant in list(contestants.values())[:: 1 if turn % 2 else -1]:
            begin = cpu_seconds()
            for _ in range(STEPS_A_TURN):
                contestant.state, _ = contestant.step(contestant.state, batch)
            jax.block_until_ready(contestant.state)
            contestant.turns.append((cpu_seconds() - begin) / STEPS_A_TURN)
    for name, contestant in contestants.items():
        found[name]["cpu"] = contestant.turns
    found["ratios"] = [a / b for a, b in zip(contestants["trainer"].turns, contestants["floor"].turns, strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
