"""How far this trainer's model is from transformers' on checkpoints of random configs (tests/oracle/random_cases.py).

python -m tests.oracle.random_compare FOLDER ...: a line for each, and the largest distances. Fails where one is over its bar, is
refused, or has a config.json that ours does not say again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests.oracle.compare import BARS
from tests.trainer.model.models import load, mean_loss, one_document
from trainer.checkpoint.huggingface_config import config_for_huggingface, differences, model_from_huggingface
from trainer.config.weights import weights
from trainer.errors import CheckpointError

NAMES = ("logits", "loss", "gradient norm")


def distances(folder: Path) -> tuple[float, ...]:
    """Of logits the largest absolute error; relative ones of the loss and of its gradient's norm. Raises CheckpointError."""
    model = model_from_huggingface(json.loads((folder / "config.json").read_text()))
    again = model_from_huggingface(config_for_huggingface(model, dtype="float32", max_positions=64))
    if lines := differences(model, again):
        raise CheckpointError(f"config.json made anew says something else: {'; '.join(lines)}")
    model = model.model_copy(update={"compute_dtype": "float32", "matmul_precision": "highest", "remat": "none"})
    params, reference = load(folder, model), np.load(folder / "reference.npz")
    still = {weight.path for weight in weights(model) if not weight.trained}
    batch = one_document(reference["input_ids"], rows=2, length=reference["input_ids"].shape[1])

    def run(params: dict[str, jax.Array]) -> tuple[Any, ...]:
        fixed = {path: params[path] for path in params if path in still}
        value = jax.value_and_grad(lambda moved: mean_loss(model, {**fixed, **moved}, batch), has_aux=True)
        (loss, logits), gradients = value({path: params[path] for path in params if path not in still})
        return logits, loss, optax.tree.norm(gradients)

    quick = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
    found = jax.jit(run).lower(params).compile(quick)(params)  # pyright: ignore[reportArgumentType]
    wanted = (reference["logits"], reference["loss"], reference["grad_norm"])
    scales = (1.0, float(wanted[1]), float(wanted[2]))
    return tuple(
        float(np.abs(np.asarray(ours, np.float64) - theirs).max()) / scale
        for ours, theirs, scale in zip(found, wanted, scales, strict=True)
    )


def main(folders: list[str]) -> int:
    largest, failed = np.zeros(len(NAMES)), list[str]()
    for folder in map(Path, folders):
        try:
            found = distances(folder)
        except CheckpointError as error:
            found = (np.inf,) * len(NAMES)
            print(error)
        jax.clear_caches()
        right = all(value <= bar for value, bar in zip(found, BARS, strict=False))
        failed += [] if right else [folder.name]
        largest = np.maximum(largest, found)
        print(
            f"{folder.name:16}",
            *(f"{name} {value:.1e}" for name, value in zip(NAMES, found, strict=True)),
            "" if right else "OVER",
            flush=True,
        )
    worst = ", ".join(f"{name} {value:.1e} (bar {bar:.0e})" for name, value, bar in zip(NAMES, largest, BARS, strict=False))
    print(
        f"{len(folders) - len(failed)} of {len(folders)} within their bars{': not ' if failed else ''}{', '.join(failed)}; largest: {worst}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
