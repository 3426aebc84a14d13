"""Reference checkpoints of every family with random config.json fields: what nobody thought of. Made with transformers and torch.

python tests/oracle/random_cases.py FOLDER FIRST COUNT [FAMILY ...]: cases FIRST ... FIRST + COUNT - 1 of each family into FOLDER/FAMILY-N.
`python -m tests.oracle.random_compare FOLDER/*` compares.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from generate import FULL, LOCAL, reference  # beside this file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

Fields = dict[str, Any]
ACTIVATIONS: Final = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES: Final = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


def rope(draw: random.Random, kinds: Sequence[str] = ("default", "default", "linear", "llama3", "yarn")) -> Fields:
    kind = draw.choice(kinds)
    fields: Fields = {"rope_type": kind, "rope_theta": draw.choice([100.0, 10000.0, 500000.0, 1000000])}
    if kind == "linear":
        fields["factor"] = draw.choice([2.0, 8.0, 3])
    if kind == "llama3":
        fields |= {"factor": draw.choice([4.0, 8.0]), "low_freq_factor": 1.0, "high_freq_factor": draw.choice([2.0, 4.0]),
                   "original_max_position_embeddings": draw.choice([8, 16, 32])}  # fmt: skip
    if kind == "yarn":
        fields["factor"] = draw.choice([2.0, 4.0, 32.0])
        for chance, more in (
            (0.8, {"original_max_position_embeddings": draw.choice([8, 16, 32])}),
            (0.4, {"beta_fast": draw.choice([4.0, 32.0]), "beta_slow": draw.choice([1.0, 0.5])}),
            (0.3, {"truncate": False}),
            (0.3, {"attention_factor": 1.2}),
            (0.3, {"mscale": draw.choice([1.0, 0.7]), "mscale_all_dim": draw.choice([1.0, 0.5])}),
        ):
            fields |= more if draw.random() < chance else {}
    return fields


def common(draw: random.Random) -> Fields:
    heads = draw.choice([2, 4, 6])
    return {
        "vocab_size": draw.choice([37, 40, 64]), "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([kv for kv in (1, 2, 3, 4, 6) if heads % kv == 0]), "hidden_size": heads * draw.choice([4, 8]),
        "intermediate_size": draw.choice([20, 24, 40]), "num_hidden_layers": draw.choice([1, 2, 3, 4, 5]),
        "max_position_embeddings": draw.choice([32, 64, 128]), "initializer_range": 0.25, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "rms_norm_eps": draw.choice([1e-6, 1e-5]), "tie_word_embeddings": draw.random() < 0.4,
    }  # fmt: skip


def maybe(draw: random.Random, chance: float, **fields: Any) -> Fields:
    return fields if draw.random() < chance else {}


def layer_types(draw: random.Random, fields: Fields) -> Fields:
    return maybe(draw, 0.4, layer_types=[draw.choice([LOCAL, FULL]) for _ in range(fields["num_hidden_layers"])])


def llama(draw: random.Random, fields: Fields) -> Fields:
    return {"rope_parameters": rope(draw), "attention_bias": draw.random() < 0.3, "mlp_bias": draw.random() < 0.3,
            "hidden_act": draw.choice(ACTIVATIONS), **maybe(draw, 0.5, head_dim=draw.choice([4, 8, 12, 16]))}  # fmt: skip


def mistral(draw: random.Random, fields: Fields) -> Fields:
    return {"rope_parameters": rope(draw), "sliding_window": draw.choice([None, 3, 8, 100]), "hidden_act": draw.choice(ACTIVATIONS),
            **maybe(draw, 0.5, head_dim=draw.choice([4, 8, 12, 16]))}  # fmt: skip


def mixtral(draw: random.Random, fields: Fields) -> Fields:
    # transformers computes no YaRN for it without a head dim.
    return {"rope_parameters": rope(draw), "sliding_window": draw.choice([None, 3, 8]), "num_local_experts": draw.choice([2, 4, 5]),
            "num_experts_per_tok": draw.choice([1, 2]), "head_dim": draw.choice([4, 8, 12, 16])}  # fmt: skip


def qwen2(draw: random.Random, fields: Fields) -> Fields:
    windows = draw.random() < 0.6
    return {"rope_parameters": rope(draw), "use_sliding_window": windows, "sliding_window": draw.choice([3, 5, 8]),
            "max_window_layers": draw.choice([0, 1, 2, 9]), **(layer_types(draw, fields) if windows else {})}  # fmt: skip


def qwen3(draw: random.Random, fields: Fields) -> Fields:
    return {**qwen2(draw, fields), "attention_bias": draw.random() < 0.4, "head_dim": draw.choice([4, 8, 12])}


def qwen3_moe(draw: random.Random, fields: Fields) -> Fields:
    return {
        "rope_parameters": rope(draw), "use_sliding_window": draw.random() < 0.4, "sliding_window": draw.choice([3, 5]),
        "num_experts": draw.choice([4, 6]), "num_experts_per_tok": draw.choice([1, 2, 3]), "moe_intermediate_size": draw.choice([8, 12]),
        "norm_topk_prob": draw.random() < 0.5, "decoder_sparse_step": draw.choice([1, 1, 2, 3]),
        "mlp_only_layers": draw.choice([None, [], [0], [1]]), "attention_bias": draw.random() < 0.3,
        **maybe(draw, 0.7, head_dim=draw.choice([4, 8, 12, 16])),
    }  # fmt: skip


def gemma(draw: random.Random, fields: Fields) -> Fields:
    return {"rope_parameters": rope(draw), "attention_bias": draw.random() < 0.3, "head_dim": draw.choice([4, 8, 12]),
            "hidden_act": draw.choice(ACTIVATIONS), "tie_word_embeddings": draw.random() < 0.7}  # fmt: skip


def gemma2(draw: random.Random, fields: Fields) -> Fields:
    return {
        "rope_parameters": rope(draw), "head_dim": draw.choice([4, 8, 12]), "query_pre_attn_scalar": draw.choice([4, 12, 16]),
        "sliding_window": draw.choice([3, 8]), "final_logit_softcapping": draw.choice([None, 1.5, 30.0]),
        "attn_logit_softcapping": draw.choice([None, 1.0, 50.0]), "attention_bias": draw.random() < 0.3,
        "tie_word_embeddings": draw.random() < 0.7, "hidden_activation": draw.choice(ACTIVATIONS), **layer_types(draw, fields),
    }  # fmt: skip


def gemma3_text(draw: random.Random, fields: Fields) -> Fields:
    fields = {**fields, "num_hidden_layers": draw.choice([2, 6, 7, 8])}
    found = {**gemma2(draw, fields), "num_hidden_layers": fields["num_hidden_layers"]}
    del found["rope_parameters"], found["hidden_activation"]
    types = found.get("layer_types")
    if types is None:
        found |= maybe(draw, 0.5, sliding_window_pattern=draw.choice([2, 3]))
    if types is None or {*types} == {LOCAL, FULL}:
        kinds = {LOCAL: ("default", "linear"), FULL: ("default", "linear", "yarn", "llama3")}
        found |= maybe(draw, 0.7, rope_parameters={kind: rope(draw, choices) for kind, choices in kinds.items()})
    return found


def olmo2(draw: random.Random, fields: Fields) -> Fields:
    return {"rope_parameters": rope(draw), "attention_bias": draw.random() < 0.4, "hidden_act": draw.choice(ACTIVATIONS)}


def gpt_oss(draw: random.Random, fields: Fields) -> Fields:
    return {
        "num_local_experts": draw.choice([3, 4]), "num_experts_per_tok": draw.choice([1, 2, 3]), "sliding_window": draw.choice([3, 6]),
        "swiglu_limit": draw.choice([0.5, 7.0]), "swiglu_alpha": draw.choice([1.702, 1.2]), "attention_bias": draw.random() < 0.7,
        "head_dim": draw.choice([4, 8, 12]), **maybe(draw, 0.7, rope_parameters=rope(draw)), **layer_types(draw, fields),
    }  # fmt: skip


def deepseek_v3(draw: random.Random, fields: Fields) -> Fields:
    groups = draw.choice([1, 2, 4])
    chosen = draw.choice([count for count in (1, 2, 3, 4) if count <= groups])
    return {
        "num_key_value_heads": fields["num_attention_heads"], "q_lora_rank": draw.choice([None, 8, 12]),
        "kv_lora_rank": draw.choice([8, 6]),
        "qk_nope_head_dim": draw.choice([8, 6]), "qk_rope_head_dim": draw.choice([4, 8]), "v_head_dim": draw.choice([6, 8, 12]),
        "n_routed_experts": 8, "num_experts_per_tok": min(draw.choice([1, 2, 3]), 8 // groups * chosen),
        "moe_intermediate_size": draw.choice([8, 12]), "n_shared_experts": draw.choice([1, 2, 3]), "n_group": groups, "topk_group": chosen,
        "routed_scaling_factor": draw.choice([1.0, 2.5]), "norm_topk_prob": draw.random() < 0.6,
        "first_k_dense_replace": draw.choice([0, 1, 2]), "rope_interleave": draw.random() < 0.6, "attention_bias": draw.random() < 0.4,
        "rope_parameters": rope(draw, ("default", "yarn", "yarn", "linear")),
    }  # fmt: skip


FAMILIES: Final[dict[str, Callable[[random.Random, Fields], Fields]]] = {
    family.__name__: family
    for family in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gemma2, gemma3_text, olmo2, gpt_oss, deepseek_v3)
}


def as_transformers_4_wrote_it(config: Fields, draw: random.Random) -> Fields:
    """A config.json with RoPE's parameters where they were before; as it is where that version could not say them."""
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "use_cache", "attention_dropout")}
    older |= {"torch_dtype": config["dtype"], "transformers_version": "4.46.0"}
    parameters = dict(config.get("rope_parameters") or {})
    if config["model_type"] == "gemma3_text":
        parameters, local = dict(parameters.get(FULL) or {}), dict(parameters.get(LOCAL) or {})
        if local.get("rope_type", "default") != "default":
            return config
        older |= {"rope_local_base_freq": local["rope_theta"]} if local else {}
    if parameters:
        older["rope_theta"] = parameters.pop("rope_theta")
        plain = parameters["rope_type"] == "default"
        if draw.random() < 0.5:
            parameters["type"] = parameters.pop("rope_type")
        older["rope_scaling"] = None if plain else parameters
    if "num_mtp_layers" in older:
        older["num_nextn_predict_layers"] = older.pop("num_mtp_layers")
    return older


def generate(folder: Path, family: str, number: int) -> None:
    draw = random.Random(f"{family} {number}")
    torch.manual_seed(number)
    fields = common(draw)
    fields |= {**FAMILIES[family](draw, fields), "model_type": family}
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **kinds).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (tensor.ndim == 1 and "inv_freq" not in name and "embed_scale" not in name) or name.endswith("_bias"):
                tensor += (0.6 if "correction" in name else 0.2) * torch.randn_like(tensor)
    dtype = draw.choice(DTYPES)
    model.to(dtype).config.dtype = dtype
    model.save_pretrained(folder, **maybe(draw, 0.3, max_shard_size="15KB"))
    # What was rounded is read back.
    model = AutoModelForCausalLM.from_pretrained(folder, **kinds).eval()
    ids = torch.tensor(np.random.default_rng(number).integers(3, fields["vocab_size"], (2, 24)))
    np.savez(folder / "reference.npz", input_ids=ids.numpy(), **reference(model, ids))
    written = json.loads((folder / "config.json").read_text())
    if draw.random() < 0.5:
        (folder / "config.json").write_text(json.dumps(as_transformers_4_wrote_it(written, draw), indent=2) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder, first, count, *families = sys.argv[1:]
    for family in families or FAMILIES:
        for number in range(int(first), int(first) + int(count)):
            generate(Path(folder) / f"{family}-{number}", family, number)
            print(f"{family}-{number}", flush=True)


if __name__ == "__main__":
    main()
