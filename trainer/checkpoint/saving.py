"""One save on its way to being committed, in a thread of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint.arrays import Writing
from trainer.checkpoint.commit import COMMIT_FILE, META_FILE, Commit, encode
from trainer.checkpoint.peers import PeerFailed, Peers
from trainer.checkpoint.storage import File, Storage
from trainer.checkpoint.trouble import save_error
from trainer.errors import CheckpointError, PeerLost, SaveFailed, TrainerError


@dataclass
class Save:
    """Written by all, committed by process 0: data, Orbax's index, `meta.json`, checksums, then the commit file.

    Each process reads back and sums what it wrote itself; on gs:// the store has done so.
    """

    step: int
    asked_at: float  # time.monotonic()
    meta: Mapping[str, Any]
    storage: Storage
    peers: Peers
    writing: Writing
    timeout_seconds: float
    operation: str  # what the peers call this save
    earlier_operation: str  # the save before this one: over on every process that takes part in this one
    after_commit: Callable[[int], None]  # runs on process 0
    seconds: float = 0.0  # from then until it was committed, once it is
    _error: TrainerError | None = None
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.timeout_seconds
        # A daemon: an interpreter that must end does not wait for storage that hangs. Whoever wants the commit waits.
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {self.step}", daemon=True)
        self._thread.start()

    def check(self) -> bool:
        """Whether it is committed. Raises what made it fail, on this process or another, and SaveFailed past the deadline."""
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            if self._remaining_seconds() <= 0:
                raise SaveFailed(
                    f"step {self.step} is still not committed to {self.storage.root} after {self.timeout_seconds:.0f} s",
                    hint="look at the storage; a slow one needs a larger checkpoint.save_timeout_seconds",
                )
            return False
        if self._error is not None:  # it came between the two looks
            raise self._error
        return True

    def wait(self) -> None:
        """Until it is committed or failed, or the deadline has passed: `check` tells."""
        while self._thread.is_alive() and (remaining := self._remaining_seconds()) > 0:
            self._thread.join(remaining)

    def _run(self) -> None:
        try:
            self._write_and_commit()
        except PeerFailed as error:
            self._error = SaveFailed(f"step {self.step} could not be saved by {error}", hint="the newest committed step is untouched")
            self.writing.settle(self._remaining_seconds)
        except Exception as error:  # whatever it is, it belongs to the thread that trains: `check` raises it there
            self._error = save_error(self.step, self.storage.root, error)
            if not isinstance(error, PeerLost):
                self.peers.fail(self.operation, str(self._error))
            self.writing.settle(self._remaining_seconds)

    def _write_and_commit(self) -> None:
        self.writing.wait(self._remaining_seconds)
        own = self._checksums_of_own_files()
        parts = self.peers.gather(self.operation, json.dumps(own), deadline=self._deadline)
        if self.peers.is_primary:
            self.peers.forget(self.earlier_operation)
            self.writing.merge()
            self._commit({path: crc32c for part in parts for path, crc32c in json.loads(part).items()})
        self.peers.broadcast(self.operation, "" if self.peers.is_primary else None, deadline=self._deadline)
        self.seconds = self._seconds_so_far()
        if self.peers.is_primary:
            self.after_commit(self.step)

    def _checksums_of_own_files(self) -> dict[str, str]:
        prefix = f"{self.step}/"
        own = f"/ocdbt.process_{self.peers.index}/"
        if self.storage.lists_checksums:
            return {}
        listed = [path for path in self.storage.files(str(self.step)) if own in path]
        return {path.removeprefix(prefix): self.storage.crc32c(path) for path in listed}

    def _commit(self, known: Mapping[str, str]) -> None:
        prefix = f"{self.step}/"
        self.storage.write(prefix + META_FILE, json.dumps(self.meta, indent=1).encode())
        files: dict[str, File] = {}
        for path, file in self.storage.files(str(self.step)).items():
            name = path.removeprefix(prefix)
            files[name] = File(file.bytes, file.crc32c or known.get(name) or self.storage.crc32c(path))
        if missing := known.keys() - files.keys():
            raise CheckpointError(f"{self.storage.root}/{self.step}: {', '.join(sorted(missing))} vanished during the save")
        try:
            self.storage.write_new(prefix + COMMIT_FILE, encode(Commit(self.step, files, self._seconds_so_far())))
        except FileExistsError:
            raise CheckpointError(
                f"{self.storage.root}/{self.step} was committed by somebody else",
                hint="two attempts share this run directory: end one of them",
            ) from None

    def _seconds_so_far(self) -> float:
        return round(time.monotonic() - self.asked_at, 3)

    def _remaining_seconds(self) -> float:
        return self._deadline - time.monotonic()
