"""The cases of matrix.yaml as job specs, and what has to be true of a compiled one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from launcher.checks import problems_of_document
from launcher.spec import JobSpec

MATRIX: Final = Path(__file__).with_name("matrix.yaml")
LAYER_BODIES: Final = ("forward layer body", "backward layer body")
GATHERS: Final = dict.fromkeys(LAYER_BODIES, ("all-gather",))
IMAGE: Final = "registry.example.com/project/trainer@sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

SMALL: Final = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 128}, "mlp": {"hidden": 1024}}
SMALL_MOE: Final = {**SMALL, "mlp": {"type": "moe", "experts": 16, "experts_per_token": 2, "hidden": 512}}
SMALL_MODELS: Final = {
    name: {"vocab_size": 4096, "width": 512, "segments": [{"repeats": 8, "pattern": [block]}]}
    for name, block in (("small", SMALL), ("small-moe", SMALL_MOE))
}

Case = Mapping[str, Any]


def cases() -> list[Case]:
    return yaml.safe_load(MATRIX.read_text(encoding="utf-8"))


def job_of(case: Case) -> JobSpec:
    """Raises ValueError with every problem of the spec."""
    sequences, length = (int(part) for part in case["batch"].split("x"))
    model = {**SMALL_MODELS.get(case["model"], {"preset": case["model"]}), "remat": case.get("remat", "full")}
    if "layers" in case:
        segments = model["segments"] if "segments" in model else _segments(case["model"])
        model["segments"] = [{**segments[0], "repeats": case["layers"]}]
    document = {
        "name": case["name"],
        "tpu": {"type": case["tpu"], "slices": case.get("slices", 1)},
        "image": IMAGE,
        "directory": "gs://my-bucket/runs",
        "train": {
            "steps": 100,
            "model": model,
            "batch": {"global_batch": sequences, "sequence_length": length, "accumulation": case.get("accumulation", 1)},
            "mesh": {"ici": case.get("mesh", {"fsdp": -1}), "dcn": case.get("dcn", {})},
            "schedule": {"type": "cosine", "learning_rate": 3e-5, "warmup_steps": 2},
            "data": {"sources": [{"type": "synthetic"}]},
            **case.get("train", {}),
        },
    }
    spec, problems = problems_of_document(document, target="local")
    if spec is None or problems:
        raise ValueError(f"{case['name']}: " + "; ".join(map(str, problems)))
    return spec


def _segments(preset: str) -> list[dict[str, Any]]:
    import trainer.config

    path = Path(trainer.config.__file__).parent / "model_presets" / f"{preset}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["segments"]


def same_direction(region: str, name: str) -> bool:
    """Whether `region` is what a case calls `name`; a layer body with a loop inside is called an outer loop body."""
    return region.split()[0] == name.split()[0]


def violations(case: Case, found: Mapping[str, Any], program: str) -> Iterator[str]:
    """What is not as it should be. found: the report of `nnxlaunch compile`; program: the compiled program's text."""
    if "memory_per_device" not in found:
        yield f"does not fit: {found['compiler']}"
        return
    memory = found["memory_per_device"]
    if not memory["fits"]:
        yield f"does not fit: {memory['peak'] / 1e9:.1f} GB of {memory['capacity'] / 1e9:.1f}"
    if bool(memory["host"]) != case.get("host", False):
        yield f"{memory['host']} bytes in the host's memory"
    if 'custom_call_target="tpu_custom_call"' not in program:
        yield "no attention kernel in the program"
    for kernel in case.get("kernels", ()):
        if not re.search(rf'custom_call_target="tpu_custom_call".*op_name="[^"]*jit\({kernel}\)', program):
            yield f"no {kernel} kernel in the program"
    regions = {region["region"]: region["collectives"] for region in found["collectives"]}
    for name, kinds in case.get("expect", GATHERS).items():
        there = {row["kind"] for region, rows in regions.items() if same_direction(region, name) for row in rows}
        for kind in sorted({*kinds} - there):
            yield f"{name}: no {kind}, but {', '.join(sorted(there)) or 'nothing'}"
    crossing = {row["kind"] for rows in regions.values() for row in rows if row["network"] == "dcn"}
    if crossing != {*case.get("crosses", ())}:
        yield f"between slices: {', '.join(sorted(crossing)) or 'nothing'}"
    if bound := case.get("gather_at_most_mb"):
        rows = [row for region, rows in regions.items() if region != "entry" for row in rows if row["kind"] == "all-gather"]
        largest = max((row["largest"] for row in rows), default=0) / 1e6
        if largest > bound:
            yield f"an all-gather of {largest:.0f} MB in a loop body"
