"""Small models and parameters the model's tests share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainer.checkpoint.exchange import ReadLayer, holdings
from trainer.checkpoint.huggingface import load_huggingface
from trainer.config.model import Model
from trainer.config.optimizer import Loss
from trainer.config.weights import weights
from trainer.loss import loss_sums
from trainer.model import Transformer, create_abstract_model

ORACLE = Path(__file__).parents[2] / "oracle"
BLOCK = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 24}}
BIASED: dict[str, Any] = {
    "attention": {**BLOCK["attention"], "qkv_bias": True, "output_bias": True, "qk_norm": {}, "window": 4},
    "mlp": {"hidden": 20, "activation": "gelu_tanh", "bias": True},
}
Params = Mapping[str, jax.Array]


def small(*, pattern: tuple[dict[str, Any], ...] = (BLOCK,), repeats: int = 2, **fields: Any) -> Model:
    """A model of a few thousand parameters, float32 at highest precision."""
    segments = [{"pattern": pattern, "repeats": repeats}]
    common = {"vocab_size": 31, "width": 16, "compute_dtype": "float32", "matmul_precision": "highest", "segments": segments}
    return Model.model_validate({**common, **fields})


def with_params(model: Model, params: Params) -> Transformer:
    """The model holding `params`."""
    graphdef, state = nnx.split(create_abstract_model(model))
    flat = [(path, variable.replace(params["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def random_params(model: Model, seed: int = 0) -> dict[str, jax.Array]:
    """Every parameter away from its special value: kernels of a size that keeps activations near 1, norms near 1, biases near 0."""
    random = np.random.default_rng(seed)
    params: dict[str, jax.Array] = {}
    for weight in weights(model):
        fan_in = np.prod(weight.layer_shape[: weight.inputs]) if weight.path != "embed/table" else 1
        values = random.normal(size=weight.shape) * (0.2 if weight.inputs == 0 else fan_in**-0.5)
        params[weight.path] = jnp.asarray(values + (weight.path.endswith("scale")), jnp.float32)
    return params


def mean_loss(model: Model, params: Params, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over the weighted positions, and the logits."""
    logits = with_params(model, params)(batch["inputs"], batch["positions"], batch["segments"])
    sums = loss_sums(logits, batch["targets"], batch["weights"], Loss())
    return sums.cross_entropy / jnp.maximum(sums.tokens, 1), logits


def one_document(tokens: np.ndarray, *, rows: int, length: int, targets: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`tokens` [b, t] as the beginning of a padded [rows, length] batch; without `targets` each token predicts the next."""
    b, t = tokens.shape
    batch = {name: np.zeros((rows, length), np.int32) for name in ("inputs", "targets", "positions", "segments")}
    batch["inputs"][:b, :t] = tokens
    batch["positions"][:b, :t] = np.arange(t)
    batch["segments"][:b, :t] = 1
    batch["weights"] = np.zeros((rows, length), np.float32)
    counted = t if targets is not None else t - 1
    batch["targets"][:b, :counted] = targets if targets is not None else tokens[:, 1:]
    batch["weights"][:b, :counted] = 1
    return batch


def abstract_params(model: Model, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    place = sharding or (lambda weight: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return {weight.path: jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=place(weight)) for weight in weights(model)}


def reader(params: Params) -> ReadLayer:
    """Reads them layer by layer, in whatever form they are."""
    held = holdings({path: value.shape for path, value in params.items()})

    def read(stacked: str, repeat: int | None) -> np.ndarray:
        path, index = next(
            (path, index) for path, part in held.items() if part.stacked == stacked and (index := part.index(repeat)) is not None
        )
        return np.asarray(params[path])[index]

    return read


def load(folder: Path, model: Model) -> dict[str, jax.Array]:
    return load_huggingface(str(folder), abstract_params(model), model)
