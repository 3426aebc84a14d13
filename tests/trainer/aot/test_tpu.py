"""Steps compiled for a TPU slice that is not here: what goes to the host's memory, and that the kernel is in every form of the step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainConfig, apply_overrides, validate

ROOT = Path(__file__).parents[3]
LAYERS, D, T = 4, 512, 256
MODEL = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 128}, "mlp": {"hidden": 1024}}
DOCUMENT: dict[str, Any] = {
    "run_directory": "gs://bucket/runs",
    "steps": 10,
    "model": {"vocab_size": 4096, "width": D, "segments": [{"repeats": LAYERS, "pattern": [MODEL]}]},
    "batch": {"global_batch": 16, "sequence_length": T},
    "schedule": {"type": "cosine", "learning_rate": 1e-3, "warmup_steps": 1},
    "data": {"sources": [{"type": "synthetic"}]},
}
TARGET = {"platform": "tpu", "name": "v5e-16", "topology": "v5e:4x4", "torus": [4, 4], "wraps": [False, False], "devices_per_slice": 16,
          "hbm_bytes": 16 * 2**30}  # fmt: skip
PIPELINE = ("mesh.ici={stage: 2, fsdp: 8}", "pipeline={repeats: 2}", "batch.global_batch=32")
# One sequence a device, bfloat16: queries, keys, values, attention's output, gate and up of every layer.
PRODUCTS = LAYERS * T * (512 + 256 + 256 + D + 1024 + 1024) * 2


@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "host"),
    [
        pytest.param(("model.remat=minimal_offloaded",), PRODUCTS, id="products-offloaded"),
        pytest.param(("model.remat={offload: [block_input]}",), LAYERS * T * D * 2, id="block-inputs-offloaded"),
        pytest.param(PIPELINE, 0, id="circular-pipeline"),
        pytest.param(("mesh.ici={fsdp: 8, tensor: 2}", "loss.tiles=2"), 0, id="tensor-and-tiles"),
    ],
)
def test_the_step_compiles_for_v5e_16_with_the_kernel_and_the_host_holds_what_is_offloaded(
    overrides: tuple[str, ...], host: int, tmp_path: Path
) -> None:
    config, program = tmp_path / "config.json", tmp_path / "step.hlo"
    config.write_text(validate(TrainConfig, apply_overrides(DOCUMENT, overrides)).model_dump_json())
    command = [sys.executable, "-m", "trainer.aot", "--config", str(config), "--target", json.dumps(TARGET), "--hlo", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory_per_device"]["host"] == host
    assert 'custom_call_target="tpu_custom_call"' in program.read_text()
