"""The rounds of slices that meet through files: who has come, who takes part, decided once for all. No JAX here.

`<run>/rounds/<number>/` holds of each slice `slice-K.<token>.host-H.delta` for each of its hosts, then `slice-K.json`, which makes
the delta final, and `decided.json`: the deltas that count, written once, by whichever slice comes to the decision first. Both
documents are created and never replaced (a request with ifGenerationMatch=0, or a hard link), so that slow readers agree with
fast ones. Round n ends n x `sync_every_steps` steps; the first is 1. Records stay, deltas are deleted when nobody needs them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from trainer.checkpoint.storage import open_storage
from trainer.contract import ROUNDS_FOLDER
from trainer.errors import CheckpointError

DECIDED: Final = "decided.json"
DELTA: Final = ".delta"
FORMAT: Final = 1
KEPT_ROUNDS: Final = 2
"""Deltas of so many latest rounds are kept for slices that are a little late."""
FIRST_LOOK_SECONDS: Final = 0.02
SLOWEST_LOOK_SECONDS: Final = 2.0


@dataclass(frozen=True)
class File:
    """What one host of a slice has written."""

    name: str
    bytes: int
    crc32c: str


@dataclass(frozen=True)
class Record:
    """What was decided of a round."""

    round: int
    deltas: Mapping[int, tuple[File, ...]]
    """Of the slices that take part, in ascending order: the files of their hosts."""
    decided_by: int

    @property
    def slices(self) -> list[int]:
        return list(self.deltas)

    def encode(self) -> bytes:
        deltas = {str(index): [asdict(file) for file in files] for index, files in sorted(self.deltas.items())}
        return json.dumps({"format": FORMAT, "round": self.round, "deltas": deltas, "decided_by": self.decided_by}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes | str) -> Record:
        document: dict[str, Any] = json.loads(data)
        if document["format"] != FORMAT:
            raise CheckpointError(f"a round was recorded in format {document['format']!r}; this version reads {FORMAT}")
        deltas = {int(index): tuple(File(**file) for file in files) for index, files in document["deltas"].items()}
        return cls(document["round"], dict(sorted(deltas.items())), document["decided_by"])


class Rounds:
    """The rounds of a run, as slice `index` of `slices` sees them. Methods raise OSError where the storage fails."""

    def __init__(self, run_directory: str, *, index: int, slices: int) -> None:
        self.storage = open_storage(f"{run_directory.rstrip('/')}/{ROUNDS_FOLDER}")
        self.index, self.slices = index, slices
        self._kept_from: int | None = None

    def newest(self) -> int:
        """The newest round that is decided; 0 before the first."""
        found = [path.partition("/") for path in self.storage.files()]
        numbers = [int(folder) for folder, _, name in found if name == DECIDED]
        with_deltas = [int(folder) for folder, _, name in found if name.endswith(DELTA)]
        self._kept_from = min(with_deltas, default=1 + max(numbers, default=0))
        return max(numbers, default=0)

    def record(self, number: int) -> Record | None:
        """What was decided of a round; None where nothing is yet."""
        try:
            return Record.decode(self.storage.read(f"{_folder(number)}/{DECIDED}"))
        except FileNotFoundError:
            return None

    def delta_path(self, number: int, token: str, host: int) -> str:
        """Where a host puts its part; `token` is of this start of the slice, so that nothing is ever written over."""
        return f"{_folder(number)}/slice-{self.index}.{token}.host-{host}{DELTA}"

    def put(self, number: int, path: str, data: bytes) -> None:
        """Write a host's part; whether it is there matters no more once the round was decided, and cleared while this was written."""
        try:
            self.storage.write(path, data)
        except FileNotFoundError:
            if self.record(number) is None:
                raise

    def wants_delta(self, number: int) -> bool:
        """Whether this slice has to say what it moved: not where the round is decided, nor where a start before this one said it."""
        names = self._names(number)
        return DECIDED not in names and f"slice-{self.index}.json" not in names

    def commit(self, number: int, files: tuple[File, ...]) -> None:
        """Make the delta of this slice final; fine where there is one, and where the round is so old that it was cleared meanwhile."""
        data = json.dumps({"format": FORMAT, "files": [asdict(file) for file in files]}, indent=1).encode()
        try:
            self.storage.claim(f"{_folder(number)}/slice-{self.index}.json", data)
        except FileNotFoundError:
            if self.record(number) is None:
                raise

    def announce(self, number: int) -> None:
        """Tell the others that this slice will come to the round; those that were in the one before need not."""
        self.storage.write(f"{_folder(number)}/slice-{self.index}.here", b"")

    def settle(self, number: int, *, wait_seconds: float, leaving: Callable[[], bool]) -> Record | None:
        """The decision about a round this slice has come to; None where `leaving` said so before there was one.

        Decided at once when everybody is there who is waited for: those of the round before, and those that have announced
        themselves; all slices in the first round. Else after `wait_seconds`, with those that are there.
        """
        deadline, pause = time.monotonic() + wait_seconds, FIRST_LOOK_SECONDS
        before = self.record(number - 1)
        known = set(before.deltas) if before else set(range(self.slices))
        while True:
            late = time.monotonic() >= deadline  # asked before the look: who came in time is seen
            names = self._names(number)
            if DECIDED in names:
                return self.record(number)
            there = {index for index in range(self.slices) if f"slice-{index}.json" in names}
            expected = {index for index in range(self.slices) if index in known or f"slice-{index}.here" in names}
            if expected <= there or late:
                return self._decide(number, there)
            if leaving():
                return None
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(1.5 * pause, SLOWEST_LOOK_SECONDS)

    def forget(self, through: int) -> None:
        """Delete what rounds up to `through` hold; their records stay."""
        if self._kept_from is None:
            self.newest()
        assert self._kept_from is not None
        for number in range(self._kept_from, through + 1):
            for name in self._names(number) - {DECIDED}:
                self.storage.remove(f"{_folder(number)}/{name}")
        self._kept_from = max(self._kept_from, through + 1)

    def _names(self, number: int) -> set[str]:
        return {path.partition("/")[2] for path in self.storage.files(_folder(number))}

    def _decide(self, number: int, there: set[int]) -> Record:
        deltas: dict[int, tuple[File, ...]] = {}
        try:
            for index in sorted(there):
                document = json.loads(self.storage.read(f"{_folder(number)}/slice-{index}.json"))
                deltas[index] = tuple(File(**file) for file in document["files"])
            return Record.decode(self.storage.claim(f"{_folder(number)}/{DECIDED}", Record(number, deltas, self.index).encode()))
        except FileNotFoundError:
            # Another slice has decided since the look, gone on, and cleared the round, drafts included.
            if record := self.record(number):
                return record
            raise


def decided_rounds(run_directory: str) -> int:
    """Number of the newest round of the run that is decided; 0 before the first. Raises OSError."""
    return Rounds(run_directory, index=0, slices=1).newest()


def _folder(number: int) -> str:
    return f"{number:08d}"
