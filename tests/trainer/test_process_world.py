"""Two processes of one JAX world, each under its parent, and what a killed one does to the other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import contract

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


@pytest.fixture
def world(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The two parents, once both children are in the world."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        **os.environ,
        contract.NUM_SLICES: "2",
        contract.HOSTS_PER_SLICE: "1",
        contract.COORDINATOR: f"localhost:{port}",
        contract.POD_IP: "127.0.0.1",
        contract.COMPLETION_INDEX: "0",
    }
    parents = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.world_program", str(tmp_path)],
            cwd=ROOT, env={**shared, contract.JOB_INDEX: str(index)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not all((tmp_path / f"ready-{index}").exists() for index in range(2)):
        assert time.monotonic() < deadline and all(parent.poll() is None for parent in parents)
        time.sleep(0.05)
    yield parents
    for parent in parents:
        parent.kill()
        parent.communicate()


def test_the_survivor_of_a_killed_peer_names_it_and_exits_76_after_the_cause(world: list[subprocess.Popen[str]]) -> None:
    killed = time.monotonic()
    world[1].kill()
    _, errors = world[0].communicate(timeout=SECONDS)
    assert world[0].returncode == contract.Exit.PEER
    assert "exit code 76: task 1 stopped sending heartbeats" in errors
    assert time.monotonic() - killed > contract.SURVIVOR_WAIT_SECONDS
