"""The cache: the same bytes whoever makes it, however often it is interrupted, and another one when anything changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gcs_emulator import Gcs
from tests.trainer.data.conftest import Configure
from trainer.config.data import Text
from trainer.data import differences, open_data, packing
from trainer.data import prepare as prepare_module
from trainer.data.prepare import Packing, Prepared, prepare_source
from trainer.data.split import StoredRows
from trainer.data.storage import bucket_client
from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.errors import DataError

# What the child processes run: one share of the cache of argv[1]'s texts in argv[2], killed at its argv[5]-th rename.
CHILD = """
import os, signal, sys
from trainer.config.data import Text
from trainer.data.prepare import Packing, prepare_source
from trainer.data.tokenizer import ByteTokenizer
corpus, cache, index, count, left = *sys.argv[1:3], *map(int, sys.argv[3:])
rename = os.replace
def replace(*names):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
os.replace = replace
prepare_source(Text(paths=(corpus + "/**/*.txt",)), tokenizer=ByteTokenizer(), packing_=Packing(sequence_length=16, held_out=0.3),
               cache=cache, process_index=index, process_count=count, report=lambda _: None, piece_bytes=8000)
"""


def make(corpus: object, cache: object, index: int = 0, count: int = 1, tokenizer: Tokenizer | None = None) -> Prepared:
    return prepare_source(
        Text(paths=(f"{corpus}/**/*.txt",)),
        tokenizer=tokenizer or ByteTokenizer(),
        packing_=Packing(sequence_length=16, held_out=0.3),
        cache=str(cache),
        process_index=index,
        process_count=count,
        report=lambda _: None,
        piece_bytes=8000,
    )


def child(corpus: Path, cache: Path, index: int = 0, count: int = 1, kill_at: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(corpus), str(cache), str(index), str(count), str(kill_at)])


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(corpus: Path, tmp_path: Path) -> dict[str, bytes]:
    """The cache made by one process without interruption."""
    prepared = make(corpus, tmp_path / "whole")
    assert len(prepared.tokens["train"]) >= 4
    return contents(tmp_path / "whole")


def test_the_cache_holds_every_document_once_on_one_of_the_two_sides(corpus: Path, tmp_path: Path) -> None:
    prepared = make(corpus, tmp_path / "cache")
    found: list[bytes] = []
    for split, streams in prepared.tokens.items():
        for piece, count in enumerate(streams):
            if count:
                tokens = np.fromfile(Path(prepared.folder.url, f"{piece:05}.{split}"), "<u2") & 0x7FFF
                documents = bytes(np.where(tokens < 256, tokens, 0).astype(np.uint8)).split(b"\0\0")
                found += [document.strip(b"\0") for document in documents]
    texts = [path.read_bytes() for path in corpus.rglob("*.txt") if path.stat().st_size]
    assert sorted(found) == sorted(texts)
    assert prepared.documents["train"] + prepared.documents["eval"] == len(texts) and prepared.documents["eval"] > 0


@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_rows_of_all_pieces_hold_their_streams_from_the_first_token_to_the_last(corpus: Path, tmp_path: Path, length: int) -> None:
    prepared = make(corpus, tmp_path / "cache")
    rows = StoredRows(prepared, "train", length)
    wide = rows.read(np.arange(rows.count))
    first = 0
    for piece, tokens in enumerate(prepared.tokens["train"]):
        stream = np.fromfile(Path(prepared.folder.url, f"{piece:05}.train"), "<u2")
        count = packing.row_count(tokens, length)
        mine = wide[first : first + count]
        read = np.concatenate([mine[0, :1], mine[:, 1:][mine[:, 1:] != packing.PADDING]])
        np.testing.assert_array_equal(read, packing.widen(stream))
        first += count
    assert first == rows.count


def test_a_second_call_makes_nothing_again(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    make(corpus, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_kill_9_at_any_moment_and_the_next_call_completes_the_identical_cache(
    corpus: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    cache = tmp_path / "cache"
    finished: list[int] = []
    for kill_at in (1, 3, 2, 5):  # before a stream is there, before a commit, ... each continues where the last one died
        assert child(corpus, cache, kill_at=kill_at).wait() == -signal.SIGKILL
        finished.append(len(list(cache.rglob("*.json"))))
    assert finished == sorted(finished) and 0 < finished[-1] < len(whole)
    make(corpus, cache)
    assert contents(cache) == whole


def test_two_processes_together_make_what_one_makes(corpus: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    processes = [child(corpus, tmp_path / "cache", index, 2) for index in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path / "cache") == whole


def test_a_process_whose_peer_died_or_never_came_makes_all_of_it(corpus: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert child(corpus, tmp_path / "cache", 0, 3, kill_at=2).wait() == -signal.SIGKILL
    make(corpus, tmp_path / "cache", 2, 3)
    assert contents(tmp_path / "cache") == whole


def test_hosts_without_a_common_directory_each_make_all_of_it(corpus: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    for index in range(2):
        make(corpus, tmp_path / f"host{index}", index, 2)
        assert contents(tmp_path / f"host{index}") == whole


class Overtaken(ByteTokenizer):
    """While it encodes its first group of documents as a helper, the owner of everything commits it all."""

    def __init__(self, corpus: Path, cache: Path) -> None:
        self.corpus, self.cache, self.groups = corpus, cache, 0

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        self.groups += 1
        if self.groups == 1:
            make(self.corpus, self.cache)
        return super().encode(documents)


def test_a_helper_drops_a_piece_its_owner_has_committed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_ENCODE_BYTES", 100)
    monkeypatch.setattr(prepare_module, "_LOOK_EVERY_SECONDS", -1.0)
    helper = Overtaken(corpus, tmp_path / "cache")
    make(corpus, tmp_path / "cache", 99, 100, tokenizer=helper)  # has no piece of its own
    assert helper.groups == 1


def test_leftovers_of_killed_processes_are_gone_when_the_cache_is_complete(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert child(corpus, cache, kill_at=1).wait() == -signal.SIGKILL
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".tmp"]
    make(corpus, cache)
    assert not list(cache.rglob("*.tmp"))


def test_in_a_bucket_two_processes_make_what_one_makes_in_a_folder(corpus: Path, tmp_path: Path, gcs: Gcs, whole: dict[str, bytes]) -> None:
    client = bucket_client()
    first = make(corpus, f"{gcs.url}/cache", 1, 2)
    client.rm([f"{first.folder.url}/{name}" for name in ("index.json", "00001.json", "00002.json")])
    make(corpus, f"{gcs.url}/cache", 0, 2)
    found = {name.removeprefix(f"{gcs.bucket}/cache/"): data for name, data in client.cat(client.find(f"{gcs.bucket}/cache")).items()}
    assert found == whole


def state_of(configure: Configure, corpus: object, **changes: Any) -> dict[str, Any]:
    source = {"type": "text", "paths": [f"{corpus}/**/*.txt"]}
    return open_data(configure(source, **changes)).state(7)


def test_every_change_that_gives_other_rows_is_named_by_what_changed(configure: Configure, corpus: Path, tmp_path: Path) -> None:
    saved = state_of(configure, corpus)
    assert saved["step"] == 7 and differences(saved, state_of(configure, corpus)) == []
    (longer,) = differences(saved, state_of(configure, corpus, sequence_length=32))
    assert (longer.name, longer.message) == ("packing", "the packing changed: sequence_length 16 -> 32")
    (held,) = differences(saved, state_of(configure, corpus, held_out=0.25))
    assert held.message == "the packing changed: held_out 0.0 -> 0.25"
    changed = next(path for path in corpus.rglob("*.txt") if path.stat().st_size)
    changed.write_text("x" + changed.read_text()[1:])  # same size
    (content,) = differences(saved, state_of(configure, corpus))
    assert content.name == "data" and "source 0 (text" in content.message and "30 files" in content.message


def test_moving_or_touching_the_files_changes_nothing(configure: Configure, corpus: Path, tmp_path: Path) -> None:
    saved = state_of(configure, corpus)
    moved = corpus.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.txt"):
        os.utime(path, (1, 1))
    assert differences(saved, state_of(configure, moved)) == []


def test_the_remembered_hash_of_a_large_file_follows_its_content(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.content._MEMO_FROM_BYTES", 1000)
    for path in corpus.rglob("*.txt"):
        os.utime(path, (10**9, 10**9))
    first = make(corpus, tmp_path / "cache").content.fingerprint
    assert (tmp_path / "cache" / "checksums.json").exists()
    assert make(corpus, tmp_path / "cache").content.fingerprint == first
    large = max(corpus.rglob("*.txt"), key=lambda path: path.stat().st_size)
    large.write_text("x" + large.read_text()[1:])
    assert make(corpus, tmp_path / "cache").content.fingerprint != first


def test_a_damaged_cache_is_refused_with_the_file(corpus: Path, tmp_path: Path, configure: Configure) -> None:
    data = open_data(configure({"type": "text", "paths": [f"{corpus}/**/*.txt"]}))
    stream = Path(data.prepared[0].folder.url, "00000.train")
    good = stream.read_bytes()
    stream.write_bytes(b"\xfe\x7f" * (len(good) // 2))  # token 32,766
    with pytest.raises(DataError, match="it holds token 32,766, the model has 512"):
        data.train.rows(data.train.batch_rows(0))
    stream.write_bytes(good[:-2])
    with pytest.raises(DataError, match=rf"the data cache is damaged: .*00000\.train has {len(good) - 2:,} bytes, not {len(good):,}"):
        open_data(configure({"type": "text", "paths": [f"{corpus}/**/*.txt"]}))


def test_a_cache_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the data cache .*file.* cannot be made: Not a directory"):
        make(corpus, tmp_path / "file")
