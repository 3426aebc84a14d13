"""Peak bfloat16 throughput of a device, for MFU."""

from __future__ import annotations

import os
from typing import Final

from trainer import contract

TFLOPS: Final = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
"""Dense bfloat16 TFLOP/s of what `jax.devices()` lists, by its `device_kind` (a TPU7x chip is two devices)."""


def peak_tflops(device_kind: str) -> float | None:
    """TFLOP/s of one device: the launcher's value where it set one, else a known kind's, else None."""
    given = os.environ.get(contract.PEAK_TFLOPS_PER_DEVICE)
    return float(given) if given else TFLOPS.get(device_kind)
