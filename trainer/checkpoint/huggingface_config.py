"""Hugging Face's config.json to our model config and back. No JAX here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from trainer.checkpoint.huggingface_blocks import block_problems, blocks_from_huggingface, blocks_to_huggingface
from trainer.checkpoint.huggingface_families import FAMILIES, Family, text_config
from trainer.checkpoint.huggingface_files import CONFIG_FILE
from trainer.checkpoint.quantized import is_readable
from trainer.config.base import near_miss
from trainer.config.model import Block, Model, Norm, Segment
from trainer.errors import CheckpointError

Config = Mapping[str, Any]

_LONGEST_PATTERN = 8
_KINDS: Final[Mapping[type, tuple[str, tuple[str, ...]]]] = {
    int: ("a whole number", (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
        "sliding_window", "max_window_layers", "sliding_window_pattern", "max_position_embeddings", "original_max_position_embeddings",
        "num_local_experts", "num_experts", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size",
        "decoder_sparse_step", "first_k_dense_replace", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "num_nextn_predict_layers", "num_mtp_layers",
    )),
    float: ("a number", ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar")),
    dict: ("an object", ("rope_scaling", "rope_parameters")),
    list: ("a list", ("layer_types", "mlp_only_layers")),
}  # fmt: skip
# How a run computes and trains, which config.json does not say: layers that differ in these alone are the same.
_NOT_IN_CONFIG = ("mlp.dispatch", "mlp.router.bias_balancing.update_rate")


def model_from_huggingface(config: Config) -> Model:
    """The model a config.json describes, with our defaults for what it does not say (compute dtype, scan, remat).

    Raises CheckpointError with every reason when this trainer's model cannot compute what the file asks for.
    """
    config = text_config(config)
    family = family_of(config)
    config = {**family.defaults, **family.renamed(config)}
    if wrong := list(_of_another_kind(config)):
        raise CheckpointError("config.json describes no model:\n" + "\n".join(f"  {line}" for line in wrong))
    if reasons := list(_unsupported(config, family)):
        raise CheckpointError("config.json asks for what this model cannot compute:\n" + "\n".join(f"  {reason}" for reason in reasons))
    try:
        return Model(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            embedding_scale=math.sqrt(config["hidden_size"]) if family.embedding_scale else None,
            segments=segments_of(blocks_from_huggingface(config, family)),
            final_norm=Norm(epsilon=config["rms_norm_eps"], offset=family.norm_offset),
            tie_embeddings=config.get("tie_word_embeddings", False),
            head_soft_cap=config.get(family.head_cap_key) if family.head_cap_key else None,
            initializer_stddev=config.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        lines = [f"  {': '.join((*map(str, wrong['loc']), wrong['msg'].removeprefix('Value error, ')))}" for wrong in error.errors()]
        raise CheckpointError("config.json describes no model:\n" + "\n".join(lines)) from None


def family_of(config: Config) -> Family:
    """The family of a config.json. Raises CheckpointError with the nearest name for one that is not supported."""
    known = {family.model_type: family for family in FAMILIES}
    model_type = str(text_config(config).get("model_type") or "")
    if not model_type:
        raise CheckpointError("config.json has no model_type", hint=f"supported: {', '.join(known)}")
    if model_type not in known:
        close = near_miss(model_type, list(known))
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported" + (f"; did you mean {close!r}?" if close else ""),
            hint=f"supported: {', '.join(known)}",
        )
    return known[model_type]


def config_for_huggingface(model: Model, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """A config.json for `model`: of the first family that describes it in full.

    Raises CheckpointError when none does, with the differences from the nearest one.
    """
    nearest: list[str] | None = None
    for family in FAMILIES:
        config = _config(model, family, dtype=dtype, max_positions=max_positions)
        if config is None:
            continue
        different = differences(model, model_from_huggingface(config))
        if not different:
            return config
        nearest = different if nearest is None or len(different) < len(nearest) else nearest
    if nearest is None:
        raise CheckpointError("no Hugging Face family has this model's kind of attention with its kind of MLP")
    raise CheckpointError(
        "no Hugging Face family describes this model; the nearest differs in:\n" + "\n".join(f"  {line}" for line in nearest)
    )


def differences(ours: Model, theirs: Model, where: str = CONFIG_FILE) -> list[str]:
    """Where two models compute different things: path, our value, their value. How they compute it (dtype, scan, remat) may differ.

    where: the file that describes theirs.
    """
    lines = list(_unlike(_whole(ours), _whole(theirs), where))
    layers: dict[str, list[int]] = {}
    for layer, (first, second) in enumerate(zip(layers_of(ours), layers_of(theirs), strict=False)):
        for line in _unlike(_layer(first), _layer(second), where):
            layers.setdefault(line, []).append(layer)
    return lines + [f"{_span(numbers)}: {line}" for line, numbers in layers.items()]


def segments_of(blocks: Sequence[Block]) -> tuple[Segment, ...]:
    """Segments that spell `blocks` in order: the shortest repeating pattern (and what is left over), else runs of equal blocks."""
    for period in range(1, min(_LONGEST_PATTERN, len(blocks) // 2) + 1):
        if all(block == blocks[index % period] for index, block in enumerate(blocks)):
            repeats, rest = divmod(len(blocks), period)
            return (Segment(pattern=tuple(blocks[:period]), repeats=repeats), *_runs(blocks[len(blocks) - rest :]))
    return tuple(_runs(blocks))


def layers_of(model: Model) -> tuple[Block, ...]:
    """Every layer's block, in forward order; the inverse of `segments_of`."""
    return tuple(block for segment in model.segments for _ in range(segment.repeats) for block in segment.pattern)


def _runs(blocks: Sequence[Block]) -> Iterator[Segment]:
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[start]:
            yield Segment(pattern=(blocks[start],), repeats=index - start)
            start = index


def _of_another_kind(config: Config) -> Iterator[str]:
    for kind, (words, keys) in _KINDS.items():
        kinds = (int, float) if kind is float else kind
        for key in keys:
            value = config.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                yield f"{key}: {value!r}, must be {words}"


def _unsupported(config: Config, family: Family) -> Iterator[str]:
    yield from block_problems(config, family)
    if config.get("attention_dropout"):
        yield f"attention_dropout: {config['attention_dropout']}; there is no dropout here"
    if (quantized := config.get("quantization_config")) and not is_readable(config):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        yield f"quantization_config ({method}): known: mxfp4 of gpt_oss, fp8 with a weight_block_size"
    for key, value in family.fixed.items():
        if config.get(key, value) not in (value, None):
            yield f"{key}: {config[key]!r}; here it is {value!r} in {family.model_type}"
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention: a token sees only what is before it here"


def _config(model: Model, family: Family, *, dtype: str, max_positions: int) -> dict[str, Any] | None:
    """What `family` can say about `model`; the caller checks whether that is all of it. None: its blocks are of another kind."""
    blocks = blocks_to_huggingface(layers_of(model), family, max_positions=max_positions)
    if blocks is None:
        return None
    caps = {family.head_cap_key: model.head_soft_cap} if family.head_cap_key else {}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.initializer_stddev,
        "dtype": dtype,
        **family.fields,
        **caps,
        **blocks,
        **{key: model.depth for key in family.modules_keys[:1]},
    }


def _whole(model: Model) -> dict[str, Any]:
    fields = model.model_dump(include={"vocab_size", "width", "embedding_scale", "final_norm", "tie_embeddings", "head_soft_cap"})
    return dict(_leaves("", {**fields, "layers": len(layers_of(model))}))


def _layer(block: Block) -> dict[str, Any]:
    return {path: value for path, value in _leaves("", block.model_dump()) if not path.startswith(_NOT_IN_CONFIG)}


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any], where: str) -> Iterator[str]:
    for path in dict.fromkeys([*first, *second]):
        if first.get(path) != second.get(path):
            yield f"{path}: {first.get(path)} in the model, {second.get(path)} in {where}"


def _span(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]}-{layers[-1]}" if layers[-1] - layers[0] == len(layers) - 1 else f"{len(layers)} layers from {layers[0]}"


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), child)
    else:
        yield path, value
