"""How a slice that is a JAX world of its own meets the others, and how it catches up with them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.checkpoint.peers import Peers
from trainer.checkpoint.storage import checksum
from trainer.config.diloco import DiLoCo
from trainer.config.train import TrainConfig
from trainer.errors import CheckpointError, PeerLost, Preempted
from trainer.replicas import meet, moved, rejoin
from trainer.state import StateSpec
from trainer.worlds.delta import encode, host_shards, mean, place
from trainer.worlds.rounds import KEPT_ROUNDS, File, Record, Rounds

PEERS_SECONDS: Final = 3600
"""How long the hosts of a slice wait for the one that is last to read or write its part, beyond the wait for other slices."""
READ_AGAIN: Final = 3
"""Reads of a file whose bytes are not those that were written, before the slice gives up."""


@dataclass(frozen=True)
class Joined:
    """A state that has come to the end of a round."""

    state: nnx.State
    done: int
    """Steps, the same on all slices."""
    records: tuple[Record, ...]
    """The rounds it has just been through, in order."""
    seconds: float


@dataclass(frozen=True)
class Programs:
    """What a slice computes at a sync; jitted, with the layout of its model."""

    moved: Callable[[nnx.State], dict[str, jax.Array]]
    meet: Callable[[nnx.State, dict[str, jax.Array], jax.Array], nnx.State]
    rejoin: Callable[[nnx.State, jax.Array], nnx.State]
    shapes: Mapping[str, tuple[int, ...]]
    shardings: Mapping[str, Any]

    @classmethod
    def of(cls, config: TrainConfig, spec: StateSpec, index: int) -> Programs:
        """Of slice `index`, whose state is as `spec` says."""
        assert config.diloco is not None and config.diloco.files is not None
        model = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(spec.abstract["model"])}
        return cls(
            moved(spec, config.diloco.files.delta_dtype),
            meet(config.diloco, spec),
            rejoin(spec, index, config.seed),
            {path: leaf.shape for path, leaf in model.items()},
            {path: leaf.sharding for path, leaf in model.items()},
        )


class Exchange:
    """The syncs of one slice. Every process of its world creates one and calls every method in the same order."""

    def __init__(self, config: DiLoCo, programs: Programs, run_directory: str, *, index: int, slices: int) -> None:
        """`run_directory` is that of the whole run."""
        assert config.files is not None
        self._every, self._wait_seconds, self._programs = config.sync_every_steps, config.files.wait_seconds, programs
        self._rounds = Rounds(run_directory, index=index, slices=slices)
        self._peers = Peers()
        self._token = uuid.uuid4().hex[:8]
        self._operations = 0
        self._saved_steps = (0, 0)

    def newest(self) -> int:
        """The newest round that is decided; 0 before the first. Agreed on by the processes of the slice."""
        operation, deadline = self._operation("newest")
        with self._reaching():
            found = str(self._rounds.newest()) if self._peers.is_primary else None
        return int(self._peers.broadcast(operation, found, deadline=deadline))

    def due(self, done: int) -> bool:
        """Whether a round ends after `done` steps."""
        return done % self._every == 0

    def round_of(self, done: int) -> int:
        """The newest round that is in a state after `done` steps."""
        return done // self._every

    def saved(self, done: int) -> None:
        """A checkpoint of this slice is committed."""
        if done > self._saved_steps[1]:
            self._saved_steps = (self._saved_steps[1], done)

    def join(self, state: nnx.State, done: int) -> Joined:
        """Go on from the outer parameters of `state`, of `done` steps, after all rounds that are decided since.

        Raises CheckpointError where deltas of these rounds are not there any more, which needs a newer checkpoint.
        """
        started, behind = time.monotonic(), self.round_of(done)
        state = self._programs.rejoin(state, jnp.int32(behind * self._every))
        records = self._agreed("join", lambda: self._since(behind))
        state = self._through(state, records)
        number = behind + len(records)
        if self._peers.is_primary:
            with self._reaching():
                self._announce(number + 1, records)
        return Joined(state, number * self._every, records, time.monotonic() - started)

    def meet(self, state: nnx.State, done: int, leaving: Callable[[], bool]) -> Joined:
        """Tell the others what this slice has moved in the round that ends after `done` steps, and take what was decided.

        A slice that has fallen behind goes through the rounds it has missed: its next step is `done` of the result. Raises
        Preempted where `leaving` says so while it waits: its delta is final then, and nothing is lost. Raises PeerLost where
        the storage fails.
        """
        started, number = time.monotonic(), self.round_of(done)
        self._publish(state, number)

        def decide() -> tuple[Record, ...]:
            record = self._rounds.settle(number, wait_seconds=self._wait_seconds, leaving=leaving)
            return () if record is None else (record, *self._since(number))

        records = self._agreed("meet", decide, self._wait_seconds)
        if not records:
            raise Preempted(f"asked to leave while it waited for the other slices; its part of round {number} is kept")
        state = self._through(state, records)
        number = records[-1].round
        if self._peers.is_primary:
            with self._reaching():
                self._announce(number + 1, records)
                # Since the last but one: a slice that comes back may have looked before the last checkpoint was there.
                self._rounds.forget(min(self.round_of(self._saved_steps[0]), number - KEPT_ROUNDS))
        return Joined(state, number * self._every, records, time.monotonic() - started)

    def _publish(self, state: nnx.State, number: int) -> None:
        operation, deadline = self._operation("publish")
        with self._reaching():
            found = str(int(self._rounds.wants_delta(number))) if self._peers.is_primary else None
        if self._peers.broadcast(operation, found, deadline=deadline) == "0":
            return
        data = encode(host_shards(self._programs.moved(state)))
        path = self._rounds.delta_path(number, self._token, self._peers.index)
        with self._reaching():
            self._rounds.put(number, path, data)
        mine = File(path.partition("/")[2], len(data), checksum(data))
        operation, deadline = self._operation("published")
        parts = self._peers.gather(operation, json.dumps(mine.__dict__), deadline=deadline)
        if self._peers.is_primary:
            with self._reaching():
                self._rounds.commit(number, tuple(File(**json.loads(part)) for part in parts))

    def _since(self, number: int) -> tuple[Record, ...]:
        """The rounds decided after `number`, one after the other."""
        found: list[Record] = []
        while record := self._rounds.record(number + len(found) + 1):
            found.append(record)
        return tuple(found)

    def _announce(self, number: int, records: Sequence[Record]) -> None:
        """Where the others would not wait for this slice."""
        if records and self._rounds.index not in records[-1].deltas:
            self._rounds.announce(number)

    def _through(self, state: nnx.State, records: Sequence[Record]) -> nnx.State:
        for record in records:
            average = mean([self._read(record, files) for files in record.deltas.values()])
            state = self._programs.meet(
                state, place(average, self._programs.shardings, self._programs.shapes), jnp.int32(record.round * self._every)
            )
        return state

    def _read(self, record: Record, files: Sequence[File]) -> bytes:
        if len(files) != self._peers.count:
            raise CheckpointError(f"round {record.round} has deltas of {len(files)} hosts a slice, this slice has {self._peers.count}")
        file = files[self._peers.index]
        path = f"{record.round:08d}/{file.name}"
        with self._reaching():
            for _ in range(READ_AGAIN):
                data = self._rounds.storage.read(path)
                if (len(data), checksum(data)) == (file.bytes, file.crc32c):
                    return data
        raise PeerLost(f"{self._rounds.storage.root}/{path} is not what was written there")

    def _agreed(self, name: str, decide: Callable[[], tuple[Record, ...]], wait_seconds: float = 0) -> tuple[Record, ...]:
        """What process 0 of the slice finds, on all of them."""
        operation, deadline = self._operation(name, wait_seconds)
        found: str | None = None
        if self._peers.is_primary:
            with self._reaching():
                found = json.dumps([record.encode().decode() for record in decide()])
        return tuple(map(Record.decode, json.loads(self._peers.broadcast(operation, found, deadline=deadline))))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Trouble with the storage ends the attempt: the next one goes on where this one was."""
        try:
            yield
        except FileNotFoundError as error:  # nothing but the other slices deletes what is there, once they have gone on
            raise PeerLost(
                f"{error.filename or self._rounds.storage.root} is not there any more: this slice is too far behind",
                hint="a restart goes on from the newest checkpoint of any slice",
            ) from error
        except PermissionError as error:
            raise CheckpointError(f"{self._rounds.storage.root} cannot be used: {error.strerror}") from error
        except OSError as error:
            raise PeerLost(f"{self._rounds.storage.root} cannot be used: {error}") from error

    def _operation(self, name: str, more_seconds: float = 0) -> tuple[str, float]:
        self._operations += 1
        return f"{self._operations}-{name}", time.monotonic() + PEERS_SECONDS + more_seconds
