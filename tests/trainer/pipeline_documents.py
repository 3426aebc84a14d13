"""Train configs with pipelines, legal or not, drawn at random: what the refusals' tests try."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.trainer.configs import MIXTURE

Document = dict[str, Any]
AXES = ("fsdp", "data", "tensor", "fsdp_transpose", "context", "tensor_sequence", "expert")
BATCH_AXES = ("data", "fsdp", "fsdp_transpose", "expert")
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 8}
DENSE = {"attention": ATTENTION, "mlp": {"hidden": 48}}
WINDOWED = {"attention": {"heads": 4, "kv_heads": 4, "head_dim": 8, "window": 8}, "mlp": {"hidden": 32}}
SPARSE = {"attention": ATTENTION, "mlp": MIXTURE}
DROPLESS = {"attention": ATTENTION, "mlp": {**MIXTURE, "dispatch": {"type": "dropless"}}}
POLICIES = ("full", "minimal", "none", "minimal_with_attention", {"offload": ["block_input"]}, "dots")
OPTIMIZERS = ("adamw", "muon", "adafactor", "sgd", "lion")


class Machine(NamedTuple):
    slices: int
    devices_per_slice: int


def machine(document: Document) -> Machine:
    """The one that the document's mesh is for: it leaves no degree open."""
    mesh = document["mesh"]
    return Machine(math.prod(mesh["dcn"].values()), math.prod(mesh["ici"].values()))


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Most are legal, or would be but for one thing; none needs more than eight devices."""
    ici, dcn = draw(_degrees()), draw(st.sampled_from([{}, {}, {}, {"stage": 2}, {"data": 2}]))
    degrees = {axis: ici.get(axis, 1) * dcn.get(axis, 1) for axis in ("stage", *AXES)}
    stages = degrees["stage"]
    pipeline = draw(_pipeline(stages))
    accumulation = draw(st.sampled_from([1, 1, 1, 2, 3]))
    microbatches = pipeline.get("microbatches", stages * (1 + pipeline["delayed_forwarding"])) if pipeline else stages
    unit = microbatches * math.prod(degrees[axis] for axis in BATCH_AXES)
    document: Document = {
        "run_directory": "unused",
        "steps": 20,
        "model": draw(_model(stages, pipeline.get("repeats", 1) if pipeline else 1)),
        "batch": {
            "global_batch": accumulation * draw(st.sampled_from([unit, unit, 2 * unit, 2 * unit, 2 * unit, 4, 12])),
            "sequence_length": draw(st.sampled_from([8, 16])),
            "accumulation": accumulation,
        },
        "mesh": {"ici": ici, "dcn": dcn},
        "pipeline": pipeline,
        "optimizer": {"type": draw(st.sampled_from(OPTIMIZERS))},
        "schedule": {"type": "constant", "learning_rate": 1e-3},
        "sharding": {"unsharded_limit": 1.0, "optimizer": draw(st.sampled_from(["as_weights", "over_data"]))},
        "data": {"sources": [{"type": "synthetic"}]},
    }
    _more(draw, document, unit)
    return document


def _more(draw: st.DrawFn, document: Document, unit: int) -> None:
    """What a pipeline goes beside: now and then one or two of them."""

    def now_and_then(times: int = 5) -> bool:
        return draw(st.integers(1, times)) == times

    averaged = now_and_then()
    if averaged:
        document["ema"] = {"decay": 0.9}
    if now_and_then(3):
        size = draw(st.sampled_from([None, unit, 6]))
        document["eval"] = {"every_steps": 5, "global_batch": size, "weights": "ema" if averaged else "trained"}
    if now_and_then():
        start = draw(st.sampled_from([unit, unit, unit, 3]))
        document["batch"]["ramp_up"] = {"start": start, "increment": start, "steps_per_size": 1}
    if now_and_then():
        document["sharding"]["context"] = {"type": draw(st.sampled_from(["ring", "ulysses"]))}
    if now_and_then():
        axis = draw(st.sampled_from(["embed", "vocab", "mlp", "heads", "batch", "stage", "layer", "repeat", "norm", "expert"]))
        mesh = draw(st.lists(st.sampled_from(["stage", *AXES]), max_size=2, unique=True))
        weight = draw(st.sampled_from([None, None, "embed/table", "segments/*"]))
        document["sharding"]["rules"] = [{"axis": axis, "mesh": mesh, **({"weight": weight} if weight else {})}]
    if now_and_then():
        document["loss"] = draw(st.sampled_from([{"tiles": 2}, {"z_loss_weight": 0.1}, {"tiles": 3}, {"load_balance_weight": 0.1}]))
    if now_and_then(10):
        document["diloco"] = {"sync_every_steps": 2}
        ici = document["mesh"]["ici"]
        document["mesh"]["ici"] = {**ici, "data": 1, "diloco": ici.get("data", 1)}


@st.composite
def _degrees(draw: st.DrawFn) -> dict[str, int]:
    degrees = {"stage": draw(st.sampled_from([1, 2, 2, 2, 3, 4]))}
    for axis in draw(st.permutations(AXES))[:2]:
        if 2 * math.prod(degrees.values()) <= 4:
            degrees[axis] = draw(st.sampled_from([1, 2, 2]))
    return {"fsdp": 1, **degrees}


@st.composite
def _model(draw: st.DrawFn, stages: int, repeats: int) -> Document:
    block = st.sampled_from([DENSE, DENSE, WINDOWED, SPARSE, DROPLESS])
    pattern = draw(st.lists(block, min_size=1, max_size=2))
    whole = stages * repeats
    segments = [{"repeats": draw(st.sampled_from([whole, whole, whole, 2 * whole, whole + 1, stages, 3, 1])), "pattern": pattern}]
    if draw(st.integers(0, 3)) == 0:
        segments.insert(draw(st.integers(0, 1)), {"repeats": 1, "pattern": [draw(block)]})
    model: Document = {
        "vocab_size": 64,
        "width": 32,
        "compute_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "segments": segments,
        "layers": draw(st.sampled_from(["scan", "scan", "unroll"])),
        "remat": draw(st.sampled_from(POLICIES)),
        "tie_embeddings": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.1])),
    }
    if draw(st.integers(0, 4)) == 0:
        model["multi_token"] = {"depth": draw(st.integers(1, 2))}
    return model


@st.composite
def _pipeline(draw: st.DrawFn, stages: int) -> Document | None:
    if draw(st.integers(0, 9)) == 0:
        return None
    repeats = draw(st.sampled_from([1, 2, 2, 3]))
    pipeline: Document = {
        "repeats": repeats,
        "delayed_forwarding": draw(st.booleans()),
        "gather": draw(st.sampled_from(["iteration", "once", "iteration", "once", "repeat"])),
    }
    if draw(st.booleans()):
        pipeline["microbatches"] = draw(st.sampled_from([2 * stages, 2 * stages, 2 * stages, 4 * stages, stages, 1, 3, 5]))
    if draw(st.integers(0, 4)) == 0:
        pipeline["layers"] = draw(st.sampled_from([stages * repeats, stages * repeats, 2 * stages, 1, 3, 7]))
    if draw(st.integers(0, 5)) == 0:
        pipeline["segment"] = draw(st.integers(0, 2))
    return pipeline
