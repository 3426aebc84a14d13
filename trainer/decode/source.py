"""Where the weights come from: a training run's directory, a Hugging Face folder, a parameter-only checkpoint; local or gs://."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath

from trainer.checkpoint import Checkpoints
from trainer.checkpoint.huggingface import load_huggingface, modules_of, open_huggingface
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.checkpoint.huggingface_families import text_config
from trainer.checkpoint.parameters import PARAMETERS_FILE, is_parameters, load_parameters, stored_model
from trainer.config import TrainConfig, validate
from trainer.config.data import Bytes, HuggingFaceTokenizer, SentencePiece
from trainer.config.data import Tokenizer as TokenizerConfig
from trainer.config.mlp import Dropless, Moe
from trainer.config.model import Model, MultiToken
from trainer.config.run import Checkpoint
from trainer.config.weights import Weight, weights
from trainer.errors import CheckpointError
from trainer.parallel.sharding import Layout
from trainer.parameters import ITEMS, Kind, nothing_there, require_average

Parameters = dict[str, jax.Array]


@dataclass(frozen=True)
class Source:
    """A model whose weights are not read yet."""

    description: str
    model: Model
    tokenizer: TokenizerConfig | None
    """None: the folder has none."""
    end_tokens: tuple[int, ...]
    """Ids that end an answer, besides the tokenizer's own end token."""
    read: Callable[[dict[str, jax.ShapeDtypeStruct], Model], Parameters]
    """Parameters in the dtype and sharding of their abstract leaves."""
    longest: int | None = None
    """Tokens of a sequence it was trained on, where that is known."""


def open_source(path: str, *, step: int | None = None, weights: Kind = "trained", drafts: bool = False) -> Source:
    """A folder with a config.json is a Hugging Face folder, one with a parameters.json a parameter-only checkpoint, any other a
    run directory; `step` is one of its committed steps, `weights` its parameters or the average it keeps of them.
    drafts: of a Hugging Face folder also the modules of multi-token prediction that it has.

    Raises CheckpointError where it is none of them, or the step is missing or damaged.
    """
    folder = is_parameters(path) or (epath.Path(path) / "config.json").exists()
    if folder and weights != "trained":
        raise CheckpointError(f"{path} is no run directory and has one set of weights", hint="leave out --weights")
    if is_parameters(path):
        if step is not None:
            raise CheckpointError(f"{path} is a parameter-only checkpoint and has no steps", hint="leave out --step")
        return _parameters(path)
    if (epath.Path(path) / "config.json").exists():
        if step is not None:
            raise CheckpointError(f"{path} is a Hugging Face folder and has no steps", hint="leave out --step")
        return _huggingface(path, drafts=drafts)
    return _run(path, step, ITEMS[weights])


def for_decoding(model: Model, *, dtype: str | None = None) -> Model:
    """`model` with `dtype` (default: its own) for matmuls, layers one by one, and mixtures that drop no token."""

    def block(spec: Any) -> Any:
        return spec.model_copy(update={"mlp": spec.mlp.model_copy(update={"dispatch": Dropless()})}) if isinstance(spec.mlp, Moe) else spec

    segments = [segment.model_copy(update={"pattern": tuple(map(block, segment.pattern))}) for segment in model.segments]
    return model.model_copy(update={"segments": tuple(segments), "compute_dtype": dtype or model.compute_dtype, "layers": "unroll"})


def load(source: Source, model: Model, layout: Layout) -> Parameters:
    """The parameters of `model`, laid out over the mesh; matmul kernels in compute dtype, so that no step casts them again."""
    return source.read({weight.path: _abstract(weight, model, layout) for weight in weights(model)}, model)


def _abstract(weight: Weight, model: Model, layout: Layout) -> jax.ShapeDtypeStruct:
    dtype = model.compute_dtype if weight.inputs and not weight.exact else "float32"
    return jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype), sharding=layout.sharding(weight.axes, weight.shape))


def _run(directory: str, step: int | None, item: str) -> Source:
    checkpoints = Checkpoints(Checkpoint(), directory)
    if step is None and (step := checkpoints.latest_step((item,))) is None:
        raise nothing_there(directory, checkpoints.skipped)
    config = validate(TrainConfig, checkpoints.meta(step)["config"])
    described = f"step {step} of {directory}"
    if item != ITEMS["trained"]:
        require_average(described, checkpoints.items(step))
        described += ", averaged"

    def read(abstract: dict[str, jax.ShapeDtypeStruct], model: Model) -> Parameters:
        stored = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) for path, leaf in abstract.items()}
        values = checkpoints.restore(step, {item: stored})[item]
        for path, leaf in abstract.items():  # one by one, so that few exist in both dtypes
            values[path] = values[path].astype(leaf.dtype)
        return values

    return Source(described, config.model, config.data.tokenizer, (), read, config.batch.sequence_length)


def _huggingface(folder: str, *, drafts: bool) -> Source:
    config = text_config(_json(folder, "config.json"))
    ends = {**config, **_json(folder, "generation_config.json")}.get("eos_token_id")
    dtype = config.get("dtype") or config.get("torch_dtype")
    model = model_from_huggingface(config).model_copy(update={"compute_dtype": "bfloat16" if dtype == "bfloat16" else "float32"})
    if drafts:
        with open_huggingface(folder) as files:
            depth = modules_of(files)
        model = model.model_copy(update={"multi_token": MultiToken(depth=depth) if depth else None})
    longest = config.get("max_position_embeddings")
    return Source(
        folder,
        model,
        _tokenizer(folder),
        _end_tokens(ends, model),
        lambda abstract, model: load_huggingface(folder, abstract, model),
        longest if isinstance(longest, int) else None,
    )


def _parameters(folder: str) -> Source:
    model = stored_model(_json(folder, PARAMETERS_FILE), folder)
    ends = _end_tokens(_json(folder, "generation_config.json").get("eos_token_id"), model)
    return Source(folder, model, _tokenizer(folder), ends, lambda abstract, model: load_parameters(folder, abstract, model))


def _end_tokens(ends: Any, model: Model) -> tuple[int, ...]:
    """Those the model can choose: a config.json may name ids that its model does not have."""
    return tuple(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int) and 0 <= end < model.vocab_size)


def _tokenizer(folder: str) -> TokenizerConfig | None:
    if (epath.Path(folder) / "tokenizer.json").exists():
        return HuggingFaceTokenizer(path=f"{folder.rstrip('/')}/tokenizer.json")
    if (epath.Path(folder) / "tokenizer.model").exists():
        return SentencePiece(path=f"{folder.rstrip('/')}/tokenizer.model")
    return None


def chosen_tokenizer(name: str) -> TokenizerConfig:
    """`bytes`, a `tokenizer.json`, or a SentencePiece `.model`."""
    if name == "bytes":
        return Bytes()
    return SentencePiece(path=name) if name.endswith(".model") else HuggingFaceTokenizer(path=name)


def _json(folder: str, name: str) -> dict[str, Any]:
    """Raises CheckpointError for a file that is no JSON object; empty where there is none."""
    try:
        found = json.loads((epath.Path(folder) / name).read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{folder}/{name} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}/{name}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}/{name}: not a JSON object")
    return cast("dict[str, Any]", found)
