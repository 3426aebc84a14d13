"""Bytes of one device: what is kept between steps exactly, what a step needs beside it as an estimate.

Estimates follow the arithmetic of the step: float32 weights and sums of gradients; moments as declared; activations in the compute dtype;
what a layer keeps for the backward pass by remat policy. XLA fuses and reuses buffers, so the true peak is near, not equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.config.layouts import batch_shards, length_shards, stored_layout, weight_layouts, working_dtype
from trainer.config.model import Block, GatedMlp, Model, Segment
from trainer.config.remat import BlockTensor, tensors_of
from trainer.config.rules import Resolution, shard_elements
from trainer.config.treatment import DTYPE_BYTES, Moment, trained, treatments
from trainer.config.weights import Weight, weights

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    gradients: int
    gathered_weights: int
    """Weights as a step computes with them, where they are stored split over `data` too; else 0."""
    saved_activations: int
    layer_at_work: int
    logits: int

    @property
    def total(self) -> int:
        state = self.parameters + self.optimizer + self.gradients + self.gathered_weights
        return state + self.saved_activations + self.layer_at_work + self.logits


def device_memory(config: TrainConfig, mesh: Mapping[str, int]) -> Memory:
    """Of a training step on `mesh` (mesh axis -> degree)."""
    model, tensor = config.model, mesh.get("tensor", 1) * mesh.get("tensor_sequence", 1)
    layouts = list(weight_layouts(config, mesh))
    treated = treatments(config.optimizer, [weight for weight, _ in layouts])
    parameters = sum(_stored(config, mesh, t.weight, t.weight) for t in treated)
    replicas = 1 if config.diloco is None else mesh.get("diloco", 1)
    sequences = math.ceil(config.batch.global_batch / (config.batch.accumulation * replicas * batch_shards(mesh, config.sharding)))
    tokens = sequences * config.batch.sequence_length // length_shards(mesh, config.sharding)
    width_bytes = 2 if model.compute_dtype == "bfloat16" else FLOAT32
    length = config.batch.sequence_length
    saved = 0
    working = 0
    for segment in model.segments:
        for block in segment.pattern:
            per_token = _saved_per_token(model, block, length, tensor)
            saved += segment.repeats * tokens * per_token * width_bytes
            everything = _none(model, block, length, tensor) * tokens * width_bytes
            # Both the recomputed layer and its gradient, and the layer's weights gathered over fsdp.
            working = max(working, 2 * everything + _layer_weights(model, block) // tensor * width_bytes)
    return Memory(
        parameters=parameters if config.diloco is None else 3 * parameters,  # outer ones and their momentum too
        optimizer=sum(_stored(config, mesh, moment, t.weight) for t in treated for moment in t.moments),
        gradients=sum(_gradient(config, mesh, treatment.weight) for treatment in trained(treated)),
        gathered_weights=sum(_gathered(model, weight, layout, mesh) for weight, layout in layouts)
        if config.sharding.optimizer == "over_data"
        else 0,
        saved_activations=saved,
        layer_at_work=working,
        logits=2 * FLOAT32 * tokens * math.ceil(model.vocab_size / tensor),
    )


def _stored(config: TrainConfig, mesh: Mapping[str, int], tensor: Weight | Moment, weight: Weight) -> int:
    """Bytes of a weight, or of a tensor the optimizer keeps for it, between steps."""
    layout = stored_layout(config.sharding, tensor.axes, tensor.shape, weight.path, mesh)
    return shard_elements(tensor.shape, layout, mesh) * (DTYPE_BYTES[tensor.dtype] if isinstance(tensor, Moment) else FLOAT32)


def _gradient(config: TrainConfig, mesh: Mapping[str, int], weight: Weight) -> int:
    """As the backward pass hands it over and, of more than one microbatch, the float32 sum; laid out as the weight is stored."""
    each = DTYPE_BYTES[config.optimizer.gradient_dtype] + (FLOAT32 if config.batch.accumulation > 1 else 0)
    return _stored(config, mesh, weight, weight) // FLOAT32 * each


def _gathered(model: Model, weight: Weight, layout: Resolution, mesh: Mapping[str, int]) -> int:
    dtype = working_dtype(model, path=weight.path, inputs=weight.inputs, exact=weight.exact)
    return shard_elements(weight.shape, layout, mesh) * DTYPE_BYTES[dtype]


def _saved_per_token(model: Model, block: Block, length: int, tensor: int) -> int:
    """Elements a layer keeps of each token for the backward pass."""
    if (named := tensors_of(model.remat)) is not None:
        sizes = _named(model, block, tensor)
        return (0 if "block_input" in named.offload else model.width) + sum(sizes[name] for name in named.keep if name != "block_input")
    match model.remat:
        case "full":
            return model.width
        case "minimal":
            return model.width + _products(model, block, tensor)
        case "dots":
            return model.width + _products(model, block, tensor) + _scores(block, length, tensor)
        case _:
            return _none(model, block, length, tensor)


def _named(model: Model, block: Block, tensor: int) -> dict[BlockTensor, int]:
    """Elements of each token in the tensors that a policy can name; of a mixture, the MLP's result alone."""
    attention, mlp = block.attention, block.mlp
    hidden = mlp.active_hidden // tensor if isinstance(mlp, GatedMlp) else 0
    return {
        "block_input": model.width,
        "query": attention.heads * attention.head_dim // tensor,
        "key": attention.kv_heads * attention.head_dim // tensor,
        "value": attention.kv_heads * attention.value_dim // tensor,
        "attention": attention.heads * attention.value_dim // tensor,
        "attention_out": model.width,
        "mlp_gate": hidden,
        "mlp_up": hidden,
        "mlp_down": model.width,
    }


def _products(model: Model, block: Block, tensor: int) -> int:
    """Results of the products with weights: query, key, value, attention output, gate, up, down."""
    attention = block.attention
    heads = attention.head_dim * (attention.heads + attention.kv_heads) + attention.value_dim * attention.kv_heads
    return (heads + 2 * block.mlp.active_hidden) // tensor + 2 * model.width


def _scores(block: Block, length: int, tensor: int) -> int:
    """Attention scores and weighted values: one score for every earlier position and head."""
    attention = block.attention
    return (attention.heads * (length + attention.value_dim)) // tensor


def _none(model: Model, block: Block, length: int, tensor: int) -> int:
    """Everything: products, scores and probabilities, two norms, two residual sums, activation and product of the MLP."""
    return _products(model, block, tensor) + 2 * _scores(block, length, tensor) + 4 * model.width + 2 * block.mlp.active_hidden // tensor


def _layer_weights(model: Model, block: Block) -> int:
    """Elements of the layer's matrices; of a mixture, those of all experts."""
    one = Segment(pattern=(block,), repeats=1)
    declared = weights(model.model_copy(update={"segments": (one,)}))
    return sum(math.prod(weight.layer_shape) for weight in declared if weight.inputs and weight.path.startswith("segments/"))
