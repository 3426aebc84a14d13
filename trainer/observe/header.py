"""What a run was: versions, flags, mesh, size. The first record of every attempt."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

import jax

from trainer import contract
from trainer.config.flops import train_flops
from trainer.config.mesh import used
from trainer.config.train import TrainConfig
from trainer.config.weights import parameter_count
from trainer.observe.peak import peak_tflops

PACKAGES: Final = ("nnxlaunch", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
FLAGS: Final = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that change numerics, memory or the compiled program."""


def make_header(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Facts of this attempt. `mesh` gives the degree of each mesh axis over the whole job (`dict(jax_mesh.shape)`)."""
    device = jax.devices()[0]
    return {
        "run_directory": config.run_directory,
        "versions": versions(),
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
        "mesh": used(mesh),
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "peak_bf16_tflops": peak_tflops(device.device_kind),
        },
        "parameters": parameter_count(config.model),
        "tokens_per_step": config.batch.global_batch * config.batch.sequence_length,
        "flops_per_step": train_flops(config.model, config.batch.global_batch, config.batch.sequence_length),
        "config_hash": config_hash(config),
        "config": config.model_dump(mode="json"),
        "image_revision": os.environ.get(contract.IMAGE_REVISION, ""),
        "spec_hash": os.environ.get(contract.SPEC_HASH, ""),
        "restart_attempt": os.environ.get(contract.ATTEMPT, ""),
    }


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"nnxlaunch": "not installed", **found}


def config_hash(config: TrainConfig) -> str:
    """SHA-256 over the config as canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
