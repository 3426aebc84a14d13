"""`nnxlaunch export` on a run that began from a Hugging Face folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.trainer.configs import config
from tests.trainer.model.models import ORACLE, load
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.export import main

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
    assert "holds no committed step" in capsys.readouterr().err
    parameters = next(
        file for file in Path(run_directory, "checkpoints/3/params").rglob("*") if file.is_file() and file.stat().st_size > 1000
    )
    parameters.write_bytes(parameters.read_bytes()[:-1] + b"?")
    assert main([run_directory, "--out", str(tmp_path / "out"), "--step", "3"]) == 64
    assert "step 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
