"""Hugging Face model families as data: tensor names and what config.json says. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

Names = Mapping[str, str]

# Our path (in a block: what follows `segments/S/P/`) -> their name; in a block it follows `model.layers.N.`.
# A weight with matmul inputs is stored there as [outputs, inputs], flattened; the embedding and vectors as here.
MODEL_TENSORS: Final[Names] = MappingProxyType({
    "embed/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
})  # fmt: skip
BLOCK_PREFIX: Final = "model.layers.{layer}."
BLOCK_TENSORS: Final[Names] = MappingProxyType({
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key": "self_attn.k_proj.weight",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value": "self_attn.v_proj.weight",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/out_bias": "self_attn.o_proj.bias",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/gate_bias": "mlp.gate_proj.bias",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/up_bias": "mlp.up_proj.bias",
    "mlp/down": "mlp.down_proj.weight",
    "mlp/down_bias": "mlp.down_proj.bias",
})  # fmt: skip
UNTRANSPOSED: Final = frozenset({"embed/table"})
# Buffers old exports carry, computed from config.json by every reader.
IGNORED_SUFFIXES: Final = (".rotary_emb.inv_freq",)

ACTIVATIONS: Final[Names] = MappingProxyType({"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one `model_type` means. A str is the key of config.json that decides; a bool holds for the whole family."""

    model_type: str
    architecture: str
    qkv_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: bool = False
    window: Literal["none", "all layers", "layer types"] = "none"
    """`all layers`: `sliding_window` holds in every layer; `layer types`: in those `layer_types` or `max_window_layers` name."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What transformers assumes for a key that config.json does not have."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further fields its config.json has, written at export."""


_FIELDS: Final = {"attention_dropout": 0.0, "use_cache": True}
_QWEN_DEFAULTS: Final = {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

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
        fields=_FIELDS,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window="layer types",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        fields=_FIELDS,
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        window="layer types",
        defaults=_QWEN_DEFAULTS,
        fields=_FIELDS,
    ),
)
"""The order export tries them in; the first that can express a model is taken."""
