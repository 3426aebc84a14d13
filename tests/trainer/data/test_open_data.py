"""open_data, its evaluation split, and the two commands that prepare data."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.cli import main
from tests.gcs_emulator import Gcs
from tests.trainer.data.conftest import Configure
from trainer.config.checks import evaluation_has_documents
from trainer.data import BatchLoader, open_data
from trainer.errors import DataError

LIBRARY = {"type": "python_standard_library", "max_bytes": 100_000}


def test_evaluation_covers_every_held_out_token_once_in_the_same_number_of_batches_on_every_host(
    configure: Configure, corpus: Path
) -> None:
    split = open_data(configure({"type": "text", "paths": [f"{corpus}/**/*.txt"]}, evaluate=True, held_out=0.4, global_batch=8)).eval
    assert split is not None and split.row_count % 8  # the last batch needs padding
    hosts = [list(BatchLoader(split, local_rows=range(host * 4, host * 4 + 4), prefetch_batches=0)) for host in range(2)]
    assert [len(batches) for batches in hosts] == [split.batches] * 2
    joined = [np.concatenate([first["weights"], second["weights"]]) for (_, first), (_, second) in zip(*hosts, strict=True)]
    everything = split.rows(np.arange(split.row_count))
    assert sum(weights.sum() for weights in joined) == everything["weights"].sum()
    padded = split.batches * 8 - split.row_count
    assert not joined[-1][-padded:].any() and joined[-1][0].any()


def test_training_and_evaluation_share_no_document(configure: Configure, corpus: Path) -> None:
    data = open_data(configure({"type": "text", "paths": [f"{corpus}/**/*.txt"]}, evaluate=True, held_out=0.4, sequence_length=4096))
    assert data.eval is not None

    def documents(split: Any) -> set[int]:
        text = bytes(int(token) if token < 256 else 32 for row in split.rows(np.arange(split.row_count))["inputs"] for token in row)
        return {int(word[5:].split(b"-")[0]) for word in text.split() if word.startswith("wörd".encode())}

    train, held_out = documents(data.train), documents(data.eval)
    assert not train & held_out and train | held_out == set(range(1, 30))


def test_an_empty_evaluation_split_is_an_error_that_says_how_to_fill_it(configure: Configure, corpus: Path) -> None:
    source = {"type": "text", "paths": [f"{corpus}/part0/27.txt"]}
    with pytest.raises(DataError, match=r"none of 1 documents is held out at data\.held_out = 0\.001") as caught:
        open_data(configure(source, evaluate=True, held_out=0.001))
    assert "separator" in caught.value.hint
    (problem,) = evaluation_has_documents(configure(source, evaluate=True, held_out=0.0))
    assert str(problem).startswith("data.held_out: eval is set, but no document is held out")


def test_a_source_without_a_row_to_train_on_is_named(configure: Configure, corpus: Path) -> None:
    source = {"type": "text", "paths": [f"{corpus}/part0/00.txt"]}
    with pytest.raises(DataError, match=r"00\.txt: nothing to train on: 1 files of 0 bytes"):
        open_data(configure(source))


def test_synthetic_batches_repeat_after_as_many_as_were_asked_for_and_need_no_cache(configure: Configure, tmp_path: Path) -> None:
    data = open_data(configure({"type": "synthetic", "distinct_batches": 3}, vocab_size=300, evaluate=True))
    batches = [data.train.rows(data.train.batch_rows(n)) for n in range(6)]
    for n in range(3):
        np.testing.assert_array_equal(batches[n]["inputs"], batches[n + 3]["inputs"])
        np.testing.assert_array_equal(batches[n]["inputs"][:, 1:], batches[n]["targets"][:, :-1])
        assert batches[n]["weights"].all() and (batches[n]["segments"] == 1).all()
    assert not np.array_equal(batches[0]["inputs"], batches[1]["inputs"])
    tokens = np.concatenate([batch["inputs"] for batch in batches])
    assert 0 <= tokens.min() and 250 < tokens.max() < 300
    assert data.eval is not None and data.eval.batches == 1
    assert not (tmp_path / "cache").exists()


def test_the_standard_library_needs_nothing_and_trains_on_python(configure: Configure) -> None:
    data = open_data(configure(LIBRARY, sequence_length=256))
    rows = data.train.rows(np.arange(data.train.row_count))
    assert rows["inputs"].size > 100_000
    assert b"import" in bytes(rows["inputs"][rows["inputs"] < 256].astype(np.uint8))


def test_a_batch_is_read_from_a_bucket_as_from_a_folder(configure: Configure, corpus: Path, gcs: Gcs) -> None:
    source = {"type": "text", "paths": [f"{corpus}/**/*.txt"]}
    local, remote = (open_data(configure(source, **where)) for where in ({}, {"cache_directory": f"{gcs.url}/open"}))
    for (_, expected), (_, found) in zip(BatchLoader(local.train), BatchLoader(remote.train), strict=False):
        for name, array in expected.items():
            np.testing.assert_array_equal(array, found[name])
        break


def test_a_fault_while_prefetching_reaches_the_loop_as_it_is(configure: Configure, corpus: Path) -> None:
    data = open_data(configure({"type": "text", "paths": [f"{corpus}/**/*.txt"]}))
    batches = iter(BatchLoader(data.train))
    stream = Path(data.prepared[0].folder.url, "00000.train")
    stream.write_bytes(b"\xfe\x7f" * (stream.stat().st_size // 2))
    with pytest.raises(DataError, match="the data cache is damaged"):
        for _ in range(9):
            next(batches)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)


def test_the_prepare_command_makes_the_cache_the_run_then_uses(configure: Configure, tmp_path: Path) -> None:
    config = configure(LIBRARY)
    (tmp_path / "train.json").write_text(config.model_dump_json())
    done = run("trainer.data", "prepare", "--config", str(tmp_path / "train.json"), "--set", "data.held_out=0.1", "--processes", "2")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    (source,) = summary["sources"]
    assert source["train"]["documents"] > source["eval"]["documents"] > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    data = open_data(configure(LIBRARY, held_out=0.1))
    assert data.train.fingerprint == summary["fingerprint"] and data.train.row_count == source["train"]["rows"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_the_prepare_command_ends_with_64_and_one_sentence_for_bad_data(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(configure({"type": "text", "paths": ["absent/*.txt"]}).model_dump_json())
    done = run("trainer.data", "prepare", "--config", str(tmp_path / "train.json"))
    assert done.returncode == 64
    assert done.stderr == "error: no file matches absent/*.txt\nhint: check the path and the glob; ** crosses folders\n"


def test_the_launcher_prepares_the_data_of_a_job_spec_in_the_directory_its_run_will_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = {
        "name": "prepared",
        "cpu": {"hosts": 2},
        "directory": str(tmp_path / "runs"),
        "train": {
            "steps": 10,
            "model": {"preset": "tiny", "vocab_size": 258},
            "batch": {"global_batch": 4, "sequence_length": 64},
            "schedule": {"type": "constant", "learning_rate": 0.001},
            "data": {"sources": [LIBRARY]},
        },
    }
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))  # the launcher needs no file that a kill would leave there
        main(["data", "prepare", str(tmp_path / "job.yaml"), "--set", "train.batch.sequence_length=32"])
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err
    (source,) = json.loads(printed.out)["sources"]
    assert Path(source["folder"]).parent == tmp_path / "runs" / "data"
    refused = run("launcher", "data", "prepare", str(tmp_path / "job.yaml"), "--set", "train.model.vocab_size=100")
    assert refused.returncode == 64 and "the tokenizer has 258 tokens" in refused.stderr
