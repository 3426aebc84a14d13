"""Rotary embedding parameters of a config.json to ours and back. No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from trainer.checkpoint.huggingface_families import Family
from trainer.config.model import LinearScaling, Llama3Scaling, Rope, YarnScaling

Config = Mapping[str, Any]
LOCAL: Final = "sliding_attention"
FULL: Final = "full_attention"
KNOWN_TYPES: Final = ("default", "linear", "llama3", "yarn")
_NEEDED: Final = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def rope_from_huggingface(config: Config, family: Family, *, windowed: bool) -> Rope:
    """Of layers with (`windowed`) or without a sliding window."""
    fields = _fields(config, family, windowed=windowed)
    pairs: Literal["halves", "interleaved"] = "interleaved" if family.latent and config.get("rope_interleave") else "halves"
    fraction = 1.0 if family.latent else fields.get("partial_rotary_factor", 1.0)
    return Rope(theta=fields["rope_theta"], scaling=_scaling(config, fields), pairs=pairs, fraction=fraction)


def rope_problems(config: Config, family: Family) -> Iterator[str]:
    """What of it this trainer cannot compute."""
    for windowed in (False, True) if family.rope_by_layer_type else (False,):
        fields = _fields(config, family, windowed=windowed)
        if (kind := fields["rope_type"]) not in KNOWN_TYPES:
            yield f"rope_type: {kind!r}; known: {', '.join(KNOWN_TYPES)}"
        else:
            yield from (f"rope_parameters.{key}: missing for rope_type {kind}" for key in _NEEDED[kind] if fields.get(key) is None)
        if any(isinstance(value, dict) for value in fields.values()):
            yield "rope_parameters: different for different layers"


def rope_to_huggingface(full: Rope, local: Rope | None, *, max_positions: int) -> dict[str, Any]:
    """`rope_parameters`; local: of layers with a window, where they have their own."""
    if local is None:
        return _written(full, max_positions)
    return {FULL: _written(full, max_positions), LOCAL: _written(local, max_positions)}


def _fields(config: Config, family: Family, *, windowed: bool) -> dict[str, Any]:
    """As transformers 5 writes them (`rope_parameters`), also from version 4's `rope_theta` and `rope_scaling`.

    Where both are there `rope_scaling` counts, as in transformers: alone, or over those of the full layers.
    """
    old: Mapping[str, Any] = config.get("rope_scaling") or ({} if config.get("rope_parameters") else family.rope)
    new: Mapping[str, Any] = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", family.theta)
    if family.rope_by_layer_type:
        if windowed:
            old, theta = {}, config.get("rope_local_base_freq", family.local_theta)
        if LOCAL in new or FULL in new:
            new = new.get(LOCAL if windowed else FULL) or {}
    elif old:
        new = {}
    given = {key: value for key, value in {**new, **old}.items() if value is not None}
    factor = {"partial_rotary_factor": config["partial_rotary_factor"]} if config.get("partial_rotary_factor") is not None else {}
    return {"rope_theta": theta, **factor, **given, "rope_type": given.get("rope_type") or given.get("type") or "default"}


def _scaling(config: Config, fields: Mapping[str, Any]) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    longest = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or longest
    match fields["rope_type"]:
        case "linear":
            return LinearScaling(factor=fields["factor"])
        case "llama3":
            return Llama3Scaling(
                factor=fields["factor"],
                low_freq_factor=fields["low_freq_factor"],
                high_freq_factor=fields["high_freq_factor"],
                original_length=original or 0,
            )
        case "yarn":
            return YarnScaling(
                factor=fields.get("factor") or (longest or 0) / (original or 1),
                original_length=original or 0,
                beta_fast=fields.get("beta_fast") or 32.0,
                beta_slow=fields.get("beta_slow") or 1.0,
                truncate=fields.get("truncate", True),
                attention_factor=fields.get("attention_factor"),
                mscale=fields.get("mscale") or None,
                mscale_all_dim=fields.get("mscale_all_dim") or None,
            )
        case _:
            return None


def _written(rope: Rope, max_positions: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default" if rope.scaling is None else rope.scaling.type}
    if rope.fraction != 1:
        fields["partial_rotary_factor"] = rope.fraction
    match rope.scaling:
        case None:
            return fields
        case LinearScaling(factor=factor):
            return {**fields, "factor": factor}
        case Llama3Scaling() as scaling:
            frequencies = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            return {**fields, "factor": scaling.factor, **frequencies, "original_max_position_embeddings": scaling.original_length}
        case YarnScaling() as scaling:
            keys = ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
            given = {key: value for key in keys if (value := getattr(scaling, key)) is not None}
            return {**fields, **given, "original_max_position_embeddings": scaling.original_length}
