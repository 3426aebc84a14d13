"""What a source holds, whatever its files are called: the hash of its bytes and of how they are read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.sources import FileSource, describe
from trainer.data.storage import SourceFile, content_hash, open_folder

_MEMO_FROM_BYTES = 64 * 2**20  # smaller local files are hashed at every start


@dataclass(frozen=True)
class Content:
    source: str
    files: int
    size: int  # bytes
    fingerprint: str


def digest(value: Any) -> str:
    """Of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def content_of(source: FileSource, files: Sequence[SourceFile], cache: str) -> Content:
    # A key that came later and has its default changes nothing, so it is not in the hash.
    settings = {**source.model_dump(exclude={"weight", "paths", "max_bytes"}, exclude_defaults=True), "type": source.type}
    checksums = _checksums(files, cache)
    return Content(
        source=describe(source),
        files=len(files),
        size=sum(file.size for file in files),
        fingerprint=digest([settings, [[file.size, checksum] for file, checksum in zip(files, checksums, strict=True)]]),
    )


def _checksums(files: Sequence[SourceFile], cache: str) -> list[str]:
    """Of every file's bytes. Large local files are read once: their hash is remembered with size and time of change."""
    large = [file for file in files if not file.checksum and file.size >= _MEMO_FROM_BYTES]
    if not large:
        return [file.checksum or content_hash(file.path) for file in files]
    root, name = open_folder(cache), "checksums.json"
    memo: dict[str, list[Any]] = json.loads(root.read([name])[0]) if root.exists(name) else {}
    known = dict(memo)
    for file in large:
        changed = Path(file.path).stat().st_mtime_ns
        state = [file.size, changed]
        if known.get(file.path, [])[:2] == state:
            continue
        # A file still being written could change again within the clock's grain: its hash is used, not remembered.
        checksum = content_hash(file.path)
        known[file.path] = [*state, checksum]
        if time.time_ns() - changed > 10**10:
            memo[file.path] = known[file.path]
    root.write(name, json.dumps(memo, sort_keys=True).encode())
    return [file.checksum or (known[file.path][2] if file.path in known else content_hash(file.path)) for file in files]
