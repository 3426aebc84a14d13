"""`nnxlaunch compile` as a user runs it: the report, the executable the trainer then runs, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from tests.trainer.configs import config, layout
from trainer.config import TrainConfig
from trainer.config.flops import train_flops
from trainer.contract import Exit
from trainer.run import run
from trainer.state import describe_state

ROOT = Path(__file__).parents[2]
CHANGES: dict[str, Any] = {
    "steps": 3,
    "data": {"sources": [{"type": "synthetic", "distinct_batches": 4}]},
    "metrics": {"writers": ["jsonl"]},
    "checkpoint": {"every_steps": 3},
}


def compile_command(folder: Path, *arguments: str, cpu: dict[str, int] | None = None, **train: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command on a job with the trainer's test model on eight devices."""
    document = config(**{**CHANGES, **train}).model_dump(mode="json")
    del document["run_directory"]
    job = {"name": "tiny", "cpu": cpu or {"devices_per_host": 8}, "directory": str(folder), "train": document}
    spec = folder / "job.yaml"
    spec.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "launcher", "compile", str(spec), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Path of a saved executable, and the report."""
    folder = tmp_path_factory.mktemp("compiled")
    path = str(folder / "step.executable")
    done = compile_command(folder, "--save", path, "--hlo", str(folder / "step.hlo"), "-o", "json")
    assert done.returncode == 0, done.stderr
    assert "ENTRY" in (folder / "step.hlo").read_text()
    return path, json.loads(done.stdout)


def train(directory: Path, *overrides: str, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of a run, and its events by what they say."""
    described: TrainConfig = config(*overrides, run_directory=str(directory), **{**CHANGES, **changes})
    assert run(described) == Exit.DONE
    lines = [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"], {line["event"]: line for line in lines if line["kind"] == "event"}


def test_the_report_holds_what_arithmetic_gives(saved: tuple[str, dict[str, Any]]) -> None:
    _, found = saved
    described = config(**CHANGES)
    spec = describe_state(described, layout(described))
    state = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(spec.abstract))
    rows = 5 * 1 * 16 * 4  # five arrays, one row of 16 tokens each
    memory = found["memory_per_device"]
    # XLA on CPU gives every argument 16 bytes at the least.
    assert state + rows <= memory["arguments"] <= state + rows + 16 * len(jax.tree.leaves(spec.abstract))
    assert memory["donated"] >= 0.9 * state
    assert found["bounds"]["flops_per_device"] == train_flops(described.model, 8, 16) / 8
    assert found["mesh"] == {"fsdp": 8} and found["fits"] is None
    assert {region["region"]: region["executions"] for region in found["collectives"]} == {
        "forward layer body": 2, "backward layer body": 2, "entry": 1,
    }  # fmt: skip


def test_the_trainer_runs_a_saved_executable_and_its_losses_are_those_of_a_run_that_compiles(
    saved: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    path, found = saved
    plain, _ = train(tmp_path / "plain")
    loaded, events = train(tmp_path / "loaded", f"compiler.executable={path}")
    assert "compiled step loaded" in events, events
    assert found["saved"]["program"] == found["program"]
    # Bitwise they could differ: tests compile without optimisation, the command with it.
    assert loaded == pytest.approx(plain, rel=1e-5)


def test_an_executable_of_another_program_is_not_run_and_the_log_says_what_changed(
    saved: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    path, _ = saved
    _, events = train(tmp_path, f"compiler.executable={path}", "model.remat=none")
    assert "model.remat" in events["compiled step not used"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "changes", "code", "words"),
    [
        (["--set", "train.compiler.options.xla_nonsense=1"], {}, 64, "compiler.options.xla_nonsense: cpu: "),
        (["--topology", "v5z-8"], {}, 64, "no TPU family is called 'v5z'"),
        (["--hlo", "nowhere/step.hlo"], {}, 66, "there is no folder nowhere"),
        (["--slices", "3", "--set", "train.mesh.dcn={data: 2}"], {}, 64, "data=2 needs 2 slices, has 3"),
    ],
    ids=["option", "topology", "folder", "mesh"],
)
def test_bad_input_is_refused_in_words(arguments: list[str], changes: dict[str, Any], code: int, words: str, tmp_path: Path) -> None:
    done = compile_command(tmp_path, *arguments, **changes)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert words in done.stderr and not done.stdout


def test_the_step_is_compiled_for_a_tpu_that_is_not_here_and_holds_the_attention_kernel(tmp_path: Path) -> None:
    program = tmp_path / "step.hlo"
    done = compile_command(tmp_path, "--topology", "v5e-4", "--set", "train.batch.sequence_length=128", "--hlo", str(program))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v5e-4, slices 1, devices 4: fsdp=4; 8 sequences of 128 a step\nmemory of a device, GB\n")
    assert "fits: 0%" in done.stdout and "all-gather" in done.stdout and "limited by" in done.stdout
    kernels = [line for line in program.read_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    # Forward, recomputed forward, gradients of queries, and of keys and values.
    assert len(kernels) == 4 and all("splash" in line for line in kernels)


@pytest.mark.full
def test_a_step_that_does_not_fit_ends_with_exit_code_1(tmp_path: Path) -> None:
    huge = {"mlp": {"hidden": 2**21}, "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}}
    done = compile_command(tmp_path, "--topology", "v5e-4", "--set", "train.model.width=2048",
                           "--set", f"train.model.segments={json.dumps([{'repeats': 4, 'pattern': [huge]}])}")  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout
