"""Hugging Face model families as data: what their config.json says, and what it means for our model. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from trainer.checkpoint import huggingface_names as names
from trainer.checkpoint.huggingface_names import Names

ACTIVATIONS: Final[Mapping[str, str]] = MappingProxyType({
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
})  # fmt: skip
"""Several names of one function; the first of ours is written."""

EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What a family's config.json says about a mixture of experts. Fields `*_key` name a key of it."""

    count_key: str
    hidden_key: str
    sparse: Literal["all", "steps", "after dense"] = "all"
    """Layers with experts: all; every `decoder_sparse_step`-th one that is not in `mlp_only_layers`; those from
    `first_k_dense_replace` on."""
    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    normalize_key: str | None = None
    """None: weights are normalised."""
    scale_key: str | None = None
    bias: bool = False
    """Biases in experts and router."""
    clamp: bool = False
    """Clamped SwiGLU: `swiglu_limit`, `swiglu_alpha`."""
    groups: bool = False
    """`n_group`, `topk_group`."""
    balance: bool = False
    """A bias of each expert that takes part in the choice only."""
    shared_key: str | None = None
    """How many experts wide the shared one is."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one `model_type` means. A str is the key of config.json that decides; a bool holds for the whole family."""

    model_type: str
    architecture: str
    names: Names = field(default_factory=lambda: names.LLAMA)
    """Of the tensors of a layer."""
    latent: bool = False
    """Multi-head latent attention."""
    qkv_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: Literal["head", "all_heads"] | None = None
    sinks: bool = False
    scale_dim_key: str | None = None
    """What scores are divided by the square root of; None: the head dim."""
    score_cap_key: str | None = None
    """Attention's soft cap."""
    head_cap_key: str | None = None
    """The head's."""
    window: Literal["none", "all layers", "layer types"] = "none"
    """Layers `sliding_window` holds in: all, or those `layer_types` names."""
    window_switch: bool = False
    """Only where `use_sliding_window` says so; without `layer_types`: in layers from `max_window_layers` on."""
    full_every: int | None = None
    """Without `layer_types`: every so-manieth layer has no window (`sliding_window_pattern` overrides it)."""
    rope_by_layer_type: bool = False
    """Layers with a window have RoPE parameters of their own."""
    theta: float = 10_000.0
    """RoPE's base where config.json has none."""
    rope: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Its scaling where config.json says nothing of RoPE's parameters."""
    local_theta: float = 10_000.0
    """The same for layers with a window, where they have their own."""
    norms: Literal["pre", "post", "both"] = "pre"
    norm_offset: float = 0.0
    embedding_scale: bool = False
    """Embedded tokens are multiplied by the square root of the width."""
    activation_key: str = "hidden_act"
    gelu_is_tanh: bool = False
    """`gelu` in an old config.json means its tanh approximation."""
    experts: Experts | None = None
    modules_keys: tuple[str, ...] = ()
    """How many modules of multi-token prediction lie behind the last layer: the first that is there; the first is written."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What transformers assumes for a key that config.json does not have."""
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keys that have one value we can compute, where they are there."""
    fields: Mapping[str, Any] = field(default_factory=lambda: _FIELDS)
    """Further fields its config.json has, written at export."""

    def renamed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """`config` with the number of experts under the key of the family: versions of transformers write it under several."""
        found = next((config[key] for key in EXPERT_COUNTS if config.get(key) is not None), None)
        return config if self.experts is None or found is None else {**config, self.experts.count_key: found}


WRAPPED: Final[Mapping[str, str]] = MappingProxyType({"gemma3": "gemma3_text"})
"""Models of images and text: the `model_type` of what their `text_config` describes."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a language model alone: `config` itself, or of a model that also sees images its `text_config`."""
    inner: Mapping[str, Any] | None = config.get("text_config")
    if inner is None or config.get("model_type") not in WRAPPED:
        return config
    model_type = WRAPPED[config["model_type"]]
    architecture = next(family.architecture for family in FAMILIES if family.model_type == model_type)
    shared = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config")
    outer = {key: config[key] for key in shared if config.get(key) is not None}
    return {**outer, **inner, "model_type": model_type, "architectures": [architecture]}


_FIELDS: Final = {"attention_dropout": 0.0, "use_cache": True}
_MOE_FIELDS: Final = {**_FIELDS, "output_router_logits": False, "router_aux_loss_coef": 0.001}
_QWEN_DEFAULTS: Final = {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA_DEFAULTS: Final = {"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA_2_DEFAULTS: Final = {
    **_GEMMA_DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
# What the published models with images leave to their class.
_GEMMA_3_DEFAULTS: Final = {
    **_GEMMA_2_DEFAULTS, "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8,
}  # fmt: skip

FAMILIES: Final = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={"rms_norm_eps": 1e-6},
        fields={**_FIELDS, "pretraining_tp": 1},
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        window="all layers",
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        window="layer types",
        window_switch=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        window="layer types",
        window_switch=True,
        defaults=_QWEN_DEFAULTS,
    ),
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norm_offset=1.0,
        embedding_scale=True,
        gelu_is_tanh=True,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        names=names.GEMMA_2,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        scale_dim_key="query_pre_attn_scalar",
        score_cap_key="attn_logit_softcapping",
        head_cap_key="final_logit_softcapping",
        window="layer types",
        full_every=2,
        norms="both",
        norm_offset=1.0,
        embedding_scale=True,
        activation_key="hidden_activation",
        defaults={**_GEMMA_2_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        names=names.GEMMA_2,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        scale_dim_key="query_pre_attn_scalar",
        head_cap_key="final_logit_softcapping",
        window="layer types",
        full_every=6,
        rope_by_layer_type=True,
        theta=1_000_000.0,
        norms="both",
        norm_offset=1.0,
        embedding_scale=True,
        activation_key="hidden_activation",
        defaults=_GEMMA_3_DEFAULTS,
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        names=names.OLMO_2,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="all_heads",
        norms="post",
        defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        names=names.MIXTRAL,
        window="all layers",
        theta=1_000_000.0,
        experts=Experts(count_key="num_local_experts", hidden_key="intermediate_size"),
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        fields={**_MOE_FIELDS, "router_jitter_noise": 0.0},
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        names=names.QWEN_3_MOE,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        window="all layers",
        window_switch=True,
        experts=Experts(count_key="num_experts", hidden_key="moe_intermediate_size", sparse="steps", normalize_key="norm_topk_prob"),
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768, "norm_topk_prob": False},
        fields=_MOE_FIELDS,
    ),
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        names=names.GPT_OSS,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        sinks=True,
        window="layer types",
        full_every=2,
        theta=150_000.0,
        rope={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        experts=Experts(
            count_key="num_local_experts", hidden_key="intermediate_size", scoring="softmax_of_chosen", bias=True, clamp=True
        ),
        defaults={
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
        },
        fields=_MOE_FIELDS,
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        names=names.DEEPSEEK_V3,
        latent=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        experts=Experts(
            count_key="n_routed_experts",
            hidden_key="moe_intermediate_size",
            sparse="after dense",
            scoring="sigmoid",
            normalize_key="norm_topk_prob",
            scale_key="routed_scaling_factor",
            groups=True,
            balance=True,
            shared_key="n_shared_experts",
        ),
        modules_keys=("num_nextn_predict_layers", "num_mtp_layers"),
        defaults={
            "rms_norm_eps": 1e-6, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "rope_interleave": True, "n_routed_experts": 256, "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        },
        fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        fields={**_FIELDS, "pretraining_tp": 1},
    ),
)  # fmt: skip
"""The order export tries them in; the first that can express a model is taken."""
