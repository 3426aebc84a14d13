"""The work all step and start-up figures are about: a 20.58 M-parameter Llama-like model in float32.

4 layers of width 256, 4 heads of 64, gated MLP of 1024, vocabulary 32,000 with untied head; sequences of 256;
AdamW with decay on everything, clip 1, cosine schedule; layers scanned, remat `full`. One device: 4 sequences
(1,024 tokens) a step; eight devices, `fsdp=8`: 8 sequences (2,048 tokens).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.config import TrainConfig, validate

LENGTH = 256
VOCABULARY = 32_000


def document(run_directory: str, devices: int, **changes: Any) -> dict[str, Any]:
    """The TrainConfig of the work, as a document."""
    block = {"attention": {"heads": 4, "kv_heads": 4, "head_dim": 64}, "mlp": {"hidden": 1024}}
    return {
        "run_directory": run_directory,
        "steps": 30,
        "model": {
            "vocab_size": VOCABULARY,
            "width": 256,
            "compute_dtype": "float32",
            "remat": "full",
            "layers": "scan",
            "segments": [{"repeats": 4, "pattern": [block]}],
        },
        "batch": {"global_batch": sequences(devices), "sequence_length": LENGTH},
        "optimizer": {"b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "decay": "all", "clip_norm": 1.0},
        "schedule": {"type": "cosine", "learning_rate": 3e-5, "warmup_steps": 3, "final_fraction": 0.1},
        "data": {"sources": [{"type": "synthetic"}]},
        "mesh": {"ici": {"fsdp": -1}},
        **changes,
    }


def config(devices: int, run_directory: str = "unused") -> TrainConfig:
    return validate(TrainConfig, document(run_directory, devices))


def sequences(devices: int) -> int:
    return 4 if devices == 1 else devices


def batch(devices: int) -> dict[str, np.ndarray]:
    """One batch of random full rows, the same at every call: int32 [B, T], weights float32."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (sequences(devices), LENGTH + 1), dtype=np.int32)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), inputs.shape).copy()
    ones = np.ones_like(inputs)
    return {"inputs": inputs, "targets": targets, "positions": positions, "segments": ones, "weights": ones.astype(np.float32)}
