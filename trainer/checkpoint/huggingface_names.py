"""The mapping tables: our weights' paths to the tensor names of each Hugging Face family. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Stored(NamedTuple):
    """Where one layer of a weight lies."""

    name: str
    """After `model.layers.N.`; with `{expert}` there is one tensor for each expert."""
    transposed: bool = True
    """Whether a matmul weight with input dims I and output dims O is [prod(O), prod(I)]; else it is laid out as ours."""
    offset: int = 0
    step: int = 1
    """Of their last dim it is every `step`-th entry from `offset`."""
    half: int | None = None
    """Of their last dim it is the first half (0) or the second (1)."""

    def columns(self, entries: int) -> slice:
        """Of their last dim, of which our weight is so many entries."""
        return slice(self.offset, None, self.step) if self.half is None else slice(self.half * entries, (self.half + 1) * entries)

    @property
    def share(self) -> int:
        """Our weights that lie in one of their tensors."""
        return self.step if self.half is None else 2


Names = Mapping[str, Stored]


def _names(*tables: Mapping[str, str]) -> dict[str, Stored]:
    return {path: Stored(name) for table in tables for path, name in table.items()}


MODEL: Final[Names] = MappingProxyType({
    "embed/table": Stored("model.embed_tokens.weight", transposed=False),
    "final_norm/scale": Stored("model.norm.weight"),
    "head/kernel": Stored("lm_head.weight"),
})  # fmt: skip
"""In all families."""
BLOCK_PREFIX: Final = "model.layers.{layer}."
IGNORED_SUFFIXES: Final = (".rotary_emb.inv_freq",)
"""Buffers that old exports carry, computed from config.json by every reader."""
LANGUAGE_PREFIXES: Final[Mapping[str, str]] = MappingProxyType({"language_model.": "", "model.language_model.": "model."})
"""What names of the language model begin with in a model that also sees images, as versions of transformers write them."""
IMAGE_PREFIXES: Final = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

MODULE: Final[Names] = MappingProxyType({
    "token_norm/scale": Stored("enorm.weight"),
    "hidden_norm/scale": Stored("hnorm.weight"),
    "from_token": Stored("eh_proj.weight", half=0),
    "from_hidden": Stored("eh_proj.weight", half=1),
    "final_norm/scale": Stored("shared_head.norm.weight"),
})  # fmt: skip
"""Of a module of multi-token prediction beside its block, as DeepSeek-V3 is published: one more layer behind the last. One matrix
projects the embedded token and the hidden state behind one another (vLLM and SGLang: `eh_proj(cat([enorm(token), hnorm(hidden)]))`)."""
MODULE_COPIES: Final[Mapping[str, str]] = MappingProxyType({"embed/table": "embed_tokens.weight", "head/kernel": "shared_head.head.weight"})
"""What the module holds a second time, by our path of it in the model."""

_ATTENTION: Final = {
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
}
_LATENT_ATTENTION: Final = {
    "attention/query": "self_attn.q_proj.weight",
    "attention/query_down": "self_attn.q_a_proj.weight",
    "attention/query_down_bias": "self_attn.q_a_proj.bias",
    "attention/query_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/query_up": "self_attn.q_b_proj.weight",
    "attention/key_value_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/key_value_down_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "attention/key_value_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/key_value_up": "self_attn.kv_b_proj.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/out_bias": "self_attn.o_proj.bias",
}
_PRE_NORMS: Final = {"attention_norm/scale": "input_layernorm.weight", "mlp_norm/scale": "post_attention_layernorm.weight"}
_POST_NORMS: Final = {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
_BOTH_NORMS: Final = {
    **_POST_NORMS,
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
}
_MLP: Final = {
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/gate_bias": "mlp.gate_proj.bias",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/up_bias": "mlp.up_proj.bias",
    "mlp/down": "mlp.down_proj.weight",
    "mlp/down_bias": "mlp.down_proj.bias",
}
_EXPERTS: Final = {
    "mlp/router/kernel": "mlp.gate.weight",
    "mlp/experts/gate": "mlp.experts.{expert}.gate_proj.weight",
    "mlp/experts/up": "mlp.experts.{expert}.up_proj.weight",
    "mlp/experts/down": "mlp.experts.{expert}.down_proj.weight",
}

LLAMA: Final[Names] = _names(_ATTENTION, _PRE_NORMS, _MLP)
GEMMA_2: Final[Names] = _names(_ATTENTION, _BOTH_NORMS, _MLP)
OLMO_2: Final[Names] = _names(_ATTENTION, _POST_NORMS, _MLP)
MIXTRAL: Final[Names] = _names(
    _ATTENTION,
    _PRE_NORMS,
    {
        "mlp/router/kernel": "block_sparse_moe.gate.weight",
        "mlp/experts/gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "mlp/experts/up": "block_sparse_moe.experts.{expert}.w3.weight",
        "mlp/experts/down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
)
QWEN_3_MOE: Final[Names] = _names(_ATTENTION, _PRE_NORMS, _MLP, _EXPERTS)
GPT_OSS: Final[Names] = {
    **_names(_ATTENTION, _PRE_NORMS),
    "attention/sinks": Stored("self_attn.sinks"),
    "mlp/router/kernel": Stored("mlp.router.weight"),
    "mlp/router/bias": Stored("mlp.router.bias"),
    "mlp/experts/gate": Stored("mlp.experts.gate_up_proj", transposed=False, offset=0, step=2),
    "mlp/experts/up": Stored("mlp.experts.gate_up_proj", transposed=False, offset=1, step=2),
    "mlp/experts/gate_bias": Stored("mlp.experts.gate_up_proj_bias", offset=0, step=2),
    "mlp/experts/up_bias": Stored("mlp.experts.gate_up_proj_bias", offset=1, step=2),
    "mlp/experts/down": Stored("mlp.experts.down_proj", transposed=False),
    "mlp/experts/down_bias": Stored("mlp.experts.down_proj_bias"),
}
DEEPSEEK_V3: Final[Names] = _names(
    _LATENT_ATTENTION,
    _PRE_NORMS,
    _MLP,
    _EXPERTS,
    {
        "mlp/router/balance": "mlp.gate.e_score_correction_bias",
        "mlp/shared/gate": "mlp.shared_experts.gate_proj.weight",
        "mlp/shared/up": "mlp.shared_experts.up_proj.weight",
        "mlp/shared/down": "mlp.shared_experts.down_proj.weight",
    },
)
