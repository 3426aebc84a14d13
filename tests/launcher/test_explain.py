"""The numbers `explain` derives, against arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.explain import explain
from launcher.explain.outcome import outcomes
from launcher.explain.verdict import too_large
from launcher.spec import Failure
from tests.launcher.test_goldens import example
from trainer import contract


@pytest.fixture(scope="module")
def spot() -> dict[str, Any]:
    return explain(example("v5p-128-spot"))


def test_hardware_mesh_and_batch_multiply_out(spot: dict[str, Any]) -> None:
    hardware, batch = spot["hardware"], spot["batch"]
    assert (hardware["hosts"], hardware["chips"], hardware["devices"], hardware["hbm_bytes_per_device"]) == (64, 256, 256, 95 * 2**30)
    assert spot["mesh"] == {"data": "4 = 1 in a slice x 4 over slices", "fsdp": "64 = 64 in a slice x 1 over slices"}
    assert batch["tokens_per_step"] == 512 * 4096 and batch["batch_shards"] == 256
    assert batch["sequences_per_shard_and_microbatch"] == 2


def test_tokens_of_a_run_whose_batch_grows_are_those_of_its_steps() -> None:
    batch = explain(example("v5p-128-spot", "train.batch.ramp_up={start: 256, increment: 256, steps_per_size: 10}"))["batch"]
    steps = example("v5p-128-spot").train.steps
    assert batch["tokens_of_the_run"] == (10 * 256 + (steps - 10) * 512) * 4096
    assert batch["ramp_up"] == "256 sequences, 256 more every 10 steps, all from step 10 on" and batch["sizes_compiled"] == 2


def test_an_average_is_as_large_as_the_parameters_in_memory_and_in_checkpoints() -> None:
    plain, kept = (explain(example("v5p-128-spot", *words)) for words in ((), ("train.ema={decay: 0.999}",)))
    memory = kept["memory_per_device"]
    assert memory["average"] == memory["parameters"] and "average" not in plain["memory_per_device"]
    assert memory["total_estimate"] == plain["memory_per_device"]["total_estimate"] + memory["average"]
    assert kept["model"]["checkpoint_bytes"] == plain["model"]["checkpoint_bytes"] + 4 * 8_030_261_248


def test_a_restore_by_one_replica_names_the_replicas() -> None:
    assert "restore" not in explain(example("v5p-128-spot"))
    reads = explain(example("v5p-128-spot", "train.checkpoint.restore=one_replica"))["restore"]["reads"]
    assert reads == "the hosts of the first of 4 replicas (data=4)"


def test_llama3_8b_has_its_published_size_and_is_split_over_fsdp(spot: dict[str, Any]) -> None:
    model, memory = spot["model"], spot["memory_per_device"]
    assert model["parameters"] == 8_030_261_248 and model["layers"] == 32
    norms = (2 * 32 + 1) * 4096  # replicated; all else is split 64 ways
    assert memory["parameters"] == 4 * ((8_030_261_248 - norms) // 64 + norms)
    assert memory["optimizer"] == 2 * memory["parameters"] and memory["gradients"] == memory["parameters"]
    assert memory["saved_activations_estimate"] == 32 * 2 * 4096 * 4096 * 2  # layers x sequences x tokens x width x bytes
    assert "fits" in memory["verdict"]
    six = 6 * 8_030_261_248 * 512 * 4096
    assert math.isclose(model["flops_per_step"], six, rel_tol=0.15)  # 6 N D without attention and without the embedding lookup


def test_accumulation_holds_a_second_gradient_and_smaller_microbatches() -> None:
    one, four = (
        explain(example("v5e-16", "train.batch.global_batch=256", f"train.batch.accumulation={n}"))["memory_per_device"] for n in (1, 4)
    )
    assert four["gradients"] == 2 * one["gradients"]
    assert four["saved_activations_estimate"] * 4 == one["saved_activations_estimate"]


def test_state_split_over_data_is_a_quarter_on_four_slices_beside_one_copy_of_the_weights_in_compute_dtype() -> None:
    plain, split = (
        explain(example("v5p-128-spot", f"train.sharding.optimizer={o}"))["memory_per_device"] for o in ("as_weights", "over_data")
    )
    norms, table = (2 * 32 + 1) * 4096, 128_256 * 4096
    for part in ("optimizer", "gradients"):
        assert split[part] * 4 == plain[part]
    matrices = 8_030_261_248 - norms - table
    assert split["parameters"] == plain["parameters"] // 4 + 2 * matrices // 64 + 4 * (table // 64 + norms)


def test_moments_count_in_their_own_dtype_and_frozen_weights_have_neither_moments_nor_gradients(spot: dict[str, Any]) -> None:
    lion = explain(example("v5p-128-spot", "train.optimizer={type: lion, moment_dtype: bfloat16}"))
    assert lion["memory_per_device"]["optimizer"] * 2 == spot["memory_per_device"]["parameters"]
    assert lion["model"]["checkpoint_bytes"] == 6 * 8_030_261_248
    frozen = explain(example("v5p-128-spot", "train.optimizer.groups=[{tensors: ['segments/*'], frozen: true}]"))["memory_per_device"]
    trained = 4 * (2 * 128_256 * 4096 // 64 + 4096)
    assert frozen["gradients"] == trained and frozen["optimizer"] == 2 * trained


@pytest.mark.parametrize(("weaker", "stronger"), [("full", "minimal"), ("minimal", "dots"), ("dots", "none")])
def test_a_remat_policy_that_keeps_more_needs_more(weaker: str, stronger: str) -> None:
    sections = [explain(example("v5e-16", f"train.model.remat={policy}")) for policy in (weaker, stronger)]
    less, more = (section["memory_per_device"]["saved_activations_estimate"] for section in sections)
    assert less < more


def test_a_model_that_cannot_fit_is_said_to_not_fit() -> None:
    memory = explain(example("v5e-16", "train.model={preset: llama3-70b}"))["memory_per_device"]
    assert "will not fit" in memory["verdict"] and "is the state: more devices" in memory["verdict"]


def test_the_hours_of_a_run_are_its_steps_at_half_of_the_peak() -> None:
    spec = example("v5p-128-spot")
    model = explain(spec)["model"]
    assert model["hours_of_the_run_at_half_of_peak"] == pytest.approx(
        spec.train.steps * model["seconds_per_step_at_half_of_peak"] / 3600, abs=0.01
    )


def test_what_does_not_fit_is_told_what_makes_its_largest_part_smaller() -> None:
    small = "train.model={preset: qwen3-0.6b}", "train.batch={global_batch: 512, sequence_length: 4096}"
    memory = explain(example("v5e-16", *small))["memory_per_device"]
    assert "is the logits: compute the loss in tiles (`loss.tiles: 8`)" in memory["verdict"]
    assert "will not fit" in too_large(example("v5e-16", *small))
    assert not too_large(example("v5e-16"))


def test_sharding_names_what_an_axis_cannot_divide() -> None:
    spec = example(
        "v5p-128-spot",
        "train.mesh.ici={data: 4, fsdp: 1, tensor: 16}",
        "train.batch.global_batch=512",
        "train.sharding.unsharded_limit=0.04",
    )
    key = explain(spec)["sharding"]["segments/0/0/attention/key"]
    assert key["layout"] == "layer, embed, kv_heads, head_dim" and "tensor=16 does not divide kv_heads=8" in key["dropped"][0]


@pytest.mark.parametrize("mode", ["smart", "strict", "simple"])
def test_every_exit_code_of_the_contract_has_its_outcome(mode: Any) -> None:
    found = {int(key.split()[0]): what for key, what in outcomes(Failure(mode=mode, max_restarts=3)).items() if key[0].isdigit()}
    assert set(found) == set(contract.MEANING)
    for code, what in found.items():
        if code == 0:
            assert what.startswith("done")
        elif mode != "simple" and code in contract.FATAL_EXIT_CODES:
            assert what == "the job ends"
        elif mode == "smart" and code in contract.FREE_EXIT_CODES:
            assert what.startswith("restart, free")
        else:
            assert what == "restart, counted (at most 3)"


def test_without_restarts_a_counted_failure_ends_the_job() -> None:
    assert outcomes(Failure(max_restarts=0))["137 (killed (SIGKILL; often out of memory))"] == "the job ends (no restarts allowed)"


def test_a_pipeline_is_explained_with_its_bubble_its_schedule_and_what_it_holds() -> None:
    """8 layers on 2 stages in 2 repeats, 4 microbatches: 4 x 2 + 1 iterations, one of them idle at each stage."""
    sections = explain(example("pipeline-cpu"))
    found = sections["pipeline"]
    assert (found["iterations"], found["iterations_in_which_all_stages_compute"], found["bubble_share"]) == (9, 7, "11.1% = 1 / 9")
    assert (found["layers_of_a_stage_and_repeat"], found["layers_in_the_pipeline"], found["layers_outside_of_it"]) == (2, 8, 0)
    assert found["schedule"] == ["stage 0  a0 a1 a2 a3 b0 b1 b2 b3 ..", "stage 1  .. a0 a1 a2 a3 b0 b1 b2 b3"]
    memory = sections["memory_per_device"]
    # Of a stage's input, for each of 9 iterations: 1 sequence of 32 tokens of a microbatch of 4 on a device, float32.
    assert memory["saved_activations_estimate"] == 9 * 32 * 256 * 4
    assert memory["pipeline_estimate"] == 2 * (2 + 1) * 32 * 256 * 4  # with gradients: 2 that wait, 1 on its way
    assert "pipeline" not in explain(example("cpu-two-hosts"))


def test_weights_gathered_for_more_than_one_repeat_are_counted() -> None:
    once, repeat = (
        explain(example("pipeline-cpu", f"train.pipeline.gather={gather}"))["memory_per_device"]["pipeline_estimate"]
        for gather in ("once", "repeat")
    )
    layers = 2 * (4 * 256 * 256 + 3 * 256 * 1024) * 4
    assert once == repeat == 2 * layers + 2 * (2 + 1) * 32 * 256 * 4


def test_layers_outside_of_a_pipeline_keep_what_they_keep_without_one() -> None:
    some = explain(example("pipeline-cpu", "train.pipeline.layers=4"))["memory_per_device"]["saved_activations_estimate"]
    assert some == 9 * 32 * 256 * 4 + 4 * 2 * 32 * 256 * 4
