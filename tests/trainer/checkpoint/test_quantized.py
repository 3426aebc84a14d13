"""Published weights in fewer bits are read as what the formats' definitions say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.trainer.model.models import ORACLE, load
from trainer.checkpoint.huggingface import sources
from trainer.checkpoint.huggingface_config import family_of, model_from_huggingface
from trainer.checkpoint.huggingface_files import SafetensorsFolder
from trainer.errors import CheckpointError
from trainer.export import export

DTYPES = {"uint8": "U8", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}


def save(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """As safetensors; the library's own writer for numpy knows no float8."""
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = {"dtype": DTYPES[value.dtype.name], "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config))


def original(family: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with SafetensorsFolder(str(ORACLE / family)) as files:
        return {name: files.read(name, 0, tensor.shape[0]) for name, tensor in files.tensors.items()}, files.config


def e2m1(bits: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)."""
    sign, exponent, mantissa = -1.0 if bits & 8 else 1.0, (bits >> 1) & 3, bits & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_mxfp4_experts_are_the_numbers_of_the_format_and_are_exported_as_numbers(tmp_path: Path) -> None:
    config = json.loads((ORACLE / "gpt-oss" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 32, "quantization_config": {"quant_method": "mxfp4"}}
    model, random = model_from_huggingface(config), np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}
    for source in [source for group in sources(model, family_of(config)).values() for source in group]:
        if not source.name.endswith(("gate_up_proj", "down_proj")):
            tensors[source.name] = np.zeros(source.shape, np.float32)
            continue
        experts, inputs, outputs = source.shape
        blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = random.integers(120, 130, (experts, outputs, inputs // 32), dtype=np.uint8)
        tensors |= {f"{source.name}_blocks": blocks, f"{source.name}_scales": scales}
        wanted[source.name] = np.empty(source.shape, np.float32)
        for expert, column, output in np.ndindex(source.shape):
            byte = int(blocks[expert, output, column // 32, column % 32 // 2])
            scale = 2.0 ** (int(scales[expert, output, column // 32]) - 127)
            wanted[source.name][expert, column, output] = e2m1(byte >> 4 if column % 2 else byte & 15) * scale
    save(tmp_path, tensors, config)
    params = load(tmp_path, model)
    layer = "model.layers.0.mlp.experts."
    np.testing.assert_array_equal(params["segments/0/0/mlp/experts/gate"][0], wanted[layer + "gate_up_proj"][..., 0::2])
    np.testing.assert_array_equal(params["segments/0/0/mlp/experts/up"][0], wanted[layer + "gate_up_proj"][..., 1::2])
    np.testing.assert_array_equal(params["segments/0/0/mlp/experts/down"][0], wanted[layer + "down_proj"])

    export(str(tmp_path), str(tmp_path / "out"), dtype="float32")
    with SafetensorsFolder(str(tmp_path / "out")) as files:
        assert "quantization_config" not in files.config
        for name, value in wanted.items():
            np.testing.assert_array_equal(files.read(name, 0, len(value)), value, err_msg=name)


def test_float8_weights_are_multiplied_by_the_scales_of_their_blocks(tmp_path: Path) -> None:
    tensors, config = original("deepseek-v3")
    expected = load(ORACLE / "deepseek-v3", model_from_huggingface(config))
    random = np.random.default_rng(1)
    rows, columns = 5, 3  # no multiple of any dim, so that last blocks are smaller
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [rows, columns]}}
    for name, value in list(tensors.items()):
        if value.ndim == 2 and "layers" in name and "mlp.gate." not in name:
            blocks = [-(-size // by) for size, by in zip(value.shape, (rows, columns), strict=True)]
            scales = random.uniform(0.5, 2, blocks).astype(np.float32)
            spread = np.kron(scales, np.ones((rows, columns), np.float32))[: value.shape[0], : value.shape[1]]
            tensors[name], tensors[f"{name}_scale_inv"] = (value / spread).astype(ml_dtypes.float8_e4m3fn), scales
    save(tmp_path, tensors, config)
    found = load(tmp_path, model_from_huggingface(config))
    for path, value in expected.items():
        rounding = 0.0 if "norm" in path or not path.startswith("segments") or "router" in path else 2.0**-4  # three bits of mantissa
        np.testing.assert_allclose(found[path], value, rtol=rounding, atol=2.0**-9 * rounding * 64, err_msg=path)

    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = tensors[name][:-1]
    save(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=f"{name}: F32 .*, wanted F32"):
        load(tmp_path, model_from_huggingface(config))
