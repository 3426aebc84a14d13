"""Sources: what is written is what is read, whatever the format, the place and the parts; what is not text is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

from tests.gcs_emulator import Gcs
from trainer.config.data import ArrayRecord, JsonLines, Parquet, PythonStandardLibrary, Text
from trainer.data.prepare import cut
from trainer.data.sources import FileSource, documents, list_files
from trainer.data.storage import bucket_client
from trainer.errors import DataError

TEXTS = [f"document {index}: naïve café " * (index % 7) for index in range(40)]
PRESENT = [text.encode() for text in TEXTS if text]


def read(source: FileSource, parts: int = 1) -> list[bytes]:
    files = list_files(source)
    pieces = cut(source, files, max(1, sum(file.size for file in files) // parts))
    return [document for piece in pieces for document in documents(source, piece)]


def write_text(path: Path) -> FileSource:
    path.write_text("<|end|>".join(TEXTS))
    return Text(paths=(str(path),), separator="<|end|>")


def write_blank_lines(path: Path) -> FileSource:
    path.write_text("\n\n".join(TEXTS))
    return Text(paths=(str(path),), separator="\n\n")


def write_json(path: Path) -> FileSource:
    path.write_text("\n".join(json.dumps({"id": index, "body": text}) for index, text in enumerate(TEXTS)) + "\n\n")
    return JsonLines(paths=(str(path),), field="body")


def write_json_gz(path: Path) -> FileSource:
    path = path.with_suffix(".jsonl.gz")
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return JsonLines(paths=(str(path),))


def write_parquet(path: Path) -> FileSource:
    table = pa.table({"text": pa.array([text or None for text in TEXTS]), "n": list(range(len(TEXTS)))})
    pq.write_table(table, path, row_group_size=7)
    return Parquet(paths=(str(path),))


def write_array_record(path: Path) -> FileSource:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return ArrayRecord(paths=(str(path),))


def write_files(path: Path) -> FileSource:
    path.mkdir()
    for index, text in enumerate(TEXTS):
        (path / f"{index:03}.txt").write_text(text)
    return Text(paths=(f"{path}/*.txt",))


WRITERS = [write_files, write_text, write_blank_lines, write_json, write_json_gz, write_parquet, write_array_record]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("parts", [1, 2, 9, 150])
def test_every_document_is_read_once_however_the_file_is_cut(write: Callable[[Path], FileSource], parts: int, tmp_path: Path) -> None:
    assert read(write(tmp_path / "file"), parts) == PRESENT


@pytest.mark.parametrize("write", WRITERS)
def test_a_bucket_gives_the_same_documents_as_a_folder(write: Callable[[Path], FileSource], tmp_path: Path, gcs: Gcs) -> None:
    source = write(tmp_path / "file")
    for file in list_files(source):
        bucket_client().pipe_file(f"{gcs.bucket}/{write.__name__}/{Path(file.path).name}", Path(file.path).read_bytes())
    remote = source.model_copy(update={"paths": (f"{gcs.url}/{write.__name__}/*",)})
    assert read(remote, parts=4) == PRESENT


def test_separated_documents_are_read_once_wherever_a_cut_falls(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"<>ab<><>c<>")
    for parts in range(1, 12):
        assert read(Text(paths=(str(tmp_path / "file"),), separator="<>"), parts) == [b"ab", b"c"]


def test_globs_are_sorted_and_a_file_named_twice_is_read_once(corpus: Path) -> None:
    source = Text(paths=(f"{corpus}/part1/*.txt", f"{corpus}/**/*.txt"))
    names = [Path(file.path).name for file in list_files(source)]
    first = [f"{index:02}.txt" for index in range(1, 30, 3)]
    rest = [f"{index:02}.txt" for part in (0, 2) for index in range(part, 30, 3)]
    assert names == first + rest


def test_the_standard_library_is_real_source_text_in_a_fixed_order() -> None:
    files = list_files(PythonStandardLibrary())
    assert files == list_files(PythonStandardLibrary()) and len(files) > 300
    assert not any("/test/" in file.path or "site-packages" in file.path for file in files)
    some = list_files(PythonStandardLibrary(max_bytes=200_000))
    assert files[: len(some)] == some and 200_000 <= sum(file.size for file in some) < 1_500_000
    assert all(document.decode() for document in read(PythonStandardLibrary(max_bytes=200_000)))


def bad(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def bad_parquet(tmp_path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    return str(tmp_path / "bad.parquet")


CASES: dict[str, tuple[Callable[[Path], FileSource], str]] = {
    "no match": (lambda tmp: Text(paths=(f"{tmp}/none/*.txt",)), r"no file matches .*/none/\*\.txt"),
    "folder": (lambda tmp: Text(paths=(str(tmp),)), r"no file matches .*it is a folder"),
    "scheme": (lambda tmp: Text(paths=("s3://bucket/x",)), r"s3://bucket/x: only local paths and gs://"),
    "invalid utf-8": (lambda tmp: Text(paths=(bad(tmp, "a.txt", b"good \xff bad"),)), r"a\.txt: not UTF-8 text: byte 0xff at offset 5"),
    "binary": (lambda tmp: Text(paths=(bad(tmp, "a.bin", b"ELF\0\1"),)), r"a\.bin: not text: a zero byte at offset 3"),
    "separated": (
        lambda tmp: Text(paths=(bad(tmp, "a.txt", b"one|\xfe"),), separator="|"),
        r"a\.txt, document at offset 4: not UTF-8",
    ),
    "not json": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b'{"text": "x"}\n{oops}\n'),)), r"a\.jsonl, line 2: not JSON"),
    "json utf-8": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b'{"text": "\xff"}'),)), r"a\.jsonl, line 1: not UTF-8"),
    "not an object": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b"[1]\n"),)), r"line 1: a JSON object is needed, not list"),
    "missing field": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b'{"texts": "x"}\n'),)), r"line 1: no field 'text'"),
    "field of numbers": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b'{"text": 3}\n'),)), r"field 'text' is int, not text"),
    "surrogate": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl", b'{"text": "\\ud800"}\n'),)), r"field 'text' is not valid Unicode"),
    "not gzip": (lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl.gz", b'{"text": "x"}\n'),)), r"a\.jsonl\.gz: not a whole gzip file"),
    "cut gzip": (
        lambda tmp: JsonLines(paths=(bad(tmp, "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9]),)),
        r"a\.jsonl\.gz: not a whole gzip file",
    ),
    "not parquet": (lambda tmp: Parquet(paths=(bad(tmp, "a.parquet", b"PAR1 no PAR1"),)), r"a\.parquet: not a Parquet file"),
    "missing column": (lambda tmp: Parquet(paths=(bad_parquet(tmp, txt=["a"]),)), r"bad\.parquet: no column 'text'"),
    "column of numbers": (lambda tmp: Parquet(paths=(bad_parquet(tmp, text=[1]),)), r"column 'text' holds int64, not text"),
    "not arrayrecord": (
        lambda tmp: ArrayRecord(paths=(bad(tmp, "a.arrayrecord", b"junk" * 99),)),
        r"a\.arrayrecord: not a whole ArrayRecord",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_source_is_refused_with_its_file_and_place(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    with pytest.raises(DataError, match=message) as caught:
        read(make(tmp_path))
    assert caught.value.hint


def test_a_missing_field_or_column_names_the_one_that_was_meant(tmp_path: Path) -> None:
    for source in (JsonLines(paths=(bad(tmp_path, "a.jsonl", b'{"texts": "x"}\n'),)), Parquet(paths=(bad_parquet(tmp_path, txt=["a"]),))):
        with pytest.raises(DataError) as caught:
            read(source)
        assert "did you mean" in caught.value.hint


def test_a_bucket_that_is_not_there_is_named(gcs: Gcs) -> None:
    with pytest.raises(DataError, match=r"gs://absent/\*\.txt"):
        list_files(Text(paths=("gs://absent/*.txt",)))
