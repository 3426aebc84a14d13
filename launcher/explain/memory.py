"""Bytes of one device: what is kept between steps exactly, what a step needs beside it as an estimate.

Estimates follow the arithmetic of the step: float32 weights, gradients and moments; activations in the compute dtype;
what a layer keeps for the backward pass by remat policy. XLA fuses and reuses buffers, so the true peak is near, not equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.config.context import brought_bytes, keys_at_once
from trainer.config.layouts import batch_shards, length_shards, stored_layout, weight_layouts, working_dtype
from trainer.config.model import Block, GatedMlp, Model, Segment
from trainer.config.pipeline import PipelinePlan, plan_pipeline
from trainer.config.remat import BlockTensor, tensors_of
from trainer.config.rules import shard_elements
from trainer.config.treatment import DTYPE_BYTES, trained, treatments
from trainer.config.weights import Weight, weights

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    gradients: int
    saved_activations: int
    layer_at_work: int
    logits: int
    average: int = 0
    """Of the parameters, where the run keeps it."""
    pipeline: int = 0
    """Microbatches that wait at a stage, with their gradients, and weights that are whole for more than one layer at work."""

    @property
    def total(self) -> int:
        kept = self.parameters + self.average + self.optimizer + self.gradients
        return kept + self.saved_activations + self.layer_at_work + self.logits + self.pipeline


def device_memory(config: TrainConfig, mesh: Mapping[str, int], *, tpu: bool = False) -> Memory:
    """Of a training step on `mesh` (mesh axis -> degree), of TPUs or of other devices."""
    model, tensor = config.model, _tensor(mesh)
    kept = parameter_bytes(config, mesh)
    replicas = 1 if config.diloco is None else mesh.get("diloco", 1)
    sequences = math.ceil(config.batch.global_batch / (config.batch.accumulation * replicas * batch_shards(mesh, config.sharding)))
    tokens = sequences * config.batch.sequence_length // length_shards(mesh, config.sharding)
    width_bytes = 2 if model.compute_dtype == "bfloat16" else FLOAT32
    length = keys_at_once(config, mesh, tpu=tpu)
    saved = 0
    working = 0
    plan = plan_pipeline(config, mesh)
    pipeline = 0
    for index, segment in enumerate(model.segments):
        outside = segment.repeats
        if plan is not None and plan.segment == index:
            outside -= plan.patterns
            stages = _stages(config, plan, segment, tokens, mesh, length)
            saved, working, pipeline = saved + stages.saved, max(working, stages.at_work), stages.held
        if not outside:
            continue
        for block in segment.pattern:
            per_token = _saved_per_token(model, block, length, tensor)
            saved += outside * tokens * per_token * width_bytes
            brought = brought_bytes(block, config, mesh, sequences=config.batch.global_batch // (config.batch.accumulation * replicas))
            everything = _none(model, block, length, tensor) * tokens * width_bytes
            # Both the recomputed layer and its gradient, and the layer's weights gathered over fsdp.
            working = max(working, 2 * (everything + brought) + _layer_weights(model, block, mesh) * width_bytes)
    return Memory(
        parameters=kept if config.diloco is None else 3 * kept,  # outer ones and their momentum too
        optimizer=optimizer_bytes(config, mesh) if config.optimizer.state_memory == "device" else 0,
        gradients=gradient_bytes(config, mesh),
        saved_activations=saved,
        layer_at_work=working,
        logits=2 * FLOAT32 * tokens * math.ceil(model.vocab_size / tensor) // config.loss.tiles,
        average=average_bytes(config, mesh) if config.ema is not None else 0,
        pipeline=pipeline,
    )


@dataclass(frozen=True)
class _Stages:
    """Bytes of one device in a pipeline."""

    saved: int
    at_work: int
    held: int


def _stages(config: TrainConfig, plan: PipelinePlan, segment: Segment, tokens: int, mesh: Mapping[str, int], length: int) -> _Stages:
    """A stage keeps its input for every iteration, and of its layers what the remat policy keeps; all of its layers are at work."""
    model, schedule, layers = config.model, plan.schedule, plan.patterns_per_stage
    tensor = _tensor(mesh)
    width_bytes = 2 if config.model.compute_dtype == "bfloat16" else FLOAT32
    of_microbatch = tokens // schedule.lanes  # tokens of a device outside of the pipeline, where stages split the batch
    inputs = 0 if model.remat == "none" else model.width
    kept = sum(max(0, _saved_per_token(model, block, length, tensor) - inputs) for block in segment.pattern)
    everything = sum(_none(model, block, length, tensor) for block in segment.pattern)
    weights = sum(_layer_weights(model, block, mesh) for block in segment.pattern) * layers
    more_whole = {"iteration": 0, "once": schedule.repeats, "repeat": 2}[plan.gather]
    waiting = 2 * (schedule.lanes + schedule.hop) * of_microbatch * model.width
    return _Stages(
        saved=schedule.iterations * of_microbatch * (model.width + layers * kept) * width_bytes,
        at_work=(2 * layers * everything * of_microbatch + weights) * width_bytes,
        held=(waiting + more_whole * weights) * width_bytes,
    )


def average_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """A float32 tensor for each weight, laid out as it is stored."""
    return sum(FLOAT32 * _stored_elements(config, weight, mesh) for weight, _ in weight_layouts(config, mesh))


def optimizer_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """What the optimizer keeps for the weights: every tensor it declares, laid out as it is stored."""
    found = 0
    for treatment in treatments(config.optimizer, (weight for weight, _ in weight_layouts(config, mesh))):
        for moment in treatment.moments:
            layout = stored_layout(config.sharding, moment.axes, moment.shape, treatment.weight.path, mesh)
            found += DTYPE_BYTES[moment.dtype] * shard_elements(moment.shape, layout, mesh)
    return found


def gradient_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Of the weights that are trained: as the backward pass hands them over, and their float32 sum over microbatches."""
    treated = trained(treatments(config.optimizer, (weight for weight, _ in weight_layouts(config, mesh))))
    elements = sum(_stored_elements(config, one.weight, mesh) for one in treated)
    return elements * (DTYPE_BYTES[config.optimizer.gradient_dtype] + (FLOAT32 if config.batch.accumulation > 1 else 0))


def parameter_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Weights as they are stored and, where that is split over `data` too, once more as a step computes with them."""
    found = 0
    for weight, layout in weight_layouts(config, mesh):
        found += FLOAT32 * _stored_elements(config, weight, mesh)
        if config.sharding.optimizer == "over_data":
            dtype = working_dtype(config.model, path=weight.path, inputs=weight.inputs, exact=weight.exact)
            found += DTYPE_BYTES[dtype] * shard_elements(weight.shape, layout, mesh)
    return found


def _stored_elements(config: TrainConfig, weight: Weight, mesh: Mapping[str, int]) -> int:
    return shard_elements(weight.shape, stored_layout(config.sharding, weight.axes, weight.shape, weight.path, mesh), mesh)


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
    """Attention scores and weighted values: one score for every head and position of those whose scores are held at once."""
    attention = block.attention
    return (attention.heads * (length + attention.value_dim)) // tensor


def _none(model: Model, block: Block, length: int, tensor: int) -> int:
    """Everything: products, scores and probabilities, two norms, two residual sums, activation and product of the MLP."""
    return _products(model, block, tensor) + 2 * _scores(block, length, tensor) + 4 * model.width + 2 * block.mlp.active_hidden // tensor


def _layer_weights(model: Model, block: Block, mesh: Mapping[str, int]) -> int:
    """Elements of the layer's matrices that a device computes with; of a mixture, those of its experts."""
    one = Segment(pattern=(block,), repeats=1)
    declared = weights(model.model_copy(update={"segments": (one,)}))
    experts = mesh.get("expert", 1)
    whole = sum(
        math.prod(weight.layer_shape) // (experts if "expert" in weight.axes else 1)
        for weight in declared
        if weight.inputs and weight.path.startswith("segments/")
    )
    return whole // _tensor(mesh)


def _tensor(mesh: Mapping[str, int]) -> int:
    """Ways that heads, hidden dims and the vocabulary are split."""
    return mesh.get("tensor", 1) * mesh.get("tensor_sequence", 1)
