"""Source files -> packed streams in a cache named by its fingerprint, by any number of processes, none of which waits.

A source is cut into pieces by file sizes alone. Making a piece is deterministic and committing it atomic, so it does
not matter who makes it or whether two do. Every process makes its share first (piece i belongs to process i mod n),
then whatever is still missing, and drops a piece as soon as another process commits it. So it ends when all pieces
are there, whether the directory is shared by all hosts, by some, or by none (then each host makes everything), and a
process that is killed costs the others only its unfinished piece. What is committed is kept by the next call.

    <cache>/<fingerprint>/00007.train   the stored stream of piece 7 (packing.py); absent when empty
                          00007.eval    its held-out documents
                          00007.json    its commit: token and document counts, written last
                          index.json    all commits in one file, written when all are there
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.data import packing
from trainer.data.content import Content, content_of, digest
from trainer.data.order import ORDER_VERSION
from trainer.data.sources import FileSource, Part, can_be_cut, describe, documents, list_files
from trainer.data.storage import Folder, SourceFile, open_folder
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

Report = Callable[[str], None]
SPLITS = ("train", "eval")
MIB = 2**20
_INDEX = "index.json"
_ENCODE_BYTES = 1 * MIB  # text handed to the tokenizer at once
_LOOK_EVERY_SECONDS = 2.0  # how often a process that helps out looks whether the piece is there by now
_REPORT_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Packing:
    """What decides, besides text and tokenizer, how rows look and which batch they are in."""

    sequence_length: int
    held_out: float
    version: int = packing.PACKING_VERSION
    order: int = ORDER_VERSION


@dataclass(frozen=True)
class Prepared:
    """One source in the cache. `tokens[split][i]` and `documents[split]` count piece i's and all pieces' share."""

    content: Content
    folder: Folder
    dtype: np.dtype[Any]
    tokens: dict[str, list[int]]
    documents: dict[str, int]


def prepare_source(
    source: FileSource,
    *,
    tokenizer: Tokenizer,
    packing_: Packing,
    cache: str,
    process_index: int,
    process_count: int,
    report: Report,
    piece_bytes: int | None = None,
) -> Prepared:
    """Make what is missing of the source's cache. Raises DataError naming the file that cannot be read.

    `piece_bytes` of source text make a piece; by default about 1/256 of the source, from 1 MiB to 64 MiB.
    """
    files = list_files(source)
    content = content_of(source, files, cache)
    piece_bytes = piece_bytes or _piece_bytes(content.size)
    pieces = cut(source, files, piece_bytes)
    key = digest([content.fingerprint, tokenizer.fingerprint, asdict(packing_), piece_bytes])
    folder = open_folder(f"{cache.rstrip('/')}/{key}")
    if not folder.exists(_INDEX):
        maker = _Maker(source, pieces, tokenizer, packing_.held_out, folder, report)
        maker.make_all(process_index, process_count)
    return _open(folder, content)


def _piece_bytes(total: int) -> int:
    return max(MIB, min(64 * MIB, total // 256), total // 16384)


def cut(source: FileSource, files: Sequence[SourceFile], piece_bytes: int) -> list[tuple[Part, ...]]:
    """Pieces of about `piece_bytes`: parts of large files, groups of small ones; a function of order and sizes alone."""
    pieces: list[tuple[Part, ...]] = []
    group: list[Part] = []
    filled = 0
    for file in files:
        count = max(1, file.size // piece_bytes) if can_be_cut(source, file) else 1
        if count > 1:
            pieces += [(Part(file, index, count),) for index in range(count)]
            continue
        group.append(Part(file))
        filled += file.size
        if filled >= piece_bytes:
            pieces.append(tuple(group))
            group, filled = [], 0
    return [*pieces, tuple(group)] if group else pieces


@dataclass(frozen=True)
class _Maker:
    source: FileSource
    pieces: list[tuple[Part, ...]]
    tokenizer: Tokenizer
    held_out: float
    folder: Folder
    report: Report

    def make_all(self, process_index: int, process_count: int) -> None:
        begun = reported = time.monotonic()
        for piece in range(process_index, len(self.pieces), process_count):
            if not self.folder.exists(_commit(piece)):
                self._make(piece, helping=False)
            if time.monotonic() - reported > _REPORT_EVERY_SECONDS:
                reported = time.monotonic()
                self.report(f"data: {describe(self.source)}: piece {piece + 1:,} of {len(self.pieces):,} tokenised")
        while missing := self._missing():
            self._make(missing[process_index * len(missing) // process_count], helping=True)
        commits = [json.loads(commit) for commit in self.folder.read([_commit(piece) for piece in range(len(self.pieces))])]
        index = {"dtype": packing.stored_dtype(self.tokenizer.vocabulary).str, "pieces": commits}
        self.folder.write(_INDEX, json.dumps(index).encode())
        self.folder.clean()
        self.report(
            f"data: {describe(self.source)}: {len(self.pieces):,} pieces ready in {time.monotonic() - begun:.1f} s: {self.folder.url}"
        )

    def _missing(self) -> list[int]:
        present = self.folder.sizes()
        return [piece for piece in range(len(self.pieces)) if _commit(piece) not in present]

    def _make(self, piece: int, *, helping: bool) -> None:
        """Tokenise and commit one piece; when `helping`, give up once its owner has."""
        looked = time.monotonic()
        tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        dtype = packing.stored_dtype(self.tokenizer.vocabulary)
        for group in _groups(self.source, self.pieces[piece]):
            if helping and time.monotonic() - looked > _LOOK_EVERY_SECONDS:
                looked = time.monotonic()
                if self.folder.exists(_commit(piece)):
                    return
            for document, ids in zip(group, self.tokenizer.encode(group), strict=True):
                if ids.size and int(ids.max()) >= self.tokenizer.vocabulary:
                    raise DataError(f"the tokenizer gave id {int(ids.max())}, its vocabulary has {self.tokenizer.vocabulary}")
                tokens["eval" if is_held_out(document, self.held_out) else "train"].append(ids.astype(dtype))
        commit: dict[str, dict[str, int]] = {}
        for split, parts in tokens.items():
            stream = packing.store(parts, dtype)
            if stream.size:
                self.folder.write(stream_name(piece, split), stream.data.cast("B"))
            commit[split] = {"tokens": int(stream.size), "documents": len(parts)}
        self.folder.write(_commit(piece), json.dumps(commit).encode())


def _groups(source: FileSource, piece: tuple[Part, ...]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for document in documents(source, piece):
        group.append(document)
        size += len(document)
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_held_out(document: bytes, share: float) -> bool:
    """Chosen by the document's own bytes: copies of a document are all on the same side, whatever their order."""
    rank = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")
    return rank < share * 2**64


def _commit(piece: int) -> str:
    return f"{piece:05}.json"


def stream_name(piece: int, split: str) -> str:
    return f"{piece:05}.{split}"


def _open(folder: Folder, content: Content) -> Prepared:
    index = json.loads(folder.read([_INDEX])[0])
    dtype, pieces, sizes = np.dtype(index["dtype"]), index["pieces"], folder.sizes()
    tokens = {split: [int(commit[split]["tokens"]) for commit in pieces] for split in SPLITS}
    for split in SPLITS:
        for piece, count in enumerate(tokens[split]):
            name, wanted = stream_name(piece, split), count * dtype.itemsize
            # A listing may be older than the index where directories are cached, so a file gets a second look.
            if sizes.get(name, 0) != wanted and (size := folder.size(name)) != wanted:
                raise DataError(
                    f"the data cache is damaged: {folder.url}/{name} has {size:,} bytes, not {wanted:,}",
                    hint=f"delete {folder.url}; it is made again",
                )
    return Prepared(
        content=content,
        folder=folder,
        dtype=dtype,
        tokens=tokens,
        documents={split: sum(int(commit[split]["documents"]) for commit in pieces) for split in SPLITS},
    )
