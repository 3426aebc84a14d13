"""Hugging Face folders in and out: the same bits, and every misfit named."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from tests.trainer.model.models import ORACLE, abstract_params, load, random_params, reader, small
from trainer.checkpoint.huggingface import export_huggingface, load_huggingface
from trainer.checkpoint.huggingface_config import config_for_huggingface, differences, model_from_huggingface, segments_of
from trainer.config.model import Block, Model
from trainer.config.presets import preset_names
from trainer.errors import CheckpointError
from trainer.parallel.sharding import Layout
from trainer.parameters import open_parameters


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(folder: Path, original: Path) -> None:
    found = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    expected = load_file(original / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


FAMILIES = sorted(folder.name for folder in ORACLE.iterdir() if (folder / "trajectory.npz").exists())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_folder_read_onto_a_mesh_and_written_again_has_the_same_bits(family: str, layers: str, tmp_path: Path) -> None:
    original = read_config(ORACLE / family)
    model = model_from_huggingface(original).model_copy(update={"layers": layers})
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    layout = Layout(mesh)
    wanted = abstract_params(model, lambda weight: layout.sharding(weight.axes, weight.shape))
    params = load_huggingface(str(ORACLE / family), wanted, model)
    for path, leaf in wanted.items():
        assert (params[path].shape, params[path].dtype, params[path].sharding) == (leaf.shape, leaf.dtype, leaf.sharding), path
    export_huggingface(reader(params), model, str(tmp_path), max_positions=1, original=original)
    assert_same_tensors(tmp_path, ORACLE / family)
    assert read_config(tmp_path) == original


def test_a_large_model_is_written_in_several_files_with_an_index_and_read_back(tmp_path: Path) -> None:
    original = read_config(ORACLE / "qwen3")
    model = model_from_huggingface(original)
    params = load(ORACLE / "qwen3", model)
    export_huggingface(reader(params), model, str(tmp_path), max_positions=256, original=original, max_file_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert all(file.stat().st_size < 110_000 for file in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params.values())
    assert_same_tensors(tmp_path, ORACLE / "qwen3")
    for path, value in load(tmp_path, model).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


def test_biases_ties_windows_and_patterns_survive_the_way_out_and_back(tmp_path: Path) -> None:
    full = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qkv_bias": True}, "mlp": {"hidden": 12}}
    local = {**full, "attention": {**full["attention"], "window": 5}}
    model = small(pattern=(full, local), repeats=2, tie_embeddings=True)
    params = random_params(model)
    export_huggingface(reader(params), model, str(tmp_path), max_positions=64)
    written = read_config(tmp_path)
    assert (written["model_type"], written["layer_types"][:2]) == ("qwen2", ["full_attention", "sliding_attention"])
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert not differences(model, model_from_huggingface(written))
    for path, value in load(tmp_path, model).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


def test_bfloat16_files_are_written_rounded_and_read_as_float32(tmp_path: Path) -> None:
    model = small()
    params = random_params(model)
    export_huggingface(reader(params), model, str(tmp_path), max_positions=64, dtype="bfloat16")
    assert read_config(tmp_path)["dtype"] == "bfloat16"
    for path, value in load(tmp_path, model).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, params[path].astype("bfloat16").astype("float32"), err_msg=path)


def test_every_tensor_that_does_not_fit_is_named_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    original = read_config(ORACLE / "llama3")
    model = model_from_huggingface(original)
    tensors = load_file(ORACLE / "llama3" / "model.safetensors")
    tensors["model.layers.1.self_attn.qproj.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].astype(np.int8)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(original | {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, model.model_copy(update={"vocab_size": 200}))
    message = str(error.value)
    for sentence in (
        "vocab_size: 200 in the model, 128 in config.json",
        "layers 0-2: attention.rope.theta: 500000.0 in the model, 9.0 in config.json",
        "model.layers.1.self_attn.q_proj.weight: missing (nearest: model.layers.1.self_attn.qproj.weight)",
        "model.layers.1.self_attn.qproj.weight: unknown to this model (nearest: model.layers.1.self_attn.q_proj.weight)",
        "model.norm.weight: missing",
        "model.embed_tokens.weight: shape [128, 64], wanted [200, 64]",
        "lm_head.weight: shape [128, 64], wanted [200, 64]",
        "model.layers.0.mlp.up_proj.weight: shape [95, 64], wanted [96, 64]",
        "model.layers.2.mlp.down_proj.weight: dtype I8",
    ):
        assert sentence in message, sentence


def test_a_cut_file_and_a_folder_without_weights_are_refused(tmp_path: Path) -> None:
    model = model_from_huggingface(read_config(ORACLE / "llama3"))
    (tmp_path / "config.json").write_text(json.dumps(read_config(ORACLE / "llama3")))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path, model)
    (tmp_path / "model.safetensors").write_bytes((ORACLE / "llama3" / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="439,031 bytes long, its header says 439,032"):
        load(tmp_path, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_json_made_anew_says_what_the_original_said(family: str) -> None:
    original = read_config(ORACLE / family)
    model = model_from_huggingface(original)
    written = config_for_huggingface(model, dtype="float32", max_positions=64)
    assert not differences(model, model_from_huggingface(written))
    assert (written["model_type"], written["architectures"]) == (original["model_type"], original["architectures"])


@pytest.mark.parametrize("preset", preset_names())
def test_a_presets_config_json_reads_back_as_the_preset(preset: str) -> None:
    model = Model.model_validate({"preset": preset})
    config = config_for_huggingface(model, dtype="bfloat16", max_positions=4096)
    assert not differences(model, model_from_huggingface(config))
    assert preset == "tiny" or preset.replace("-", "").startswith(re.sub("_text|_", "", config["model_type"]))


def test_older_config_files_are_read_with_the_defaults_they_rely_on() -> None:
    base = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": None, "torch_dtype": "float16",
    }  # fmt: skip
    assert not differences(model_from_huggingface(base), Model.model_validate({"preset": "llama2-7b"}))
    scaled = base | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                                                          "original_max_position_embeddings": 8192}}  # fmt: skip
    rope = model_from_huggingface(scaled).segments[0].pattern[0].attention.rope
    assert rope.theta == 5e5 and rope.scaling is not None and rope.scaling.original_length == 8192
    qwen = base | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 20}
    segments = model_from_huggingface(qwen).segments
    assert [(segment.repeats, segment.pattern[0].attention.window) for segment in segments] == [(20, None), (12, 7)]
    mistral = model_from_huggingface(base | {"model_type": "mistral"}).segments[0].pattern[0].attention
    assert (mistral.kv_heads, mistral.window) == (8, 4096)
    assert model_from_huggingface(base | {"model_type": "mistral", "sliding_window": None}).segments[0].pattern[0].attention.window is None
    assert model_from_huggingface(base | {"model_type": "qwen3", "hidden_size": 1024}).segments[0].pattern[0].attention.head_dim == 128
    oss = model_from_huggingface({key: value for key, value in base.items() if key != "rope_scaling"} | {"model_type": "gpt_oss"})
    assert oss.blocks[0].attention.rope == Model.model_validate({"preset": "gpt-oss-20b"}).blocks[0].attention.rope
    seeing = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 1024}}  # the rest is the class's
    assert model_from_huggingface(seeing).vocab_size == 262_208


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mistrall"}, "did you mean 'mistral'"),
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"rope_parameters\.factor: missing for rope_type linear"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types: 1 of them for 3 layers"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config \(mxfp4\): known: mxfp4 of gpt_oss, fp8"),
        ({"model_type": "deepseek_v3", "n_group": 6, "num_hidden_layers": 4}, r"experts \(256\) must be a multiple of router\.groups"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func: 'softmax'; here it is 'sigmoid' in deepseek_v3"),
        ({"hidden_act": "relu2"}, "hidden_act: 'relu2'"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": None}, "intermediate_size: missing"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: '3', must be a whole number"),
        ({"rope_parameters": "yes"}, "rope_parameters: 'yes', must be an object"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type: 'longrope'"),  # counts, whatever else is there
        ({"num_attention_heads": 3}, r"describes no model:\n  heads \(3\) must be a multiple"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types: linear_attention"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        model_from_huggingface(read_config(ORACLE / "llama3") | change)


def test_a_model_no_family_describes_is_refused_with_the_difference(tmp_path: Path) -> None:
    model = small(head_soft_cap=30.0)
    with pytest.raises(CheckpointError, match=r"nearest differs in:\n  head_soft_cap: 30\.0 in the model, None in config\.json"):
        export_huggingface(reader(random_params(model)), model, str(tmp_path), max_positions=1)


def test_modules_that_a_family_has_no_place_for_are_left_out(tmp_path: Path) -> None:
    model = small(multi_token={"depth": 2})
    params = random_params(model)
    written = export_huggingface(reader(params), model, str(tmp_path), max_positions=16)
    assert written == model.model_copy(update={"multi_token": None})
    for path, value in load(tmp_path, written).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


def test_layers_become_the_shortest_repeating_pattern_or_runs() -> None:
    a, b = (
        Block.model_validate({"attention": {"heads": 1, "kv_heads": 1, "head_dim": 2, "window": w}, "mlp": {"hidden": 2}})
        for w in (None, 3)
    )

    def spelled(blocks: list[Block]) -> list[tuple[int, int]]:
        segments = segments_of(blocks)
        assert [block for segment in segments for _ in range(segment.repeats) for block in segment.pattern] == blocks
        return [(len(segment.pattern), segment.repeats) for segment in segments]

    assert spelled([a] * 5) == [(1, 5)]
    assert spelled([a, b] * 3) == [(2, 3)]
    assert spelled([a, a, b] * 2 + [a, a]) == [(3, 2), (1, 2)]
    assert spelled([a, b, b, b]) == [(1, 1), (1, 3)]


def test_a_folder_in_a_bucket_is_read_and_written_like_a_local_one(gcs: Any, tmp_path: Path) -> None:
    original = read_config(ORACLE / "llama3")
    model = model_from_huggingface(original)
    params = load(ORACLE / "llama3", model)
    folder = f"{gcs.url}/exported"
    export_huggingface(reader(params), model, folder, max_positions=1, original=original, max_file_bytes=200_000)
    for path, value in load_huggingface(folder, abstract_params(model), model).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


@pytest.mark.parametrize("prefixes", [("language_model.", "language_model."), ("model.language_model.", "")])
def test_of_a_model_that_sees_images_the_language_model_is_read(prefixes: tuple[str, str], tmp_path: Path) -> None:
    text = read_config(ORACLE / "gemma3")
    model = model_from_huggingface(text)
    tensors = load_file(ORACLE / "gemma3" / "model.safetensors")
    inner, head = prefixes
    named = {(head + name if inner == head else inner + name.removeprefix("model.")): value for name, value in tensors.items()}
    named["vision_tower.vision_model.embeddings.position_embedding.weight"] = np.zeros((2, 2), np.float32)
    save_file(named, tmp_path / "model.safetensors")
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "dtype": "float32", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert model_from_huggingface(outer) == model
    expected = load(ORACLE / "gemma3", model)
    for path, value in load(tmp_path, model).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    with ExitStack() as opened:
        found = open_parameters(str(tmp_path), opened)
        assert found.notes == ("1 tensors of what sees images are left out",)
        assert found.original is not None and found.original["architectures"] == ["Gemma3ForCausalLM"]


def test_an_index_that_is_none_and_a_header_that_contradicts_itself_are_refused(tmp_path: Path) -> None:
    config = read_config(ORACLE / "llama3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for index, reason in (
        ({}, "weight_map must say"),
        ({"weight_map": {"model.norm.weight": "../model.safetensors"}}, "weight_map must say"),
        ({"weight_map": {"model.norm.weight": "model-1.safetensors"}}, r"model-1\.safetensors: not found"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=reason):
            load(tmp_path, model_from_huggingface(config))
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 128]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 128 bytes for F32 of shape \[64\]"):
        load(tmp_path, model_from_huggingface(config))
