"""The logs the trainer keeps in its run directory, one file an attempt and host: what is left of pods that were replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launcher.backend.selection import Selection
from launcher.backend.status import LogLine
from launcher.errors import NotFound, Unavailable
from trainer.contract import LOG_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME: Final = re.compile(r"attempt-(?P<attempt>\d+)\.slice-(?P<slice>\d+)\.worker-(?P<worker>\d+)(?:-(?P<part>\d+))?\.log")


@dataclass(frozen=True, order=True)
class Kept:
    attempt: int
    slice_index: int
    worker: int
    part: int  # of one log on gs://
    name: str


def kept_lines(run_directory: str, attempt: int | None, selection: Selection) -> Iterator[LogLine]:
    """Lines of `attempt`, host by host; without a number, of each host's attempt before its newest on record.

    Raises NotFound where nothing of it is kept, Unavailable where it cannot be read.
    """
    folder = _Bucket(run_directory) if run_directory.startswith("gs://") else _Folder(run_directory)
    found = sorted(kept for name in folder.names() if (kept := _kept(name)))
    chosen = [kept for kept in found if selection.slice_index in (None, kept.slice_index) and selection.worker in (None, kept.worker)]
    attempts: dict[tuple[int, int], set[int]] = {}
    for kept in chosen:
        attempts.setdefault((kept.slice_index, kept.worker), set()).add(kept.attempt)
    before = {host: max(numbers - {max(numbers)}, default=-1) for host, numbers in attempts.items()}
    wanted = [kept for kept in chosen if kept.attempt == (before[kept.slice_index, kept.worker] if attempt is None else attempt)]
    if not wanted:
        there = ", ".join(map(str, sorted({kept.attempt for kept in found}))) or "none"
        which = "an attempt before the newest of its host" if attempt is None else f"attempt {attempt}"
        raise NotFound(f"{run_directory}/{LOG_FOLDER} has no log of {which}; attempts with logs: {there}")
    for kept in wanted:
        for line in folder.lines(kept.name):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            yield LogLine(slice_index=kept.slice_index, worker=kept.worker, attempt=kept.attempt, text=text)


def _kept(name: str) -> Kept | None:
    found = _NAME.fullmatch(name)
    if not found:
        return None
    attempt, slice_index, worker, part = (int(found[key] or 0) for key in ("attempt", "slice", "worker", "part"))
    return Kept(attempt, slice_index, worker, part, name)


class _Folder:
    def __init__(self, run_directory: str) -> None:
        self.path = Path(run_directory, LOG_FOLDER)
        if not self.path.is_dir():
            raise Unavailable(
                f"{self.path} is not on this machine: it is a path of the job's pods",
                hint=f"read it where that volume is mounted: less {self.path}/attempt-*.log",
            )

    def names(self) -> Iterable[str]:
        return [path.name for path in self.path.iterdir()]

    def lines(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb") as file:
            yield from file


class _Bucket:
    def __init__(self, run_directory: str) -> None:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        bucket, _, prefix = run_directory.removeprefix("gs://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/{LOG_FOLDER}/".lstrip("/")
        try:
            storage: Any = import_module("google.cloud.storage")  # untyped, and slow to import
            self.bucket = storage.Client(project="nnxlaunch").bucket(bucket)  # reading needs no project; the library insists on one
            self.blobs: dict[str, Any] = {blob.name.removeprefix(self.prefix): blob for blob in self.bucket.list_blobs(prefix=self.prefix)}
        except (GoogleAPIError, GoogleAuthError, OSError) as error:
            raise Unavailable(
                f"{run_directory} cannot be read from here: {str(error).splitlines()[0]}",
                hint="log in: gcloud auth application-default login",
            ) from None

    def names(self) -> Iterable[str]:
        return list(self.blobs)

    def lines(self, name: str) -> Iterator[bytes]:
        yield from self.blobs[name].download_as_bytes().splitlines()
