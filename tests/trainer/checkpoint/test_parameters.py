"""Parameter-only checkpoints: the same bits in every form, on every layout, and every misfit named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

from tests.trainer.model.models import ORACLE, abstract_params, load, one_document, random_params, reader, small, with_params
from trainer.checkpoint.exchange import holdings
from trainer.checkpoint.huggingface import export_huggingface
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.checkpoint.parameters import export_parameters, load_folder
from trainer.config.model import Model
from trainer.config.weights import weights
from trainer.errors import CheckpointError
from trainer.parallel.sharding import Layout

MIXED = ({"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 24}},
         {"attention": {"heads": 2, "kv_heads": 2, "head_dim": 8, "sinks": True},
          "mlp": {"type": "moe", "experts": 4, "experts_per_token": 2, "hidden": 8, "shared_hidden": 8}})  # fmt: skip


def assert_same(found: Mapping[str, jax.Array], expected: Mapping[str, jax.Array]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("written", ["scan", "unroll"])
@pytest.mark.parametrize("run", ["scan", "unroll"])
def test_a_model_that_no_family_describes_comes_back_in_any_form_on_a_mesh(run: str, written: str, tmp_path: Path) -> None:
    model = small(pattern=MIXED, repeats=3, head_soft_cap=3.0, layers=run)
    params = random_params(model)
    export_parameters(reader(params), model, str(tmp_path), layers=written, max_file_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    declared = {weight.path: weight.shape for weight in weights(model.model_copy(update={"layers": written}))}
    assert {name: value.shape for name, value in tensors.items()} == declared
    layout = Layout(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))
    wanted = abstract_params(model, lambda weight: layout.sharding(weight.axes, weight.shape))
    assert_same(load_folder(str(tmp_path), wanted, model), params)


def test_repeats_held_by_pipeline_stages_and_behind_them_are_the_layers_of_the_folder(tmp_path: Path) -> None:
    model = small(pattern=MIXED, repeats=6)
    params = random_params(model)
    export_parameters(reader(params), model, str(tmp_path))
    pipelined: dict[str, jax.Array] = {}
    for path, value in params.items():
        _, _, tail = path.partition("/0/0/") if "/0/0/" in path else path.partition("/0/1/")
        if not tail:
            pipelined[path] = value
            continue
        place = path.removesuffix(tail)
        pipelined[f"{place}pipeline/{tail}"] = value[:4].reshape(2, 2, 1, *value.shape[1:])
        for repeat in (0, 1):
            pipelined[f"{place}after/{repeat}/{tail}"] = value[4 + repeat]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device) for path, value in pipelined.items()}
    assert_same(load_folder(str(tmp_path), wanted, model), pipelined)
    held = holdings({path: value.shape for path, value in pipelined.items()})
    assert {part.stacked for part in held.values()} == set(params)
    again = tmp_path / "again"
    export_parameters(reader(pipelined), model, str(again))
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
def test_logits_of_an_exported_folder_are_those_of_the_training_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    original = json.loads((ORACLE / family / "config.json").read_text())
    model = float32(model_from_huggingface(original))
    params = random_params(model)
    batch = one_document(np.arange(3, 27, dtype=np.int32).reshape(2, 12), rows=2, length=16)

    @jax.jit
    def logits(params: Mapping[str, jax.Array]) -> jax.Array:
        return with_params(model, params)(batch["inputs"], batch["positions"], batch["segments"])

    export_huggingface(reader(params), model, str(tmp_path), max_positions=64, dtype="float32")
    assert float32(model_from_huggingface(json.loads((tmp_path / "config.json").read_text()))) == model
    compiled = logits.lower(params).compile({"xla_backend_optimization_level": "0"})
    np.testing.assert_array_equal(compiled(load(tmp_path, model)), compiled(params))


def float32(model: Model) -> Model:
    return model.model_copy(update={"compute_dtype": "float32", "matmul_precision": "highest"})


def test_what_is_read_of_a_run_at_a_time_is_one_layer(tmp_path: Path) -> None:
    model = small(pattern=MIXED, repeats=3)
    params = random_params(model)
    largest, asked = max(np.prod(weight.layer_shape) for weight in weights(model)), []
    read = reader(params)

    def counted(path: str, repeat: int | None) -> np.ndarray:
        asked.append((path, repeat))
        values = read(path, repeat)
        assert values.size <= largest
        return values

    export_parameters(counted, model, str(tmp_path))
    assert len(asked) == len(set(asked)) == sum(weight.shape[0] if weight.layer_dims else 1 for weight in weights(model))


def test_bfloat16_is_rounded_once_and_read_in_the_dtype_that_is_wanted(tmp_path: Path) -> None:
    model = small()
    params = random_params(model)
    export_parameters(reader(params), model, str(tmp_path), dtype="bfloat16")
    assert_same(
        load_folder(str(tmp_path), abstract_params(model), model),
        {path: value.astype(jnp.bfloat16).astype(jnp.float32) for path, value in params.items()},
    )


def test_another_model_a_lost_tensor_and_another_format_are_named(tmp_path: Path) -> None:
    model = small()
    export_parameters(reader(random_params(model)), model, str(tmp_path))
    other = small(vocab_size=32)
    with pytest.raises(CheckpointError) as error:
        load_folder(str(tmp_path), abstract_params(other), other)
    assert "parameters.json: vocab_size: 32 in the model, 31 in parameters.json" in str(error.value)
    assert "embed/table: shape [31, 16], wanted [32, 16]" in str(error.value)
    (tmp_path / "parameters.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(CheckpointError, match="format 7; this version reads 1"):
        load_folder(str(tmp_path), abstract_params(model), model)
