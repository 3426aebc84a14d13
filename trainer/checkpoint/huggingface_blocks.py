"""The layers of a config.json as our blocks, and back. No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.checkpoint.huggingface_families import ACTIVATIONS, Experts, Family
from trainer.checkpoint.huggingface_rope import FULL, LOCAL, rope_from_huggingface, rope_problems, rope_to_huggingface
from trainer.config.model import (
    Attention,
    BiasBalancing,
    Block,
    Clamp,
    GatedMlp,
    Groups,
    LatentAttention,
    Moe,
    Norm,
    Router,
)  # fmt: skip

Config = Mapping[str, Any]


def block_problems(config: Config, family: Family) -> Iterator[str]:
    """What the layers miss, or ask for that this trainer cannot compute."""
    yield from (f"{key}: missing" for key in _needed(config, family) if config.get(key) is None)
    if (activation := _activation(config, family)) not in ACTIVATIONS:
        yield f"{family.activation_key}: {activation!r}; known: {', '.join(ACTIVATIONS)}"
    yield from rope_problems(config, family)
    if not family.latent and config.get("partial_rotary_factor") == 0:
        yield "partial_rotary_factor: 0, but RoPE is the only position embedding here"
    if strange := set(config.get("layer_types") or ()) - {FULL, LOCAL}:
        yield f"layer_types: {', '.join(sorted(strange))}; known: {FULL}, {LOCAL}"
    elif family.window == "none" and LOCAL in (config.get("layer_types") or ()):
        yield f"layer_types: {LOCAL}, which {family.model_type} does not have"
    elif family.window == "layer types" and len(config.get("layer_types") or ()) not in (0, config.get("num_hidden_layers")):
        yield f"layer_types: {len(config['layer_types'])} of them for {config.get('num_hidden_layers')} layers"


def blocks_from_huggingface(config: Config, family: Family) -> list[Block]:
    """One for each layer."""
    norm = Norm(epsilon=config["rms_norm_eps"], offset=family.norm_offset)
    sparse = _sparse_layers(config, family.experts)
    return [
        Block(
            attention=_latent(config, family) if family.latent else _grouped(config, family, norm, window),
            mlp=_moe(config, family, family.experts) if family.experts and has_experts else _gated(config, family),
            norm=norm,
            norms=family.norms,
        )
        for window, has_experts in zip(_windows(config, family), sparse, strict=True)
    ]


def blocks_to_huggingface(blocks: Sequence[Block], family: Family, *, max_positions: int) -> dict[str, Any] | None:
    """What `family` can say about `blocks`; the caller checks whether that is all of it. None: they are not of its kind."""
    attentions = [block.attention for block in blocks]
    dense = next((block.mlp for block in blocks if isinstance(block.mlp, GatedMlp)), None)
    moe = next((block.mlp for block in blocks if isinstance(block.mlp, Moe)), None)
    if any(isinstance(attention, LatentAttention) != family.latent for attention in attentions) or (moe is None) != (
        family.experts is None
    ):
        return None
    full = next((attention.rope for attention in attentions if attention.window is None), attentions[0].rope)
    local = next((attention.rope for attention in attentions if attention.window is not None), full)
    mlp = dense or moe
    assert mlp is not None
    config: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "intermediate_size": mlp.hidden,
        "rms_norm_eps": blocks[0].norm.epsilon,
        "rope_parameters": rope_to_huggingface(full, local if family.rope_by_layer_type else None, max_positions=max_positions),
        family.activation_key: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mlp.activation),
        **_windows_written(blocks, family),
    }
    if isinstance(family.mlp_bias, str):
        config[family.mlp_bias] = mlp.bias
    config |= _attention_written(attentions[0], family)
    if moe is not None and family.experts is not None:
        config |= _moe_written(moe, [isinstance(block.mlp, Moe) for block in blocks], family.experts)
    return config


def _needed(config: Config, family: Family) -> Iterator[str]:
    yield from ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "intermediate_size")
    if family.latent:
        yield from ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if (experts := family.experts) is not None:
        yield from (experts.count_key, experts.hidden_key, "num_experts_per_tok")
        yield from () if experts.scale_key is None else (experts.scale_key,)
        yield from ("n_group", "topk_group") if experts.groups else ()
        yield from ("swiglu_limit", "swiglu_alpha") if experts.clamp else ()


def _has(config: Config, switch: str | bool) -> bool:
    return bool(config.get(switch, False)) if isinstance(switch, str) else switch


def _activation(config: Config, family: Family) -> str:
    activation = config.get(family.activation_key) or config.get("hidden_act") or "silu"
    return "gelu_pytorch_tanh" if activation == "gelu" and family.gelu_is_tanh else activation


def _grouped(config: Config, family: Family, norm: Norm, window: int | None) -> Attention:
    heads = config["num_attention_heads"]
    return Attention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope=rope_from_huggingface(config, family, windowed=window is not None),
        qk_norm=norm if family.qk_norm else None,
        qk_norm_over=family.qk_norm or "head",
        window=window,
        soft_cap=config.get(family.score_cap_key) if family.score_cap_key else None,
        scale_dim=config.get(family.scale_dim_key) if family.scale_dim_key else None,
        sinks=family.sinks,
        qkv_bias=_has(config, family.qkv_bias),
        output_bias=_has(config, family.output_bias),
    )


def _latent(config: Config, family: Family) -> LatentAttention:
    return LatentAttention(
        heads=config["num_attention_heads"],
        query_rank=config.get("q_lora_rank"),
        key_value_rank=config["kv_lora_rank"],
        plain_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        rope=rope_from_huggingface(config, family, windowed=False),
        bias=_has(config, family.qkv_bias),
    )


def _gated(config: Config, family: Family) -> GatedMlp:
    activation: Any = ACTIVATIONS[_activation(config, family)]
    return GatedMlp(hidden=config["intermediate_size"], activation=activation, bias=_has(config, family.mlp_bias))


def _moe(config: Config, family: Family, experts: Experts) -> Moe:
    activation: Any = ACTIVATIONS[_activation(config, family)]
    width = config[experts.hidden_key]
    groups = Groups(count=config["n_group"], chosen=config["topk_group"]) if experts.groups and config["n_group"] > 1 else None
    return Moe(
        experts=config[experts.count_key],
        experts_per_token=config["num_experts_per_tok"],
        hidden=width,
        shared_hidden=width * config[experts.shared_key] if experts.shared_key and config[experts.shared_key] else None,
        activation=activation,
        clamp=Clamp(limit=config["swiglu_limit"], slope=config["swiglu_alpha"]) if experts.clamp else None,
        bias=experts.bias,
        router=Router(
            scoring=experts.scoring,
            normalize=bool(config.get(experts.normalize_key)) if experts.normalize_key else True,
            scale=config[experts.scale_key] if experts.scale_key else 1.0,
            bias=experts.bias,
            groups=groups,
            # transformers never changes it; a run that should sets its own rate.
            bias_balancing=BiasBalancing(update_rate=0.0) if experts.balance else None,
        ),
    )


def _sparse_layers(config: Config, experts: Experts | None) -> list[bool]:
    layers = range(config["num_hidden_layers"])
    match experts and experts.sparse:
        case None:
            return [False for _ in layers]
        case "all":
            return [True for _ in layers]
        case "steps":
            dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
            return [layer not in dense and (layer + 1) % step == 0 for layer in layers]
        case "after dense":
            return [layer >= config["first_k_dense_replace"] for layer in layers]


def _windows(config: Config, family: Family) -> list[int | None]:
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window")
    if family.window == "none" or window is None or (family.window_switch and not config.get("use_sliding_window", False)):
        return [None] * layers
    if family.window == "all layers":
        return [window] * layers
    if types := config.get("layer_types"):
        return [window if kind == LOCAL else None for kind in types]
    if family.full_every is not None:
        period = config.get("sliding_window_pattern") or family.full_every
        return [window if (layer + 1) % period else None for layer in range(layers)]
    return [window if layer >= config["max_window_layers"] else None for layer in range(layers)]


def _attention_written(attention: Attention | LatentAttention, family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {"num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads}
    if isinstance(attention, LatentAttention):
        biases = attention.bias, attention.bias
        config |= {
            "q_lora_rank": attention.query_rank,
            "kv_lora_rank": attention.key_value_rank,
            "qk_nope_head_dim": attention.plain_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "v_head_dim": attention.value_dim,
            "rope_interleave": attention.rope.pairs == "interleaved",
        }
    else:
        biases = attention.qkv_bias, attention.output_bias
        config["head_dim"] = attention.head_dim
        if family.scale_dim_key:
            scale_dim = attention.scale_dim or attention.head_dim
            config[family.scale_dim_key] = int(scale_dim) if scale_dim == int(scale_dim) else scale_dim  # transformers wants an int
        if family.score_cap_key:
            config[family.score_cap_key] = attention.soft_cap
    switches = zip((family.qkv_bias, family.output_bias), biases, strict=True)
    return config | {switch: value for switch, value in switches if isinstance(switch, str)}


def _moe_written(moe: Moe, sparse: Sequence[bool], experts: Experts) -> dict[str, Any]:
    router = moe.router
    optional = {experts.normalize_key: router.normalize, experts.scale_key: router.scale}
    if experts.shared_key is not None:
        optional[experts.shared_key] = (moe.shared_hidden or 0) // moe.hidden
    config: dict[str, Any] = {
        experts.count_key: moe.experts,
        experts.hidden_key: moe.hidden,
        "num_experts_per_tok": moe.experts_per_token,
        **{key: value for key, value in optional.items() if key is not None},
    }
    if experts.groups:
        config |= {"n_group": router.groups.count if router.groups else 1, "topk_group": router.groups.chosen if router.groups else 1}
    if experts.clamp and moe.clamp is not None:
        config |= {"swiglu_limit": moe.clamp.limit, "swiglu_alpha": moe.clamp.slope}
    match experts.sparse:
        case "all":
            return config
        case "steps":
            layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
            step = next(step for step in range(len(sparse), 0, -1) if all((layer + 1) % step == 0 for layer in layers))
            dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse and (layer + 1) % step == 0]
            return {**config, "decoder_sparse_step": step, "mlp_only_layers": dense}
        case "after dense":
            return {**config, "first_k_dense_replace": list(sparse).index(True)}


def _windows_written(blocks: Sequence[Block], family: Family) -> dict[str, Any]:
    windows = [block.attention.window for block in blocks]
    window = next((window for window in windows if window is not None), None)
    if family.window == "none":
        return {}
    config: dict[str, Any] = {"sliding_window": window}
    if family.window_switch:
        config["use_sliding_window"] = window is not None
    if family.window == "layer types":
        config["layer_types"] = [FULL if window is None else LOCAL for window in windows]
        if family.window_switch:
            config["max_window_layers"] = next((index for index, window in enumerate(windows) if window is not None), len(windows))
    return config
