"""Hugging Face's config.json to our model config and back. No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.checkpoint.huggingface_families import ACTIVATIONS, FAMILIES, Family
from trainer.config.base import near_miss
from trainer.config.model import Attention, Block, GatedMlp, Llama3Scaling, Model, Norm, Rope, Segment
from trainer.errors import CheckpointError

Config = Mapping[str, Any]

# Hugging Face's default where config.json does not say.
_ROPE_THETA = 10_000.0
_LONGEST_PATTERN = 8


def model_from_huggingface(config: Config) -> Model:
    """The model a config.json describes, with our defaults for what it does not say (compute dtype, scan, remat).

    Raises CheckpointError with every reason when this trainer's model cannot compute what the file asks for.
    """
    known = {family.model_type: family for family in FAMILIES}
    model_type = str(config.get("model_type"))
    if model_type not in known:
        close = near_miss(model_type, list(known))
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported" + (f"; did you mean {close!r}?" if close else ""),
            hint=f"supported: {', '.join(known)}",
        )
    family = known[model_type]
    config = {**family.defaults, **config}
    if reasons := list(_unsupported(config, family)):
        raise CheckpointError("config.json asks for what this model cannot compute:\n" + "\n".join(f"  {reason}" for reason in reasons))
    return Model(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        segments=segments_of(_blocks(config, family)),
        final_norm=Norm(epsilon=config["rms_norm_eps"]),
        tie_embeddings=config.get("tie_word_embeddings", False),
        initializer_stddev=config.get("initializer_range", 0.02),
    )


def config_for_huggingface(model: Model, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """A config.json for `model`: of the first family that describes it in full.

    Raises CheckpointError when none does, with the differences from the nearest one.
    """
    nearest: list[str] | None = None
    for family in FAMILIES:
        config = _config(model, family, dtype=dtype, max_positions=max_positions)
        different = differences(model, model_from_huggingface(config))
        if not different:
            return config
        nearest = different if nearest is None or len(different) < len(nearest) else nearest
    raise CheckpointError(
        "no Hugging Face family describes this model; the nearest differs in:\n" + "\n".join(f"  {line}" for line in nearest or [])
    )


def differences(ours: Model, theirs: Model) -> list[str]:
    """Where two models compute different things: path, our value, their value. How they compute it (dtype, scan, remat) may differ."""
    lines = list(_unlike(_whole(ours), _whole(theirs)))
    layers: dict[str, list[int]] = {}
    for layer, (first, second) in enumerate(zip(layers_of(ours), layers_of(theirs), strict=False)):
        for line in _unlike(dict(_leaves("", first.model_dump())), dict(_leaves("", second.model_dump()))):
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


def _unsupported(config: Config, family: Family) -> Iterator[str]:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    yield from (f"{key}: missing" for key in needed if config.get(key) is None)
    if (activation := config.get("hidden_act", "silu")) not in ACTIVATIONS:
        yield f"hidden_act: {activation!r}; known: {', '.join(ACTIVATIONS)}"
    rope = _rope_fields(config)
    if (rope_type := rope.get("rope_type", "default")) not in ("default", "llama3"):
        yield f"rope_type: {rope_type!r}; known: default, llama3"
    if any(isinstance(value, dict) for value in rope.values()):
        yield "rope_parameters: different for different layers"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor: only 1.0, the whole head is rotated"
    if config.get("attention_dropout"):
        yield f"attention_dropout: {config['attention_dropout']}; there is no dropout here"
    if config.get("quantization_config"):
        yield "quantization_config: weights must be float32, float16 or bfloat16"
    if strange := set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        yield f"layer_types: {', '.join(sorted(strange))}; known: full_attention, sliding_attention"
    elif family.window == "none" and "sliding_attention" in (config.get("layer_types") or ()):
        yield f"layer_types: sliding_attention, which {family.model_type} does not have"


def _blocks(config: Config, family: Family) -> list[Block]:
    heads = config["num_attention_heads"]
    norm = Norm(epsilon=config["rms_norm_eps"])

    def has(bias: str | bool) -> bool:
        return bool(config.get(bias, False)) if isinstance(bias, str) else bias

    def block(window: int | None) -> Block:
        return Block(
            attention=Attention(
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                rope=_rope(config),
                qk_norm=norm if family.qk_norm else None,
                window=window,
                qkv_bias=has(family.qkv_bias),
                output_bias=has(family.output_bias),
            ),
            mlp=GatedMlp(
                hidden=config["intermediate_size"],
                activation=ACTIVATIONS[config.get("hidden_act", "silu")],  # pyright: ignore[reportArgumentType]  (checked by pydantic)
                bias=has(family.mlp_bias),
            ),
            norm=norm,
        )

    return [block(window) for window in _windows(config, family)]


def _windows(config: Config, family: Family) -> list[int | None]:
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window")
    if family.window == "none" or window is None:
        return [None] * layers
    if family.window == "all layers":
        return [window] * layers
    if not config.get("use_sliding_window", False):
        return [None] * layers
    if types := config.get("layer_types"):
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window if layer >= config["max_window_layers"] else None for layer in range(layers)]


def _rope_fields(config: Config) -> dict[str, Any]:
    """Rope fields as transformers 5 writes them (`rope_parameters`), also from version 4's `rope_theta` and `rope_scaling`."""
    old = config.get("rope_scaling") or {}
    fields = {"rope_theta": config.get("rope_theta", _ROPE_THETA), **old, **(config.get("rope_parameters") or {})}
    return {"rope_type": old.get("type", "default"), **fields}


def _rope(config: Config) -> Rope:
    fields = _rope_fields(config)
    if fields["rope_type"] == "default":
        return Rope(theta=fields["rope_theta"])
    scaling = Llama3Scaling(
        factor=fields["factor"],
        low_freq_factor=fields["low_freq_factor"],
        high_freq_factor=fields["high_freq_factor"],
        original_length=fields["original_max_position_embeddings"],
    )
    return Rope(theta=fields["rope_theta"], scaling=scaling)


def _config(model: Model, family: Family, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """What `family` can say about `model`, from its first layer; the caller checks whether that is all of it."""
    layers = layers_of(model)
    attention, mlp = layers[0].attention, layers[0].mlp
    if not isinstance(attention, Attention):
        raise CheckpointError(f"no Hugging Face family is known for a model whose attention is {attention.type}")
    rope: dict[str, Any] = {"rope_theta": attention.rope.theta, "rope_type": "default"}
    if isinstance(scaling := attention.rope.scaling, Llama3Scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": mlp.hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mlp.activation),
        "rms_norm_eps": layers[0].norm.epsilon,
        "rope_parameters": rope,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.initializer_stddev,
        "dtype": dtype,
        **family.fields,
    }
    for key, value in ((family.qkv_bias, attention.qkv_bias), (family.output_bias, attention.output_bias), (family.mlp_bias, mlp.bias)):
        if isinstance(key, str):
            config[key] = value
    windows = [layer.attention.window for layer in layers]
    if family.window == "all layers":
        config["sliding_window"] = windows[0]
    elif family.window == "layer types":
        config["sliding_window"] = next((window for window in windows if window is not None), None)
        config["use_sliding_window"] = config["sliding_window"] is not None
        config["max_window_layers"] = next((index for index, window in enumerate(windows) if window is not None), len(windows))
        config["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return config


def _whole(model: Model) -> dict[str, Any]:
    fields = model.model_dump(include={"vocab_size", "width", "final_norm", "tie_embeddings", "head_soft_cap"})
    return dict(_leaves("", {**fields, "layers": len(layers_of(model))}))


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for path in dict.fromkeys([*first, *second]):
        if first.get(path) != second.get(path):
            yield f"{path}: {first.get(path)} in the model, {second.get(path)} in config.json"


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
