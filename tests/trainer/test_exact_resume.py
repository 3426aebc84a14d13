"""Exact resume through real processes: SIGKILL at random moments, other meshes and process counts."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.trainer.configs import config, layout
from trainer import contract
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import committed_steps
from trainer.state import describe_state, initial_state, state_items

ROOT = Path(__file__).parents[2]
STEPS = 60
RECORDED = "tests.trainer.recorded_program"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def document(directory: Path, cache: str, **changes: Any) -> Path:
    """A config file of 60 steps on real text."""
    run = config(
        run_directory=str(directory),
        steps=STEPS,
        checkpoint={"every_steps": 7},
        metrics={"writers": ["jsonl"]},
        compile_cache=f"{cache}/compiled",
        data={"sources": [{"type": "python_standard_library", "max_bytes": 200_000}], "cache_directory": cache},
        **changes,
    )
    content = run.model_dump(mode="json")
    content["model"]["vocab_size"] = 260
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Processes:
    """The trainer's processes of one attempt, each with its parent, and a record of the rows they are given."""

    def __init__(
        self,
        path: Path,
        *,
        processes: int,
        devices: int,
        attempt: int = 0,
        slices: int = 1,
        program: str = "tests.trainer.recorded_program",
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children: list[subprocess.Popen[str]] = []
        flags = "--xla_backend_optimization_level=0"
        for index in range(processes):
            environment = {
                **os.environ,
                "XLA_FLAGS": flags,
                contract.DEVICES_PER_HOST: str(devices),
                contract.NUM_SLICES: str(slices),
                contract.HOSTS_PER_SLICE: str(processes // slices),
                contract.JOB_INDEX: str(index * slices // processes),
                contract.COMPLETION_INDEX: str(index % (processes // slices)),
                contract.COORDINATOR: f"127.0.0.1:{port}",
                contract.POD_IP: "127.0.0.1",
                contract.ATTEMPT: str(attempt),
            }
            command = [sys.executable, "-m", program, "--config", str(path)]
            self.children.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.communicate()

    def finish(self, seconds: float = 240) -> list[int]:
        outputs = [child.communicate(timeout=seconds)[0] for child in self.children]
        codes = [child.returncode for child in self.children]
        assert not any(code in (1, 64, 70, 77) for code in codes), "\n".join(outputs)[-3000:]
        return codes


def records(directory: Path) -> list[dict[str, Any]]:
    file = directory / "metrics" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []


def losses(directory: Path) -> dict[int, float]:
    """Loss by step; a step that was done again must have given the same."""
    found: dict[int, float] = {}
    for record in records(directory):
        if record["kind"] == "step":
            assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


def rows_given(directory: Path) -> list[tuple[int, dict[int, int]]]:
    """Number of each batch, in the order they were taken, and the row of the data at each of its positions, over attempts and processes."""
    given: list[tuple[int, dict[int, int]]] = []
    for attempt in range(len({file.name.split("-")[1] for file in directory.glob("rows-*.jsonl")})):
        batches: dict[int, dict[int, int]] = {}
        for file in sorted(directory.glob(f"rows-{attempt}-*.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            numbers = [line["n"] for line in lines]
            assert not batches or numbers == list(batches)  # the same batches in the same order on all processes
            for line in lines:
                batch = batches.setdefault(line["n"], {})
                for place, row in line["rows"].items():
                    assert int(place) not in batch
                    batch[int(place)] = row
        given += batches.items()
    return given


def final_arrays(directory: Path) -> dict[str, np.ndarray]:
    run = config("model.vocab_size=260")
    wanted = state_items(describe_state(run, layout(run)).abstract)
    restored = Checkpoints(run.checkpoint, str(directory)).restore(STEPS, wanted)
    return {f"{item}/{name}": np.asarray(value) for item, values in restored.items() for name, value in values.items()}


def wait_for_step(child: subprocess.Popen[str], directory: Path, step: int) -> None:
    """Until `step` steps are reported; looks again whenever the process has not ended within a moment."""
    while max((record["done"] for record in records(directory) if record["kind"] == "step"), default=0) < step:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.01)
            raise AssertionError(f"ended with {child.returncode} before step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    with Processes(document(directory, cache), processes=1, devices=8, attempt=0) as attempt:
        assert attempt.finish() == [0]
    return directory


def test_two_processes_make_the_first_parameters_of_one_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    run = config("mesh.ici.data=2", "mesh.ici.fsdp=4")
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with Processes(path, processes=2, devices=4, program="tests.trainer.initial_program") as running:
        assert running.finish() == [0, 0]
    expected = {
        name: np.asarray(value) for name, value in state_items(initial_state(run, describe_state(run, layout(run))))["params"].items()
    }
    parts: dict[str, np.ndarray] = {}
    for index in range(2):
        with np.load(tmp_path / f"part-{index}.npz") as file:
            parts |= file
    assert {place.partition("@")[0] for place in parts} == expected.keys()
    covered = dict.fromkeys(expected, 0)
    for place, part in parts.items():
        name, _, begins = place.partition("@")
        at = tuple(slice(int(begin), int(begin) + size) for begin, size in zip(begins.split(","), part.shape, strict=True))
        np.testing.assert_array_equal(part, expected[name][at], err_msg=place)
        covered[name] += part.size
    assert covered == {name: value.size for name, value in expected.items()}


def test_two_processes_give_the_losses_of_one_from_the_first_step_on(tmp_path: Path, cache: str, uninterrupted: Path) -> None:
    with Processes(document(tmp_path, cache), processes=2, devices=4, attempt=0) as running:
        wait_for_step(running.children[0], tmp_path, 20)
    found, expected = losses(tmp_path), losses(uninterrupted)
    np.testing.assert_allclose([found[step] for step in range(20)], [expected[step] for step in range(20)], rtol=1e-5)


def test_three_kills_at_random_moments_change_no_loss_and_no_bit(tmp_path: Path, cache: str, uninterrupted: Path) -> None:
    moments = random.Random(20).sample(range(9, STEPS // 2), 3)
    path = document(tmp_path, cache)
    for attempt, moment in enumerate(sorted(moments)):
        with Processes(path, processes=1, devices=8, attempt=attempt) as running:
            wait_for_step(running.children[0], tmp_path, moment)
            running.children[0].send_signal(signal.SIGKILL)
            assert running.children[0].wait() == -signal.SIGKILL
    with Processes(path, processes=1, devices=8, attempt=3) as running:
        assert running.finish() == [0]
    assert losses(tmp_path) == losses(uninterrupted)
    resumed, alone = final_arrays(tmp_path), final_arrays(uninterrupted)
    for name, value in alone.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_eight_devices_then_four_then_two_processes_see_the_same_rows_and_the_same_losses(
    tmp_path: Path, cache: str, uninterrupted: Path
) -> None:
    path = document(tmp_path, cache)
    with ExitStack() as stack:
        for attempt, (processes, devices, until) in enumerate([(1, 8, 20), (1, 4, 40), (2, 4, STEPS)]):
            running = stack.enter_context(Processes(path, processes=processes, devices=devices, attempt=attempt))
            if until < STEPS:
                wait_for_step(running.children[0], tmp_path, until)
                running.children[0].send_signal(signal.SIGTERM)
                assert running.finish() == [contract.Exit.PREEMPTED]
            else:
                assert running.finish() == [0, 0]
    changed, alone = losses(tmp_path), losses(uninterrupted)
    assert [record["step"] for record in records(tmp_path) if record["kind"] == "step"] == list(range(STEPS))
    given = rows_given(tmp_path)
    assert [n for n, _ in given] == list(range(STEPS)) and all(sorted(batch) == list(range(8)) for _, batch in given)
    assert given == rows_given(uninterrupted)
    np.testing.assert_allclose([changed[n] for n in range(STEPS)], [alone[n] for n in range(STEPS)], rtol=1e-5)
    assert committed_steps(str(tmp_path))[-1] == STEPS
