"""CPU-seconds from process start to the first finished step, and what importing the trainer costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.bench import work
from tests.bench.measure import Row, child_json, environment

RUNS = 3
IMPORTS = "import sys, time, json, trainer.run; print(json.dumps({'cpu': time.process_time(), 'modules': len(sys.modules)}))"


def rows() -> list[Row]:
    imports = [child_json(["-c", IMPORTS]) for _ in range(RUNS)]
    cold, warm = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for run in range(RUNS):
            cache = str(Path(folder, f"cache-{run}"))
            cold.append(first_step(Path(folder, f"cold-{run}"), cache))
            warm.append(first_step(Path(folder, f"warm-{run}"), cache))
    modules = max(found["modules"] for found in imports)
    return [
        Row("imports of the trainer", "CPU-s", median(found["cpu"] for found in imports), 5.5),
        Row("modules imported", "count", modules, 2700),
        Row("start to first step, nothing cached", "CPU-s", median(cold), 18, spread(cold)),
        Row("start to first step, compile cache warm", "CPU-s", median(warm), 10, spread(warm)),
    ]


def first_step(directory: Path, cache: str) -> float:
    """Run the trainer for two steps of the work; CPU-seconds of its process when step 0 was done, compilation and all."""
    directory.mkdir()
    config = directory / "config.json"
    config.write_text(
        json.dumps(work.document(str(directory), 1, steps=2, schedule={"type": "constant", "learning_rate": 1e-5}, compile_cache=cache))
    )
    command = [sys.executable, "-m", "trainer", "--config", str(config)]
    subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True)
    lines = [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return next(line["first_step_cpu_seconds"] for line in lines if "first_step_cpu_seconds" in line)


def spread(values: list[float]) -> str:
    return f"range {min(values):.1f}-{max(values):.1f}"
