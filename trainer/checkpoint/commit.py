"""When a step exists: the commit file. No JAX here.

`<run>/checkpoints/<step>/` holds the items `params`, `opt`, `rest` (Orbax), `meta.json` and, written last, by
process 0 alone, `commit.json`: the name, size and CRC32C of every other file of the step, and how long the save took. A step without a
commit file, or whose files differ from it, does not exist for resume; what is wrong with it is reported.
Directory N holds the state after N completed updates.

On gs:// the commit file is created with an `ifGenerationMatch=0` request: of two attempts that both believe
they are process 0, one fails. Checksums there are the ones the store computed itself and lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trainer.checkpoint.storage import File, Storage, checksum, open_storage
from trainer.contract import CHECKPOINT_FOLDER, COMMIT_FILE, SAVE_SECONDS
from trainer.errors import CheckpointError

META_FILE: Final = "meta.json"
ITEMS: Final = ("params", "opt", "rest", "replicas", "ema")
"""Folders of a step; a run without replicas has no `replicas`."""
FORMAT: Final = 1
OWN_NAMES: Final = frozenset({*ITEMS, META_FILE, COMMIT_FILE})
QUARANTINE: Final = "quarantine"  # where damaged steps are moved, as <step> or <step>.<n>, when a run must write there


class Damaged(Exception):
    """A step cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Commit:
    step: int
    files: Mapping[str, File]  # path inside the step's directory -> size and checksum
    save_seconds: float | None = None  # from when it was asked for; None where it was not written down


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint directory holds."""

    commits: Mapping[int, Commit]  # usable steps, ascending; sizes were compared, on a local folder contents were not
    skipped: Mapping[int, str]  # step -> why it cannot be used, ascending
    unfinished: frozenset[int]  # those of `skipped` that never had a commit file
    quarantined: frozenset[str]

    @property
    def steps(self) -> list[int]:
        return list(self.commits)


def checkpoint_directory(run_directory: str) -> str:
    return f"{run_directory.rstrip('/')}/{CHECKPOINT_FOLDER}"


def other_steps(storage: Storage) -> str:
    """A hint for whoever asked for a step that cannot be used."""
    return f"committed steps: {', '.join(map(str, inspect(storage).steps)) or 'none'}"


def committed_steps(run_directory: str) -> list[int]:
    """Committed steps of a run whose files are all there with the right sizes, ascending."""
    return inspect(open_storage(checkpoint_directory(run_directory))).steps


def encode(commit: Commit) -> bytes:
    files = {path: {"bytes": file.bytes, "crc32c": file.crc32c} for path, file in sorted(commit.files.items())}
    took = {} if commit.save_seconds is None else {SAVE_SECONDS: commit.save_seconds}
    body = {"format": FORMAT, "step": commit.step, **took, "files": files}
    return json.dumps({**body, "crc32c": checksum(_canonical(body))}, indent=1).encode()


def decode(data: bytes) -> Commit:
    """Raises Damaged."""
    try:
        document = json.loads(data)
        own = document.pop("crc32c")
        if document["format"] != FORMAT:
            raise Damaged(f"{COMMIT_FILE} has format {document['format']!r}, this version reads {FORMAT}")
        if own != checksum(_canonical(document)):
            raise Damaged(f"{COMMIT_FILE} does not match its own checksum")
        files = {path: File(int(entry["bytes"]), entry["crc32c"]) for path, entry in document["files"].items()}
        took = document.get(SAVE_SECONDS)
        return Commit(int(document["step"]), files, None if took is None else float(took))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{COMMIT_FILE} is not readable") from None


def inspect(storage: Storage) -> Inspection:
    """One listing and one small read per step. Raises CheckpointError for a directory that is not ours."""
    listed = _list(storage)
    by_step: dict[int, dict[str, File]] = {}
    quarantined: set[str] = set()
    foreign: set[str] = set()
    for path, file in listed.items():
        name, _, rest = path.partition("/")
        if name.isascii() and name.isdigit() and name == str(int(name)) and rest:
            by_step.setdefault(int(name), {})[rest] = file
        elif name == QUARANTINE:
            quarantined.add(rest.partition("/")[0])
        else:
            foreign.add(name)
    for step, files in by_step.items():
        foreign |= {f"{step}/{name}" for name in {path.partition("/")[0] for path in files} if not _own(name)}
    if foreign:
        names = ", ".join(sorted(foreign)[:5]) + (" and more" if len(foreign) > 5 else "")
        raise CheckpointError(
            f"{storage.root} holds files that this trainer did not write: {names}",
            hint="give the run a directory of its own with `run_directory`, or move these files away",
        )
    commits: dict[int, Commit] = {}
    skipped: dict[int, str] = {}
    for step in sorted(by_step):
        try:
            commits[step] = _read_commit(storage, step, by_step[step])
        except Damaged as reason:
            skipped[step] = str(reason)
    unfinished = frozenset(step for step in skipped if COMMIT_FILE not in by_step[step])
    return Inspection(commits, skipped, unfinished, frozenset(quarantined))


def read_commit(storage: Storage, step: int) -> Commit:
    """The commit of a step whose files are all there with the right sizes. Raises Damaged."""
    prefix = f"{step}/"
    present = {path.removeprefix(prefix): file for path, file in storage.files(str(step)).items()}
    if not present:
        raise Damaged("there is no such step")
    return _read_commit(storage, step, present)


def verify_contents(storage: Storage, commit: Commit, paths: Iterable[str]) -> list[str]:
    """One sentence for each of `paths` whose content differs from the commit file; reads them all on a local folder."""
    wrong = []
    for path in paths:
        try:
            found = storage.crc32c(f"{commit.step}/{path}")
        except FileNotFoundError:
            wrong.append(f"{path} is missing")
        except OSError as error:
            wrong.append(f"{path} cannot be read: {error.strerror}")
        else:
            if found != commit.files[path].crc32c:
                wrong.append(f"{path} has CRC32C {found}, {commit.files[path].crc32c} was written")
    return wrong


def _own(name: str) -> bool:
    """Of this trainer, temporary files included: `commit.json.<pid>.tmp`."""
    return name in OWN_NAMES or (name.endswith(".tmp") and name.split(".")[0] in {"commit", "meta"})


def _list(storage: Storage) -> dict[str, File]:
    try:
        return storage.files()
    except NotADirectoryError:
        raise CheckpointError(f"{storage.root} is not a directory", hint="`run_directory` must name a folder") from None
    except PermissionError as error:
        raise CheckpointError(f"{storage.root} cannot be read: {error.strerror}", hint="check the owner and mode of the folder") from None


def _read_commit(storage: Storage, step: int, present: Mapping[str, File]) -> Commit:
    if COMMIT_FILE not in present:
        raise Damaged(f"unfinished: {COMMIT_FILE} is not there")
    try:
        commit = decode(storage.read(f"{step}/{COMMIT_FILE}"))
    except FileNotFoundError:
        raise Damaged("deleted while being read") from None
    if commit.step != step:
        raise Damaged(f"{COMMIT_FILE} belongs to step {commit.step}")
    for path, file in commit.files.items():
        found = present.get(path)
        if found is None:
            raise Damaged(f"{path} is missing")
        if found.bytes != file.bytes:
            raise Damaged(f"{path} has {found.bytes:,} bytes, {file.bytes:,} were written")
        if found.crc32c is not None and found.crc32c != file.crc32c:
            raise Damaged(f"{path} has CRC32C {found.crc32c}, {file.crc32c} was written")
    return commit


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
