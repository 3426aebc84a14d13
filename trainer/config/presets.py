"""Model presets: data files in `model_presets`, expanded and overridden key by key."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Final, cast

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
        return cast("Any", data)
    keys = cast("dict[str, Any]", data)
    rest = {key: value for key, value in keys.items() if key != "preset"}
    return merge(read_preset(str(keys["preset"])), rest)


NAMES: Final = ("tpu",)
"""Keys of nodes whose `type` is a name among others, not the kind of node that says which keys there are."""


def merge(base: Any, over: Any, *, kinds: bool = True) -> Any:
    """`over` on top of `base`: mappings merge key by key (integer-like keys address list items), all else replaces.

    A mapping whose `type` changes is replaced whole, unless it lies below one of `NAMES`.
    """
    if not isinstance(over, dict):
        return over
    keys = cast("dict[Any, Any]", over)
    if isinstance(base, list) and keys and all(str(key).isdigit() for key in keys):
        merged = list(cast("list[Any]", base))
        for key, value in keys.items():
            if int(key) >= len(merged):
                raise ValueError(f"index {key} is outside of a list of {len(merged)}")
            merged[int(key)] = merge(merged[int(key)], value)
        return merged
    if isinstance(base, dict):
        below = cast("dict[Any, Any]", base)
        if kinds and "type" in keys and keys["type"] != below.get("type", keys["type"]):
            return keys  # another kind of node: the old kind's keys mean nothing to it
        return {
            **below,
            **{key: merge(below[key], value, kinds=key not in NAMES) if key in below else value for key, value in keys.items()},
        }
    return keys
