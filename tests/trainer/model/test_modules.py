"""Modules of multi-token prediction as DeepSeek-V3 is published with them, behind the last layer: read, run, written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.trainer.model.models import ORACLE, abstract_params, one_document, reader, with_params
from trainer.checkpoint.huggingface import export_huggingface, left_out, load_huggingface, modules_of, open_huggingface
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.config.model import Model, MultiToken
from trainer.decode.source import open_source
from trainer.errors import CheckpointError

FOLDER = ORACLE / "deepseek-v3-modules"
QUICK: dict[str, bool | str] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
CONFIG = json.loads((FOLDER / "config.json").read_text())


def model_of(depth: int) -> Model:
    exact = {"compute_dtype": "float32", "matmul_precision": "highest", "remat": "none"}
    return model_from_huggingface(CONFIG).model_copy(update={**exact, "multi_token": MultiToken(depth=depth) if depth else None})


def test_their_logits_are_those_of_the_published_formula_and_an_export_has_the_same_bits(tmp_path: Path) -> None:
    model, reference = model_of(2), np.load(FOLDER / "reference.npz")
    params = load_huggingface(str(FOLDER), abstract_params(model), model)
    ids = reference["input_ids"]
    batch = one_document(ids, rows=2, length=ids.shape[1])

    def logits(params: dict[str, jax.Array]) -> list[jax.Array]:
        whole = with_params(model, params)
        found = whole.run(batch["inputs"], batch["positions"], batch["segments"])
        return [whole.logits(hidden, batch["segments"]) for hidden in (found.hidden, *found.further)]

    wanted = [reference["logits"], reference["module_1"], reference["module_2"]]
    for k, (ours, theirs) in enumerate(zip(jax.jit(logits).lower(params).compile(QUICK)(params), wanted, strict=True)):
        np.testing.assert_allclose(ours[:, : ids.shape[1] - k], theirs, atol=5e-5, rtol=0, err_msg=f"module {k}")

    original, written = load_file(FOLDER / "model.safetensors"), tmp_path / "written"
    export_huggingface(reader(params), model, str(written), max_positions=64, original=CONFIG)
    for name, tensor in load_file(written / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, original.pop(name), err_msg=name)
    assert not original
    assert json.loads((written / "config.json").read_text()) == {**CONFIG, "dtype": "float32"}


def test_modules_that_are_not_asked_for_are_left_out_with_a_word_and_written_neither(tmp_path: Path) -> None:
    with open_huggingface(str(FOLDER)) as files:
        (note,) = left_out(files)
        assert modules_of(files) == 2
    assert (open_source(str(FOLDER)).model.depth, open_source(str(FOLDER), drafts=True).model.depth) == (0, 2)
    assert note.startswith("88 tensors of modules of multi-token prediction are left out") and "multi_token: {depth: 1}" in note
    for original, depth in ((CONFIG, 0), (None, 1)):
        model = model_of(depth)
        params = load_huggingface(str(FOLDER), abstract_params(model), model)
        folder = tmp_path / str(depth)
        export_huggingface(reader(params), model, str(folder), max_positions=64, original=original)
        layers = {int(name.split(".")[2]) for name in load_file(folder / "model.safetensors") if name.startswith("model.layers.")}
        assert layers == set(range(3 + depth))
        assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == depth


def without(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def more(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


def other(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: tensors[name] + 1})


@pytest.mark.parametrize(
    ("change", "depth", "reason"),
    [
        (without("model.layers.4.eh_proj.weight"), 2, r"model\.layers\.4\.eh_proj\.weight: missing"),
        (more("model.layers.3.eh_proj.bias"), 1, r"model\.layers\.3\.eh_proj\.bias: unknown to this model"),
        (other("model.layers.3.embed_tokens.weight"), 1, r"embed_tokens\.weight: another one than model\.embed_tokens\.weight"),
        (other("model.layers.4.shared_head.head.weight"), 2, r"shared_head\.head\.weight: another one than lm_head\.weight"),
        (lambda _: None, 3, r"model\.layers\.5\.enorm\.weight: missing"),
    ],
    ids=["missing", "unknown", "embedding", "head", "too many"],
)
def test_a_module_that_is_not_one_of_this_model_is_refused_by_name(
    change: Callable[[dict[str, np.ndarray]], Any], depth: int, reason: str, tmp_path: Path
) -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    change(tensors)
    shutil.copy(FOLDER / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    model = model_of(depth)
    with pytest.raises(CheckpointError, match=reason):
        load_huggingface(str(tmp_path), abstract_params(model), model)
