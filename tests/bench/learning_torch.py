"""The PyTorch side of `learning`: the same model written plainly. Needs torch and numpy only.

B sequences, T tokens, D model width, N query heads, K key/value heads, H head dim.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale


def rotate(x_BTNH: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions_BT[..., None] * frequencies).float()[:, :, None]
    first, second = x_BTNH.split(half, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class Twin(torch.nn.Module):
    def __init__(self, model: dict, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.model = model
        self.names = list(arrays)
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(arrays[name].copy())) for name in self.names])

    def weight(self, name: str) -> Tensor:
        return self.weights[self.names.index(name)]

    def forward(self, inputs: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        (segment,) = self.model["segments"]
        (block,) = segment["pattern"]
        attention, epsilon = block["attention"], block["norm"]["epsilon"]
        group = attention["heads"] // attention["kv_heads"]
        theta = attention["rope"]["theta"]
        mask = (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])
        x_BTD = self.weight("embed/table")[inputs]
        for layer in range(segment["repeats"]):
            w = {name: self.weight(f"segments/0/0/{name}")[layer] for name in LAYER}
            h = rms_norm(x_BTD, w["attention_norm/scale"], epsilon)
            query = rotate(torch.einsum("btd,dnh->btnh", h, w["attention/query"]), positions, theta)
            key = rotate(torch.einsum("btd,dkh->btkh", h, w["attention/key"]), positions, theta)
            value = torch.einsum("btd,dkh->btkh", h, w["attention/value"])
            key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
            mixed = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask[:, None])
            x_BTD = x_BTD + torch.einsum("bnth,nhd->btd", mixed, w["attention/out"])
            h = rms_norm(x_BTD, w["mlp_norm/scale"], epsilon)
            x_BTD = x_BTD + (functional.silu(h @ w["mlp/gate"]) * (h @ w["mlp/up"])) @ w["mlp/down"]
        return rms_norm(x_BTD, self.weight("final_norm/scale"), self.model["final_norm"]["epsilon"]) @ self.weight("head/kernel")


LAYER = (
    "attention_norm/scale", "attention/query", "attention/key", "attention/value", "attention/out",
    "mlp_norm/scale", "mlp/gate", "mlp/up", "mlp/down",
)  # fmt: skip


def cross_entropy_sum(twin: Twin, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens and their number."""
    logits = twin(batch["inputs"], batch["positions"], batch["segments"])
    losses = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    valid = batch["weights"].flatten() > 0
    return losses[valid].sum(), valid.sum()


def batches(path: Path) -> list[dict[str, Tensor]]:
    arrays = {name: array for name, array in np.load(path).items() if array.ndim}
    return [
        {
            name: torch.from_numpy(array[n]).float() if name == "weights" else torch.from_numpy(array[n]).long()
            for name, array in arrays.items()
        }
        for n in range(len(arrays["inputs"]))
    ]


def learning_rate(schedule: dict, step: int, steps: int) -> float:
    warm = min((step + 1) / schedule["warmup_steps"], 1.0)
    done = min(max((step - schedule["warmup_steps"]) / (steps - schedule["warmup_steps"]), 0.0), 1.0)
    final = schedule["final_fraction"]
    return schedule["learning_rate"] * warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def main(folder: Path, result: Path) -> None:
    torch.set_num_threads(2)
    config = json.loads((folder / "config.json").read_text())
    optimizer_config = config["optimizer"]
    twin = Twin(config["model"], dict(np.load(folder / "params.npz")))
    vectors = [parameter for name, parameter in zip(twin.names, twin.weights, strict=True) if name.endswith("/scale")]
    matrices = [parameter for name, parameter in zip(twin.names, twin.weights, strict=True) if not name.endswith("/scale")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer_config["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=(optimizer_config["b1"], optimizer_config["b2"]),
        eps=optimizer_config["epsilon"],
    )
    losses: list[float] = []
    for step, batch in enumerate(batches(folder / "train.npz")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config["schedule"], step, config["steps"])
        total, tokens = cross_entropy_sum(twin, batch)
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), optimizer_config["clip_norm"])
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"torch step {step} loss {losses[-1]:.4f}", flush=True)
    with torch.no_grad():
        evaluation = sum(cross_entropy_sum(twin, batch)[0].item() for batch in batches(folder / "eval.npz"))
    found = {"loss": losses, "eval_cross_entropy": evaluation, "torch": torch.__version__}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
