"""Make reference checkpoints with Hugging Face transformers and torch (tests/oracle/README.md); neither is needed to run the tests.

python tests/oracle/generate.py FOLDER [NAME ...]: cases by name (default: all) into FOLDER/NAME.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

TINY: Final = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.25,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3: Final = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LOCAL, FULL = "sliding_attention", "full_attention"
MIXTRAL: Final = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE: Final = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GEMMA2: Final = {"model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 12, "final_logit_softcapping": 1.5,
                 "attn_logit_softcapping": 1.0}  # fmt: skip
GEMMA3: Final = {
    "model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 12,
    "layer_types": [LOCAL, LOCAL, FULL, LOCAL],
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}  # fmt: skip
GPT_OSS: Final = {
    "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
    "swiglu_limit": 0.75, "intermediate_size": 12, "rope_parameters": {**YARN, "truncate": False},
}  # fmt: skip
DEEPSEEK: Final = {
    "model_type": "deepseek_v3", "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1,
    "num_mtp_layers": 0, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
}  # fmt: skip
CASES: Final[dict[str, dict[str, Any]]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-biases-tied-linear": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                                 "hidden_act": "gelu", "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral-full-tied": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "mixtral": MIXTRAL,
    "mixtral-window-tied": {**MIXTRAL, "sliding_window": 5, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3-biases-windows-yarn": {"model_type": "qwen3", "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
                                  "layer_types": [LOCAL, FULL, LOCAL], "rope_parameters": YARN},
    "qwen3-moe": {**QWEN3_MOE, "norm_topk_prob": True},
    "qwen3-moe-sparse-step": {**QWEN3_MOE, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3],
                              "attention_bias": True, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma-biases-untied": {"model_type": "gemma", "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": GEMMA2,
    "gemma2-no-caps": {**GEMMA2, "final_logit_softcapping": None, "attn_logit_softcapping": None, "layer_types": [FULL, LOCAL, LOCAL]},
    "gemma3": GEMMA3,
    "gemma3-caps-biases": {**GEMMA3, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5, "attention_bias": True,
                           "num_hidden_layers": 7, "layer_types": None, "sliding_window_pattern": 3, "rope_parameters": None},
    "olmo2": {"model_type": "olmo2", "head_dim": None},
    "olmo2-biases-tied": {"model_type": "olmo2", "head_dim": None, "attention_bias": True, "tie_word_embeddings": True,
                          "num_key_value_heads": 4},
    "gpt-oss": GPT_OSS,
    "gpt-oss-full-no-biases": {**GPT_OSS, "num_hidden_layers": 3, "layer_types": [FULL, FULL, LOCAL], "attention_bias": False,
                               "swiglu_limit": 7.0, "swiglu_alpha": 1.2, "tie_word_embeddings": True,
                               "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3-plain-queries": {**DEEPSEEK, "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
                                  "norm_topk_prob": False, "attention_bias": True, "first_k_dense_replace": 0, "n_shared_experts": 1,
                                  "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip
PROMPT, STEPS = 8, 10
MODULES: Final = "deepseek-v3-modules"
"""A DeepSeek-V3 with two modules of multi-token prediction, as published: layers behind the last."""


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder, *names = sys.argv[1:]
    for name in names or (*CASES, MODULES):
        if name == MODULES:
            generate_modules(Path(folder) / name, 2)
        else:
            generate(Path(folder) / name, CASES[name])
        print(name, flush=True)


def generate(folder: Path, case: dict[str, Any]) -> None:
    random = np.random.default_rng(zlib.crc32(json.dumps(case, sort_keys=True).encode()))
    torch.manual_seed(int(random.integers(2**31)))
    fields = {**TINY, **case}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (tensor.ndim == 1 and ("inv_freq" not in name and "embed_scale" not in name)) or name.endswith("_bias"):
                tensor += 0.2 * torch.randn_like(tensor)
    model.save_pretrained(folder)

    ids = random.integers(3, config.vocab_size, (2, 24))
    arrays = {"input_ids": ids, **reference(model, torch.tensor(ids))}
    arrays["greedy"] = greedy(model, torch.tensor(random.integers(3, config.vocab_size, (2, PROMPT))))
    np.savez_compressed(folder / "reference.npz", **arrays)  # pyright: ignore[reportArgumentType]

    rows = random.integers(3, config.vocab_size, (STEPS, 4, 33))
    counted = (random.random((STEPS, 4, 32)) < 0.9).astype(np.float32)
    losses, norms = trajectory(model, rows, counted)
    np.savez_compressed(folder / "trajectory.npz", ids=rows.astype(np.int32), weights=counted, loss=losses, grad_norm=norms)


def generate_modules(folder: Path, modules: int) -> None:
    """The checkpoint, and the modules' logits by the formula vLLM and SGLang run: `eh_proj(cat([enorm(token), hnorm(hidden)]))`, a
    layer, the module's norm, the model's head. `hidden` is what the model, or the module before, gives its head."""
    fields = {**TINY, **DEEPSEEK, "vocab_size": 24, "n_shared_experts": 1}
    del fields["head_dim"]
    torch.manual_seed(7)
    config = AutoConfig.for_model(**fields)
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kinds).eval()
    longer: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**fields, "num_hidden_layers": TINY["num_hidden_layers"] + modules}), dtype=torch.float32, **kinds
    ).eval()
    width, tensors = config.hidden_size, dict[str, torch.Tensor]()
    ids = torch.tensor(np.random.default_rng(7).integers(3, config.vocab_size, (2, 16)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers(), *longer.named_parameters(), *longer.named_buffers()]:
            if (tensor.ndim == 1 and "inv_freq" not in name) or name.endswith("_bias"):
                tensor += 0.2 * torch.randn_like(tensor)
        hidden, arrays = model.model(input_ids=ids, use_cache=False).last_hidden_state, dict[str, Any]()
        for k in range(1, modules + 1):
            layer = longer.model.layers[TINY["num_hidden_layers"] + k - 1]
            norms = {name: type(longer.model.norm)(width, eps=config.rms_norm_eps) for name in ("enorm", "hnorm", "shared_head.norm")}
            for norm in norms.values():
                norm.weight += 0.2 * torch.randn(width)
            project = torch.nn.Linear(2 * width, width, bias=False)
            token = model.model.embed_tokens(ids[:, k:])
            x = project(torch.cat([norms["enorm"](token), norms["hnorm"](hidden[:, : ids.shape[1] - k])], dim=-1))
            positions = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=model.model.rotary_emb(x, positions))
            hidden = norms["shared_head.norm"](x)
            arrays[f"module_{k}"] = model.lm_head(hidden).numpy()
            own = {**{f"{name}.weight": norm.weight for name, norm in norms.items()}, "eh_proj.weight": project.weight,
                   "embed_tokens.weight": model.model.embed_tokens.weight, "shared_head.head.weight": model.lm_head.weight}  # fmt: skip
            prefix = f"model.layers.{TINY['num_hidden_layers'] + k - 1}."
            tensors |= {prefix + name: value.detach() for name, value in own.items()}
            tensors |= {name: value for name, value in _published(longer).items() if name.startswith(prefix)}
        arrays["logits"] = model(input_ids=ids, use_cache=False).logits.numpy()
    model.save_pretrained(folder)
    save_file({name: value.clone() for name, value in (_published(model) | tensors).items()}, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    written.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps({**written, "num_nextn_predict_layers": modules}, indent=2) + "\n")
    np.savez_compressed(folder / "reference.npz", input_ids=ids.numpy(), **arrays)


def _published(model: Any) -> dict[str, torch.Tensor]:
    """Tensors under the names of the published files, as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def reference(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {"logits": logits.detach().numpy(), "loss": np.float64(loss.item()), "grad_norm": np.float64(gradient_norm(model))}


def gradient_norm(model: PreTrainedModel) -> float:
    return float(torch.sqrt(sum((p.grad.double().square().sum() for p in model.parameters() if p.grad is not None), torch.tensor(0.0))))


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray:
    for _ in range(12):
        following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids.numpy()


def trajectory(model: PreTrainedModel, rows: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AdamW 0.9, 0.95, 1e-8, decay 0.1 of matrices and not of norms and biases, clipped at 1, rate 1e-3."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for ids, weights in zip(torch.tensor(rows), torch.tensor(counted), strict=True):
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        loss.backward()
        losses.append(loss.item())
        norms.append(gradient_norm(model))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return np.array(losses), np.array(norms)


if __name__ == "__main__":
    main()
