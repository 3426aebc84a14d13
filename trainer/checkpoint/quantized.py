"""Published weights in fewer bits, read as the values they stand for.

MXFP4 (GPT-OSS): two 4-bit floats (e2m1) a byte, the lower half first, and for 32 of them one power of two (Open Compute
Project, Microscaling Formats 1.0, sections 5.3.3 and 5.4.1). `NAME_blocks` [E, O, I/32, 16] and `NAME_scales` [E, O, I/32]
stand for `NAME` [E, I, O]. Float8 (DeepSeek-V3, 2024, section 3.3): e4m3 values [O, I] and `NAME_scale_inv`, a float32 factor for
each block. E experts, O output and I input dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from trainer.checkpoint.huggingface_files import Tensor
from trainer.errors import CheckpointError

_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_OF_4_BITS: Final = np.concatenate([_E2M1, -_E2M1])
_E8M0_BIAS: Final = 127
_BLOCKS, _SCALES, _SCALE_INV = "_blocks", "_scales", "_scale_inv"


@dataclass(frozen=True)
class Packed(Tensor):
    """A tensor of float32 values that is stored as `file` and the other fields of its blocks say."""

    stored: Tensor
    scales: Tensor
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: MXFP4."""

    def read(self, stored: Callable[..., np.ndarray], first: int, last: int, within: tuple[int, ...] = ()) -> np.ndarray:
        """float32 [last - first, ...]"""
        if within:
            raise ValueError("rows of the leading dim only")
        if self.block is None:
            blocks, scales = stored(self.stored, first, last), stored(self.scales, first, last)
            pairs = np.stack([_E2M1_OF_4_BITS[blocks & 15], _E2M1_OF_4_BITS[blocks >> 4]], axis=-1)
            values = np.ldexp(pairs.reshape(*scales.shape, -1), scales[..., None].astype(np.int32) - _E8M0_BIAS)
            return values.reshape(*scales.shape[:2], -1).swapaxes(1, 2)
        down, across = self.block
        scales = stored(self.scales, first // down, -(-last // down))[np.arange(first, last) // down - first // down]
        return stored(self.stored, first, last).astype(np.float32) * np.repeat(scales, across, axis=1)[:, : self.shape[1]]


def unpacked(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: str) -> dict[str, Tensor]:
    """The tensors of a folder with those that are stored in fewer bits under the names of what they stand for.

    Raises CheckpointError where values and scales do not belong together.
    """
    found = dict(tensors)
    block = block_size(config)
    for name, tensor in tensors.items():
        if name.endswith(_BLOCKS) and (scales := found.get(name.removesuffix(_BLOCKS) + _SCALES)) is not None:
            plain = name.removesuffix(_BLOCKS)
            if (tensor.dtype, scales.dtype, tensor.shape) != ("U8", "U8", (*scales.shape, 16)) or len(scales.shape) != 3:
                raise CheckpointError(f"{folder}: {name} {list(tensor.shape)} has scales {list(scales.shape)}, which are not MXFP4's")
            experts, outputs, inputs = scales.shape
            values = Packed(tensor.file, "F32", (experts, inputs * 32, outputs), tensor.offset, tensor, scales, None)
            del found[name], found[plain + _SCALES]
            found[plain] = values
        elif tensor.dtype == "F8_E4M3" and block is not None and (scales := found.get(name + _SCALE_INV)) is not None:
            wanted = tuple(-(-size // by) for size, by in zip(tensor.shape, block, strict=False))
            if scales.dtype != "F32" or len(tensor.shape) != 2 or scales.shape != wanted:
                raise CheckpointError(f"{folder}: {name}{_SCALE_INV}: {scales.dtype} {list(scales.shape)}, wanted F32 {list(wanted)}")
            del found[name + _SCALE_INV]
            found[name] = Packed(tensor.file, "F32", tensor.shape, tensor.offset, tensor, scales, block)
    return found


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of float8 weights, from a config.json's `quantization_config`."""
    given = config.get("quantization_config")
    size = cast("Mapping[str, Any]", given).get("weight_block_size") if isinstance(given, dict) else None
    if not isinstance(size, list):
        return None
    rows, columns = cast("list[int]", size)
    return rows, columns


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether weights are quantised in a form that `unpacked` knows."""
    given = config.get("quantization_config")
    method = cast("Mapping[str, Any]", given).get("quant_method") if isinstance(given, dict) else None
    return (method == "mxfp4" and config.get("model_type") == "gpt_oss") or (method == "fp8" and block_size(config) is not None)
