"""Does it learn as it should? The trainer against a plain PyTorch run of the same model, weights, data order and optimizer.

    TORCH_PYTHON=/path/to/venv/bin/python python -m tests.bench.learning [WORK_FOLDER]

The interpreter named by TORCH_PYTHON has `requirements/learning.txt` installed; the project itself needs no torch. Three runs of
1,500 steps, one after the other: trainer in float32, torch in float32, trainer in bfloat16. Writes docs/learning.json and
docs/learning.svg. A finished run in the work folder is not repeated.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import environment

ROOT = Path(__file__).parents[2]
STEPS = 1500
TOLERANCE = 0.01


def document(run_directory: Path, cache: Path, compute_dtype: str) -> dict[str, Any]:
    return {
        "run_directory": str(run_directory),
        "steps": STEPS,
        "seed": 1,
        "model": {"preset": "tiny", "compute_dtype": compute_dtype, "remat": "none"},
        "batch": {"global_batch": 2, "sequence_length": 128},
        "schedule": {"type": "cosine", "learning_rate": 1e-3, "warmup_steps": 100},
        "data": {"sources": [{"type": "python_standard_library"}], "cache_directory": str(cache), "held_out": 0.003},
        "eval": {"every_steps": STEPS, "global_batch": 16},
        "checkpoint": {"every_steps": STEPS},
        "metrics": {"writers": ["jsonl"]},
    }


def main(work: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    cache = work / "data"
    float32 = document(work / "float32", cache, "float32")
    runs = {"trainer_float32": trained(float32)}
    same_start(float32, work / "start")
    runs["torch_float32"] = torch_run(work / "start")
    runs["trainer_bfloat16"] = trained(document(work / "bfloat16", cache, "bfloat16"))
    target_bytes = int(np.load(work / "start" / "eval.npz")["bytes"])
    for run in runs.values():
        run["bits_per_byte"] = run["eval_cross_entropy"] / math.log(2) / target_bytes
    base = runs["trainer_float32"]["bits_per_byte"]
    ratios = {
        "trainer_to_torch": base / runs["torch_float32"]["bits_per_byte"],
        "bfloat16_to_float32": runs["trainer_bfloat16"]["bits_per_byte"] / base,
    }
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "config": {key: value for key, value in float32.items() if key not in ("run_directory", "data")},
        "eval_bytes": target_bytes,
        "ratios": ratios,
        "runs": runs,
    }
    path = ROOT / "docs" / "learning.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    subprocess.run([torch_python(), str(Path(__file__).with_name("learning_plot.py")), str(path)], check=True)
    for name, run in runs.items():
        print(f"{name:18} {run['bits_per_byte']:.4f} bits per byte")
    for name, ratio in ratios.items():
        print(f"{name:18} {ratio:.4f}")
    return 0 if all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()) else 1


def trained(config: dict[str, Any]) -> dict[str, Any]:
    """Run the trainer itself; losses of every tenth step and the sum over the held-out set."""
    directory = Path(config["run_directory"])
    if not any(line["kind"] == "eval" for line in told(directory)):
        directory.mkdir(exist_ok=True)
        file = directory / "config.json"
        file.write_text(json.dumps(config))
        subprocess.run([sys.executable, "-m", "trainer", "--config", str(file)], cwd=ROOT, env=environment(), check=True)
    lines = told(directory)
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}
    evaluation = next(line for line in lines if line["kind"] == "eval")
    return {
        "loss": smoothed([losses[step] for step in range(STEPS)]),
        "eval_cross_entropy": evaluation["loss"] * evaluation["tokens"],
    }


def told(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none before it began."""
    file = directory / "metrics" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def same_start(config: dict[str, Any], folder: Path) -> None:
    """What the torch run needs, as plain arrays: the initial parameters, every batch in order, the held-out rows."""
    import jax

    from trainer.config import TrainConfig, validate
    from trainer.data import open_data
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout
    from trainer.state import describe_state, initial_state, state_items

    folder.mkdir(exist_ok=True)
    checked = validate(TrainConfig, config)
    layout = Layout(build_mesh(checked.mesh, jax.devices()[:1], slices=1))
    params = state_items(initial_state(checked, describe_state(checked, layout)))["params"]
    initial: dict[str, Any] = {name: np.asarray(value) for name, value in params.items()}
    np.savez(folder / "params.npz", **initial)
    data = open_data(checked, process_index=0, process_count=1)
    train = [data.train.rows(data.train.batch_rows(n)) for n in range(STEPS)]
    np.savez(folder / "train.npz", **dict[str, Any](stacked(train)))
    assert data.eval is not None
    held_out = stacked([data.eval.rows(data.eval.batch_rows(n)) for n in range(data.eval.batches)])
    is_byte = (held_out["targets"] < 256) & (held_out["weights"] > 0)
    arrays: dict[str, Any] = {**held_out, "bytes": np.sum(is_byte)}
    np.savez(folder / "eval.npz", **arrays)
    (folder / "config.json").write_text(checked.model_dump_json())


def stacked(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def torch_run(folder: Path) -> dict[str, Any]:
    result = folder / "torch.json"
    if not result.exists():
        program = Path(__file__).with_name("learning_torch.py")
        subprocess.run([torch_python(), str(program), str(folder), str(result)], check=True)
    found = json.loads(result.read_text())
    return {**found, "loss": smoothed(found["loss"])}


def smoothed(losses: list[float], window: int = 10) -> list[float]:
    """Means over windows of steps."""
    return [round(float(mean), 4) for mean in np.array(losses).reshape(-1, window).mean(axis=1)]


def torch_python() -> str:
    return os.environ.get("TORCH_PYTHON") or sys.exit("error: set TORCH_PYTHON to a Python that has requirements/learning.txt")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="learning-"))))
