"""What is read: the files of a source, their identity, and the documents in a part of one of them.

A document is a non-empty `bytes` of valid UTF-8. A file that can be read from the middle is read in parts, so that
many processes can share it; which parts there are depends on its size alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from trainer.config.base import near_miss
from trainer.config.data import ArrayRecord, JsonLines, Parquet, PythonStandardLibrary, Text
from trainer.data.storage import SourceFile, accessing, find_files, local_copy, open_file, read_files
from trainer.errors import DataError

FileSource = Text | JsonLines | Parquet | ArrayRecord | PythonStandardLibrary
# Tests need files in broken encodings; the rest is not the library, or differs between builds of the same version.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Part:
    """Part `index` of the `count` equal parts of a file."""

    file: SourceFile
    index: int = 0
    count: int = 1

    def cut(self, total: int) -> tuple[int, int]:
        """The range of `total` items (bytes, records, row groups) that belongs to this part."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


def describe(source: FileSource) -> str:
    return source.type if isinstance(source, PythonStandardLibrary) else f"{source.type} {', '.join(source.paths)}"


def list_files(source: FileSource) -> list[SourceFile]:
    """Every file once, in the order of the patterns, sorted within one. Raises DataError when a pattern matches nothing."""
    if isinstance(source, PythonStandardLibrary):
        return _standard_library(source.max_bytes)
    files = {file.path: file for pattern in source.paths for file in find_files(pattern)}
    return list(files.values())


def _standard_library(max_bytes: int | None) -> list[SourceFile]:
    """Modules in an order that mixes packages, so that a small share of them is a fair sample."""
    root = sysconfig.get_path("stdlib")
    found: list[tuple[str, SourceFile]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                rank = hashlib.blake2b(os.path.relpath(path, root).encode(), digest_size=8).hexdigest()
                found.append((rank, SourceFile(path, os.path.getsize(path), "")))
    files = [file for _, file in sorted(found, key=lambda pair: pair[0])]
    if not files:
        raise DataError(
            f"{root} holds no Python source text", hint="this Python was installed without its library's sources; use another source"
        )
    total, kept = 0, 0
    while kept < len(files) and (max_bytes is None or total < max_bytes):
        total += files[kept].size
        kept += 1
    return files[:kept]


def can_be_cut(source: FileSource, file: SourceFile) -> bool:
    if isinstance(source, JsonLines):
        return not file.path.endswith(".gz")
    if isinstance(source, Text):
        return source.separator is not None and not _overlaps_itself(source.separator)
    return isinstance(source, Parquet | ArrayRecord)


def _overlaps_itself(separator: str) -> bool:
    """Where it can, as blank lines can, finding separators needs the file from its start."""
    return any(separator.startswith(separator[shift:]) for shift in range(1, len(separator)))


def documents(source: FileSource, parts: Sequence[Part]) -> Iterator[bytes]:
    """The documents of some parts, in order. Raises DataError with file and place for whatever is not one."""
    if isinstance(source, PythonStandardLibrary) or (isinstance(source, Text) and source.separator is None):
        found = _texts([part.file.path for part in parts])
    else:
        found = (document for part in parts for document in _cut_documents(source, part))
    return (document for document in found if document)


def _cut_documents(source: Text | JsonLines | Parquet | ArrayRecord, part: Part) -> Iterator[bytes]:
    if isinstance(source, JsonLines):
        return _json_lines(source, part)
    if isinstance(source, Parquet):
        return _parquet(source, part)
    if isinstance(source, ArrayRecord):
        return _array_record(part)
    assert source.separator is not None
    return _separated(source.separator.encode(), part)


def _texts(paths: Sequence[str]) -> Iterator[bytes]:
    for path, data in zip(paths, read_files(paths), strict=True):
        yield _checked(data.removeprefix(_BYTE_ORDER_MARK), path)


def _separated(separator: bytes, part: Part) -> Iterator[bytes]:
    """The documents that begin in this part of the file: at its start, or right behind a separator."""
    path = part.file.path
    start, stop = part.cut(part.file.size)
    with open_file(path) as file:
        base = max(0, start - len(separator))  # offset of the buffer in the file
        file.seek(base)
        buffer, begin, search, inside = b"", 0, 0, start == 0  # inside: a document of this part begins at `begin`
        while (offset := base + begin) < stop:
            found = buffer.find(separator, search)
            if found < 0 and (block := file.read(max(_BLOCK_BYTES, len(buffer)))):
                rest = buffer[begin:]
                search = max(0, len(rest) - len(separator) + 1)
                buffer, base, begin = rest + block, offset, 0
                continue
            document = buffer[begin : found if found >= 0 else None]
            if inside:
                yield _checked(
                    document.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else document, f"{path}, document at offset {offset:,}"
                )
            if found < 0:
                return
            begin = search = found + len(separator)
            inside = True


def _checked(data: bytes, where: str) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,} ({error.reason})",
            hint="convert the file to UTF-8, or leave it out of the glob",
        ) from None
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{where}: not text: a zero byte at offset {zero:,}", hint="leave binary files out of the glob")
    return data


def _json_lines(source: JsonLines, part: Part) -> Iterator[bytes]:
    path = part.file.path
    start, stop = part.cut(part.file.size)
    with open_file(path) as raw:
        if path.endswith(".gz"):
            yield from _compressed_lines(source.field, raw, path)
            return
        if start:  # the line that crosses the border belongs to the part it begins in
            raw.seek(start - 1)
            raw.readline()
        while (offset := raw.tell()) < stop and (line := raw.readline()):
            try:
                yield _field(source.field, line, path)
            except DataError as error:
                message = str(error).removeprefix(path)
                raise DataError(f"{path}, line {_line_number(raw, offset):,}{message}", hint=error.hint) from None


def _compressed_lines(field: str, raw: BinaryIO, path: str) -> Iterator[bytes]:
    number = 0
    try:
        with gzip.open(raw) as lines:
            for number, line in enumerate(lines, 1):
                yield _field(field, line, f"{path}, line {number:,}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error} after line {number:,}", hint="fetch the file again") from error


def _line_number(file: BinaryIO, offset: int) -> int:
    file.seek(0)
    number, left = 1, offset
    while left and (block := file.read(min(left, 1 << 20))):
        number += block.count(b"\n")
        left -= len(block)
    return number


def _field(field: str, line: bytes, where: str) -> bytes:
    if not line.strip():
        return b""
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason}", hint="convert the file to UTF-8") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}", hint="JSONL is one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is needed, not {type(record).__name__}", hint='write {"text": "..."}')
    if field not in record:
        raise DataError(f"{where}: no field {field!r}", hint=_nearest(field, list(record), "field"))
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}, not text", hint="name a field that holds text in `field`")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} is not valid Unicode: {error.reason}", hint="a lone surrogate escape; repair the record"
        ) from None


def _nearest(name: str, known: list[str], key: str) -> str:
    close = near_miss(name, known)
    return f"did you mean `{key}: {close}`?" if close else f"there are: {', '.join(sorted(known)[:20])}"


def _parquet(source: Parquet, part: Part) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, column = part.file.path, source.column
    with open_file(path) as raw:
        try:
            file = pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file: {error}", hint="leave other files out of the glob") from error
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"{path}: no column {column!r}", hint=_nearest(column, names, "column"))
        kind = file.schema_arrow.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{path}: column {column!r} holds {kind}, not text", hint="name a column of strings in `column`")
        groups = range(*part.cut(file.num_row_groups))
        if not groups:
            return
        row = 0
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield text.encode() if text else b""
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged after row {row:,} of row groups {groups[0]} to {groups[-1]}: {error}") from error


def _array_record(part: Part) -> Iterator[bytes]:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

    path = part.file.path
    with local_copy(path) as local, accessing(path):
        if not os.access(local, os.R_OK):
            raise PermissionError(13, "permission denied")
        try:
            reader = array_record_module.ArrayRecordReader(local, "readahead_buffer_size:0,max_parallelism:0")
            first, last = part.cut(reader.num_records())
            for low, high in pairwise([*range(first, last, 1024), last]):
                for number, record in enumerate(reader.read(low, high), low):
                    yield _checked(record, f"{path}, record {number:,}")
            reader.close()  # tells, at the latest, when the file was no such file
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not a whole ArrayRecord file: {error}", hint="leave other files out of the glob") from error
