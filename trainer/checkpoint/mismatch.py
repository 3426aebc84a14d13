"""May this run continue that checkpoint? No JAX here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from trainer.config import TrainConfig
from trainer.errors import ResumeMismatch

FREE: Final[dict[str, str]] = {
    "run_directory": "a run may be moved",
    "mesh": "a checkpoint is restored onto any mesh; results agree to rounding",
    "pipeline": "where layers lie, and in which portions they compute; results agree to rounding",
    "sharding": "where tensors lie; results agree to rounding",
    "batch.accumulation": "the same global batch in other portions; results agree to rounding",
    "model.layers": "stacked and unrolled parameters are converted at load",
    "model.remat": "recomputing changes memory and time, not results",
    "ema": "an average beside the training state; it begins with the parameters where the checkpoint has none",
    "eval": "evaluation does not touch the training state",
    "checkpoint": "when and what to save does not touch the training state",
    "metrics": "reporting only",
    "profiler": "reporting only",
    "compile_cache": "speed only",
    "compiler": "speed and rounding only",
    "distributed": "timeouts only",
    "data.sources.*.paths": "the data's fingerprint decides: the same text may lie elsewhere",
    "data.sources.*.max_bytes": "the data's fingerprint decides",
    "data.tokenizer": "the tokenizer's fingerprint decides",
    "data.cache_directory": "where the rows lie, not what they are",
    "data.prefetch_batches": "speed only",
}
"""Config paths, with everything below them, that may differ between a checkpoint and the run that continues it."""

FINGERPRINTS: Final = ("data", "tokenizer")
PACKING_VERSIONS: Final = ("version", "order")
"""What the code, not the config, adds to the content of batch n."""
_ABSENT: Final = "(absent)"


def compare_meta(saved_meta: Mapping[str, Any], present_meta: Mapping[str, Any], allow_mismatch: Iterable[str]) -> list[str]:
    """The differences that are allowed, in words. Raises ResumeMismatch naming every one that is neither free nor allowed.

    Both are `meta` dicts as saved with a step: `config` (a TrainConfig as plain data), `fingerprints` (`data`,
    `tokenizer`), `data` (`Data.state`) and, in the saved one, `step`. `allow_mismatch` holds dotted config paths
    (each covers what is below it, `*` is any one part), `data`, `tokenizer` or `packing`.
    """
    allowed = sorted(set(allow_mismatch))
    words = {path: f"{path}: saved {saved!r}, now {now!r}" for path, saved, now in _differences(saved_meta, present_meta)}
    found = [path for path in words if not _covered(path, allowed)]
    if not found:
        return list(words.values())
    lines = "\n".join(f"  {words[path]}" for path in found)
    accept = f"checkpoint.allow_mismatch=[{', '.join(sorted({*allowed, *found}))}]"
    count = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    raise ResumeMismatch(
        f"the checkpoint of step {saved_meta.get('step', '?')} belongs to another run, {count}:\n{lines}",
        hint=f"use another run_directory, or continue all the same with --set '{accept}' ('train.{accept}' of a job spec)",
    )


def _differences(saved_meta: Mapping[str, Any], present_meta: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    saved, now = _complete(saved_meta["config"]), _complete(present_meta["config"])
    saved_leaves, now_leaves = dict(_leaves(saved)), dict(_leaves(now))
    for path in [*saved_leaves, *(path for path in now_leaves if path not in saved_leaves)]:
        before, after = saved_leaves.get(path, _ABSENT), now_leaves.get(path, _ABSENT)
        if (
            before != after
            and not _covered(path, FREE)
            and not (path == "steps" and _steps_are_free(saved, now, saved_meta.get("step", 0)))
        ):
            yield path, before, after
    for name in FINGERPRINTS:
        before = saved_meta.get("fingerprints", {}).get(name, _ABSENT)
        after = present_meta.get("fingerprints", {}).get(name, _ABSENT)
        if before != after:
            yield name, before, after
    before, after = _packing(saved_meta), _packing(present_meta)
    for name in PACKING_VERSIONS:
        if before.get(name) != after.get(name):
            yield f"packing.{name}", before.get(name, _ABSENT), after.get(name, _ABSENT)


def _packing(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    return meta.get("data", {}).get("identity", {}).get("packing", {})


def _complete(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With today's defaults for keys that are newer than the checkpoint."""
    try:
        return TrainConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:  # a key that is no longer known: compare what was written
        return config


def _steps_are_free(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> bool:
    """The end of the run may move as long as no learning rate of a step already taken depends on it."""
    schedule = now.get("schedule", {})
    match schedule.get("type"):
        case "constant":
            return True
        case "cosine" | "linear":
            return schedule.get("decay_until_step") is not None
        case "wsd":
            return step <= min(saved["steps"], now["steps"]) - schedule["decay_steps"]
        case _:
            return False


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple) and node:
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node


def _covered(path: str, patterns: Iterable[str]) -> bool:
    parts = path.split(".")
    return any(_begins(parts, pattern.split(".")) for pattern in patterns)


def _begins(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) >= len(pattern) and all(wanted in ("*", part) for wanted, part in zip(pattern, parts, strict=False))
