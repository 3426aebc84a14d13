"""`nnxlaunch export` on a run that began from a Hugging Face folder, and `nnxlaunch import` of such a folder."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.trainer.configs import config
from tests.trainer.model.models import ORACLE, abstract_params, load
from trainer import importing
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.checkpoint.parameters import load_folder
from trainer.config.data import HuggingFaceTokenizer
from trainer.config.model import Model
from trainer.config.presets import preset_names
from trainer.decode.source import open_source
from trainer.export import main
from trainer.importing import spelled

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_directory(tmp_path: Path) -> str:
    """A run whose step 3 holds the parameters it began from."""
    start = tmp_path / "start"
    start.mkdir()
    for name in ("config.json", "model.safetensors"):
        (start / name).write_bytes((ORACLE / "llama3" / name).read_bytes())
    (start / "tokenizer.json").write_text("{}")
    model = model_from_huggingface(json.loads((start / "config.json").read_text())).model_copy(update={"layers": "unroll"})
    run = config(run_directory=str(tmp_path / "run"), model=model.model_dump(mode="json"), checkpoint={"start_from": str(start)})
    checkpoints = Checkpoints(run.checkpoint, run.run_directory)
    other = {"step": jnp.zeros(())}
    checkpoints.save(3, {"params": load(start, model), "opt": other, "rest": other}, {"config": run.model_dump(mode="json")})
    checkpoints.close()
    return run.run_directory


def test_the_exported_folder_is_the_one_the_run_began_from(run_directory: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launcher", "export", run_directory, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written = json.loads(done.stdout)
    assert (written["step"], written["model_type"], written["dtype"]) == (3, "llama", "float32")
    assert written["files"] == ["config.json", "model.safetensors", "tokenizer.json"] == sorted(file.name for file in out.iterdir())
    assert json.loads((out / "config.json").read_text()) == json.loads((ORACLE / "llama3" / "config.json").read_text())
    original = load_file(ORACLE / "llama3" / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        np.testing.assert_array_equal(value, original.pop(name), err_msg=name)
    assert not original


def test_what_cannot_be_exported_is_refused_in_one_sentence(run_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run_directory, "--out", run_directory]) == 64
    assert f"error: {run_directory} is not empty" in capsys.readouterr().err
    assert main([run_directory, "--out", str(tmp_path / "out"), "--step", "4"]) == 64
    assert "there is no such step\nhint: committed steps: 3" in capsys.readouterr().err
    assert main([str(tmp_path / "elsewhere"), "--out", str(tmp_path / "out")]) == 64
    assert f"{tmp_path / 'elsewhere'} does not exist" in capsys.readouterr().err
    parameters = next(
        file for file in Path(run_directory, "checkpoints/3/params").rglob("*") if file.is_file() and file.stat().st_size > 1000
    )
    parameters.write_bytes(parameters.read_bytes()[:-1] + b"?")
    assert main([run_directory, "--out", str(tmp_path / "out"), "--step", "3"]) == 64
    assert "step 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_exported_by_its_parameters_alone_is_a_folder_to_start_and_to_export_from(
    run_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, again = tmp_path / "kept", tmp_path / "again"
    assert main([run_directory, "--out", str(kept), "--format", "parameters", "--layers", "scan"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["model.safetensors", "parameters.json", "tokenizer.json"]
    source = open_source(str(kept))
    assert source.model.layers == "unroll" and isinstance(source.tokenizer, HuggingFaceTokenizer)
    original = load_file(ORACLE / "llama3" / "model.safetensors")
    np.testing.assert_array_equal(
        source.read(abstract_params(source.model), source.model)["embed/table"], original["model.embed_tokens.weight"]
    )
    assert main([str(kept), "--out", str(again)]) == 0
    for name, value in load_file(again / "model.safetensors").items():
        np.testing.assert_array_equal(value, original.pop(name), err_msg=name)
    assert not original
    assert main([str(kept), "--out", str(tmp_path / "third"), "--step", "3"]) == 64
    assert "has no steps" in capsys.readouterr().err


def test_import_prints_the_keys_of_a_spec_that_starts_from_the_folder(tmp_path: Path) -> None:
    folder, out = ORACLE / "deepseek-v3", tmp_path / "out"
    command = [sys.executable, "-m", "launcher", "import", str(folder), "--out", str(out)]
    section = yaml.safe_load(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert section["checkpoint"] == {"start_from": str(out)}
    model = Model.model_validate(section["model"])
    assert model == model_from_huggingface(json.loads((folder / "config.json").read_text()))
    expected = load(folder, model)
    for path, value in load_folder(str(out), abstract_params(model), model).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_spelled_so_that_it_reads_back(preset: str) -> None:
    model = Model.model_validate({"preset": preset})
    assert Model.model_validate(spelled(model)) == model


def test_an_export_that_could_not_be_written_to_its_end_says_so_and_is_written_by_the_same_command(
    run_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([run_directory, "--out", str(out)]) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: [Errno 27] File too large" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == ["UNFINISHED", "model.safetensors"]
    assert importing.main([str(out)]) == 64
    assert "an export that did not come to its end" in capsys.readouterr().err
    assert main([run_directory, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    (out / "UNFINISHED").touch()
    (out / "notes.txt").touch()
    assert main([run_directory, "--out", str(out)]) == 64
    assert "is not empty: notes.txt" in capsys.readouterr().err and (out / "notes.txt").exists()
    assert main([run_directory, "--out", str(out / "notes.txt")]) == 64
    assert "notes.txt is a file" in capsys.readouterr().err
    assert main([run_directory, "--out", str(out / "notes.txt" / "further")]) == 64
    assert "hint: give a folder that can be made" in capsys.readouterr().err


def test_a_disk_without_room_a_lost_tokenizer_and_a_damaged_folder_are_sentences(
    run_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start" / "tokenizer.json").unlink()
    assert main([run_directory, "--out", str(tmp_path / "out")]) == 0
    assert "the run's tokenizer is `bytes`, which has no file" in capsys.readouterr().err
    # A disk that is full cannot be made without rights to mount one.
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 435_967}))
    assert main([run_directory, "--out", str(tmp_path / "other")]) == 64
    assert f"{tmp_path / 'other'}: 435,968 bytes are to be written, 435,967 are free there" in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())
    for name, damaged, reason in (
        ("model.safetensors", b"", "not a safetensors file"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "not a safetensors file"),
        ("config.json", b"[1]", "config.json: not a JSON object"),
        ("config.json", b"{", "config.json: not JSON"),
    ):
        kept = (tmp_path / "start" / name).read_bytes()
        (tmp_path / "start" / name).write_bytes(damaged)
        assert importing.main([str(tmp_path / "start")]) == 64
        assert reason in capsys.readouterr().err
        (tmp_path / "start" / name).write_bytes(kept)
