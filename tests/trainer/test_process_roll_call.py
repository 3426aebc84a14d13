"""Who a process is, and the roll-call before JAX starts. No JAX here."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from trainer import contract
from trainer.distributed.rank import Rank, rank_from_environment
from trainer.distributed.roll_call import resolve, roll_call
from trainer.errors import PeerLost, TrainerError, WorldError

SAME = {"jax": "0.12.0", "NNX_SPEC_HASH": "abc"}
LAUNCHED = {
    contract.NUM_SLICES: "2",
    contract.HOSTS_PER_SLICE: "4",
    contract.JOB_INDEX: "1",
    contract.COMPLETION_INDEX: "2",
    contract.COORDINATOR: "job-slice-0-0.n:8482",
    contract.ATTEMPT: "3",
    contract.POD_NAME: "job-slice-1-2-x",
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "a,b,c,d",
    "TPU_WORKER_ID": "3",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, "", 0)),
        ({contract.NUM_SLICES: "1", contract.HOSTS_PER_SLICE: "1"}, (0, 1, "", 0)),
        (LAUNCHED, (6, 8, "job-slice-0-0.n", 8482)),
        ({**LAUNCHED, **TPU}, (7, 8, "first", 8482)),
        ({**TPU, contract.JAX_COORDINATOR_PORT: "9000"}, (7, 8, "first", 9000)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, (1, 2, "a", 8482)),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, (0, 2, "a", 8482)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, (0, 1, "localhost", 8482)),
    ],
)
def test_the_environment_says_who_a_process_is(environment: dict[str, str], expected: tuple[int, int, str, int]) -> None:
    rank = rank_from_environment(environment)
    assert (rank.process_index, rank.process_count, rank.coordinator_host, rank.coordinator_port) == expected


def test_tpu_addresses_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "addresses").write_text("a:1,b:1,c:1\n")
    environment = {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "addresses"), "TPU_WORKER_ID": "2"}
    assert rank_from_environment(environment).process_index == 2
    with pytest.raises(WorldError, match="TPU_PROCESS_ADDRESSES_PATH=/nowhere"):
        rank_from_environment({"TPU_PROCESS_ADDRESSES_PATH": "/nowhere"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({contract.COORDINATOR: ""}, contract.COORDINATOR),
        ({contract.COORDINATOR: "host"}, "host:port"),
        ({contract.JOB_INDEX: "two"}, f"{contract.JOB_INDEX} is 'two'"),
        ({contract.JOB_INDEX: "2"}, "slice 2 of 2"),
        ({contract.COMPLETION_INDEX: "4"}, "worker 4 of 4"),
        ({contract.ATTEMPT: "-1"}, contract.ATTEMPT),
    ],
)
def test_a_contradiction_in_the_environment_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(WorldError, match=words) as refused:
        rank_from_environment({**LAUNCHED, **change})
    assert refused.value.exit_code == 64


def ranks(count: int) -> list[Rank]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    first = Rank(
        source="launcher", slice_index=0, slices=1, worker=0, hosts_per_slice=count, coordinator_host="localhost", coordinator_port=port,
        attempt=1, pod="pod-0",
    )  # fmt: skip
    return [replace(first, worker=worker, pod=f"pod-{worker}") for worker in range(count)]


def hold(*members: Rank, seconds: float = 20, identities: dict[str, dict[str, str]] | None = None) -> dict[str, TrainerError | None]:
    """The roll-call of all of them at once: how it ended for each pod."""
    with ThreadPoolExecutor(len(members)) as pool:
        calls: dict[str, Future[None]] = {
            rank.pod: pool.submit(roll_call, rank, (identities or {}).get(rank.pod, SAME), bind_host="127.0.0.1", timeout_seconds=seconds)
            for rank in members
        }
        errors = {pod: call.exception() for pod, call in calls.items()}
    assert all(error is None or isinstance(error, TrainerError) for error in errors.values()), errors
    return errors  # type: ignore[return-value]


def test_everyone_is_let_go_once_everyone_is_there_and_the_port_is_free_again() -> None:
    members = ranks(5)
    assert hold(*members) == {f"pod-{index}": None for index in range(5)}
    socket.create_server(("127.0.0.1", members[0].coordinator_port)).close()


def test_who_is_missing_is_named_to_those_who_came() -> None:
    zero, _, two, _ = ranks(4)
    errors = hold(zero, two, seconds=1.5)
    for error in errors.values():
        assert isinstance(error, PeerLost) and error.exit_code == 76
        assert "process 1 (slice 0, worker 1), process 3 (slice 0, worker 3) did not come" in str(error)


def test_a_duplicate_is_refused_with_both_pods_named() -> None:
    zero, one, _ = ranks(3)
    errors = hold(zero, one, replace(one, pod="pod-1-again"))
    assert all(isinstance(error, WorldError) and error.exit_code == 64 for error in errors.values())
    assert "process 1 is there twice" in str(errors["pod-0"])
    assert "pod-1" in str(errors["pod-0"]) and "pod-1-again" in str(errors["pod-0"])


def test_another_count_is_refused() -> None:
    zero, one = ranks(2)
    errors = hold(zero, replace(one, hosts_per_slice=4))
    assert {str(error) for error in errors.values()} == {"process 1 (pod pod-1) counts 4 processes, process 0 counts 2"}


def test_another_version_or_spec_is_refused_by_name() -> None:
    members = ranks(2)
    errors = hold(*members, identities={"pod-1": {"jax": "0.11.0", "NNX_SPEC_HASH": "abc", "libtpu": "1"}})
    assert {str(error) for error in errors.values()} == {
        "process 1 (pod pod-1) differs from process 0: jax 0.11.0 instead of 0.12.0, libtpu 1 instead of absent"
    }


def test_a_process_of_an_older_attempt_is_sent_away_without_harm_to_the_others() -> None:
    zero, one = ranks(2)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(roll_call, zero, SAME, bind_host="127.0.0.1", timeout_seconds=20)
        with pytest.raises(PeerLost, match="of attempt 0, process 0 is of attempt 1 already"):
            roll_call(replace(one, attempt=0, pod="stale"), SAME, bind_host="", timeout_seconds=20)
        roll_call(one, SAME, bind_host="", timeout_seconds=20)
        assert host.exception() is None


def test_strangers_on_the_port_change_nothing() -> None:
    zero, one = ranks(2)
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(roll_call, zero, SAME, bind_host="127.0.0.1", timeout_seconds=20)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, json.dumps({"process": 1}).encode() + b"\n", b""):
            connection = reach(zero.coordinator_port)
            with connection:
                try:
                    connection.sendall(noise)
                except OSError:
                    pass  # refused in the middle of it
        guest = pool.submit(roll_call, one, SAME, bind_host="127.0.0.1", timeout_seconds=20)
        assert guest.exception() is None and host.exception() is None


def test_a_name_that_never_resolves_is_named_at_the_deadline() -> None:
    with pytest.raises(PeerLost, match=r"no address for job-slice-0-0\.invalid"):
        resolve("job-slice-0-0.invalid", time.monotonic())
    assert resolve("localhost", time.monotonic() + 1) in ("127.0.0.1", "::1")


def reach(port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
