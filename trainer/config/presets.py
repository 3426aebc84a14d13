"""Model presets: data files in `model_presets`, expanded and overridden key by key."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml

from trainer.config.base import near_miss
from trainer.config.problem import ConfigError, Problem


def preset_names() -> list[str]:
    """Names accepted as `model.preset`, sorted."""
    folder = resources.files(__package__) / "model_presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@cache
def _text(name: str) -> str:
    return (resources.files(__package__) / "model_presets" / f"{name}.yaml").read_text()


def read_preset(name: str) -> dict[str, Any]:
    """The preset as a fresh dict. Raises ConfigError with the nearest name for an unknown one."""
    known = preset_names()
    if name not in known:
        close = near_miss(name, known)
        hint = f"did you mean {close!r}?" if close else f"one of: {', '.join(known)}"
        raise ConfigError([Problem(path="preset", message=f"unknown preset {name[:80]!r}", hint=hint, code="preset", value=name)])
    return yaml.safe_load(_text(name))


def expand_preset(data: Any) -> Any:
    """Replace `preset: NAME` by the preset's fields, overridden by the other keys of `data` (dicts merge, the rest replaces)."""
    if not isinstance(data, dict) or "preset" not in data:
        return data
    rest = {key: value for key, value in data.items() if key != "preset"}
    return merge(read_preset(str(data["preset"])), rest)


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings merge key by key (integer-like keys address list items), all else replaces."""
    if isinstance(base, list) and isinstance(over, dict) and over and all(str(key).isdigit() for key in over):
        merged = list(base)
        for key, value in over.items():
            if int(key) >= len(merged):
                raise ValueError(f"index {key} is outside of a list of {len(merged)}")
            merged[int(key)] = merge(merged[int(key)], value)
        return merged
    if isinstance(base, dict) and isinstance(over, dict):
        if "type" in over and over["type"] != base.get("type", over["type"]):
            return over  # another kind of node: the old kind's keys mean nothing to it
        return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}
    return over
