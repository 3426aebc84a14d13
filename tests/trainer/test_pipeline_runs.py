"""Whole runs with a pipeline beside everything else: left, continued on another mesh, decoded from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.configs import config, layout, mixture
from tests.trainer.pipelined_runs import by_weight
from tests.trainer.test_exact_resume import Processes
from trainer import run as run_module
from trainer.config import TrainConfig
from trainer.config.mesh import AxisDegrees, Mesh
from trainer.contract import Exit
from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling
from trainer.decode.serve import Request, serve
from trainer.decode.source import for_decoding, load, open_source
from trainer.errors import Preempted
from trainer.export import export
from trainer.loop import Batches, Loop
from trainer.parallel.mesh import build_mesh
from trainer.parallel.sharding import Layout, use_layout
from trainer.run import run
from trainer.state import describe_state, state_items

pytestmark = pytest.mark.full

STEPS, LEFT_AT = 8, 4
ROWS, LENGTH = 16, 32
PIPELINED = (
    "mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2", "pipeline={repeats: 2}", "batch.accumulation=2",
    "sharding.optimizer=over_data",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def common(directory: Path, cache: str) -> dict[str, Any]:
    """Packed text, Muon, evaluation and checkpoints half way."""
    return {
        "run_directory": str(directory),
        "steps": STEPS,
        "batch": {"global_batch": ROWS, "sequence_length": LENGTH},
        "optimizer": {"type": "muon"},
        "schedule": {"type": "constant", "learning_rate": 1e-2},
        "eval": {"every_steps": 2},
        "checkpoint": {"every_steps": LEFT_AT},
        "metrics": {"writers": ["jsonl"]},
        "data": {
            "sources": [{"type": "python_standard_library", "max_bytes": 100_000}],
            "cache_directory": f"{cache}/data",
            "held_out": 0.2,
        },
        "sharding": {"unsharded_limit": 1.0},
        "compile_cache": f"{cache}/compiled",
    }


def dense(directory: Path, cache: str, *overrides: str) -> TrainConfig:
    model = ("model.vocab_size=264", "model.segments.0.repeats=4", "model.matmul_precision=highest", "loss.z_loss_weight=0.01")
    return config(*model, *overrides, **common(directory, cache))


def records(directory: Path, kind: str, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if line["kind"] == kind}


def run_until(left_at: int, wanted: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(run_module.distributed, "preemption_requested", lambda step: step == left_at)
        run(wanted)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    directory = tmp_path_factory.mktemp("one")
    start(dense(directory, cache), devices=1)
    return directory


def start(wanted: TrainConfig, *, processes: int = 1, devices: int, slices: int = 1) -> None:
    directory = Path(wanted.run_directory)
    directory.mkdir(exist_ok=True)
    path = directory / "train.json"
    path.write_text(wanted.model_dump_json())
    with Processes(path, processes=processes, devices=devices, attempt=0, slices=slices) as running:
        assert running.finish(seconds=900) == [Exit.DONE] * processes


def test_left_under_a_pipeline_and_continued_over_fsdp_it_has_the_losses_of_one_device(
    tmp_path: Path, cache: str, on_one_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(LEFT_AT, dense(tmp_path, cache, *PIPELINED), monkeypatch)
    assert run(dense(tmp_path, cache, "mesh.ici.fsdp=8")) == Exit.DONE
    for kind in ("step", "eval"):
        found, wanted = (records(directory, kind, "loss") for directory in (tmp_path, on_one_device))
        if kind == "eval":
            del wanted[LEFT_AT - 1]  # asked to leave, a run does not evaluate
        assert found.keys() == wanted.keys() and len(wanted) == (STEPS if kind == "step" else STEPS // 2 - 1)
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


class Kept(Loop):
    """Keeps the state it ends with."""

    states: list[nnx.State]

    def run(self, state: nnx.State, batches: Batches) -> nnx.State:
        self.states.append(super().run(state, batches))
        return self.states[-1]


def test_a_mixture_with_multi_token_prediction_trained_in_a_pipeline_is_exported_and_decodes_on_one_device_as_it_does_live(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, folder = tmp_path / "run", tmp_path / "exported"
    terms = ("loss.load_balance_weight=0.01", "loss.router_z_loss_weight=0.001")
    wanted = mixture(
        "mesh.ici.stage=2", "mesh.ici.expert=2", "mesh.ici.fsdp=2", "pipeline={repeats: 2}", "batch.accumulation=2",
        "model.vocab_size=264", "model.segments.1.repeats=4", "model.multi_token={depth: 1}", *terms,
        mlp={"router": {"scoring": "sigmoid", "bias_balancing": {"update_rate": 0.01}}}, **common(directory, cache),
    )  # fmt: skip
    monkeypatch.setattr(Kept, "states", [], raising=False)
    monkeypatch.setattr(run_module, "Loop", Kept)
    assert run(wanted) == Exit.DONE
    losses = records(directory, "step", "loss")
    assert losses[STEPS - 1] < losses[0]
    for name in ("load_balance", "router_z_loss", "multi_token_1"):
        assert min(records(directory, "step", name).values()) > 0

    (state,) = Kept.states
    exported = export(str(directory), str(folder), form="parameters")
    assert exported["step"] == STEPS
    source = open_source(str(folder))
    assert source.model == wanted.model
    alone = Layout(build_mesh(Mesh(ici=AxisDegrees()), jax.devices()[:1], slices=1))
    stacked = by_weight({path: value for path, value in load(source, source.model, alone).items()})
    for path, value in by_weight(state_items(state)["params"]).items():
        np.testing.assert_array_equal(stacked[path], value, err_msg=path)

    prompts = np.random.default_rng(0).integers(0, 256, (ROWS, 8)).tolist()
    model = for_decoding(source.model)
    engine = Engine(model, load(source, model, alone), alone, slots=4, max_length=LENGTH + 1)
    found: list[list[int]] = [[] for _ in prompts]
    for piece in serve(engine, (Request(prompt, LENGTH - 8, Sampling()) for prompt in prompts)):
        assert piece.token is not None
        found[piece.request].append(piece.token)
    assert found == greedy(wanted, state, prompts)


def greedy(trained: TrainConfig, state: nnx.State, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest tokens one after another, each by a whole forward pass of the model that was trained, where it was."""
    where = layout(trained)
    spec = describe_state(trained, where)

    @jax.jit
    def logits(state: nnx.State, batch: Mapping[str, jax.Array]) -> jax.Array:
        with use_layout(where):
            return nnx.merge(spec.model, state["model"])(batch["tokens"], batch["positions"], batch["segments"])

    tokens = np.zeros((ROWS, LENGTH), np.int32)
    tokens[:, :8] = prompts
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    for length in range(8, LENGTH):
        batch = {"tokens": tokens, "positions": positions, "segments": (positions < length).astype(np.int32)}
        tokens[:, length] = jnp.argmax(logits(state, batch)[:, length - 1], axis=-1)
    return tokens[:, 8:].tolist()
