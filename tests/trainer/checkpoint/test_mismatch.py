"""A run continues a checkpoint only when nothing that shapes its results has changed."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tests.trainer.configs import config
from trainer.checkpoint.mismatch import FREE, compare_meta
from trainer.config import TrainConfig
from trainer.contract import Exit
from trainer.errors import ResumeMismatch


def meta(*overrides: str, step: int = 10, data: str = "d1", tokenizer: str = "t1") -> dict[str, Any]:
    fingerprints = {"data": data, "tokenizer": tokenizer}
    return {"config": config(*overrides).model_dump(mode="json"), "fingerprints": fingerprints, "step": step}


def refusal(saved: dict[str, Any], now: dict[str, Any], *allowed: str) -> ResumeMismatch:
    with pytest.raises(ResumeMismatch) as raised:
        compare_meta(saved, now, allowed)
    assert raised.value.exit_code == Exit.CONFIG
    return raised.value


def test_the_same_run_continues() -> None:
    compare_meta(meta(), meta(), ())


@pytest.mark.parametrize(
    "override",
    [
        "run_directory=/elsewhere", "mesh.ici.tensor=2", "batch.accumulation=2", "model.layers=unroll", "model.remat=none",
        "eval={every_steps: 3}", "checkpoint.every_steps=7", "metrics.log_every_steps=9", "profiler={first_step: 1, last_step: 2}",
        "compile_cache=/cache", "distributed.heartbeat_timeout_seconds=5", "data.prefetch_batches=9", "data.cache_directory=/d",
        "data.tokenizer={type: sentencepiece, path: x}",
    ],
)  # fmt: skip
def test_what_cannot_change_the_results_is_free(override: str) -> None:
    compare_meta(meta(), meta(override), ())
    compare_meta(meta(override), meta(), ())


def test_the_same_text_may_lie_elsewhere_but_the_mixture_stays() -> None:
    def text(paths: str, weight: float) -> str:
        return f"data.sources=[{{type: text, paths: {paths}, weight: {weight}}}]"

    compare_meta(meta(text("[a, b]", 1)), meta(text("[gs://b/c]", 1)), ())
    assert "data.sources.0.weight: saved 1.0, now 2.0" in str(refusal(meta(text("[a]", 1)), meta(text("[a]", 2))))
    assert "data.held_out: saved 0.01, now 0.5" in str(refusal(meta(), meta("data.held_out=0.5")))
    compare_meta(meta(text("[a]", 1)), meta(text("[a]", 2)), ["data.sources.*.weight"])


def test_another_version_of_the_packing_is_another_run() -> None:
    def packed(version: int) -> dict[str, Any]:
        return {**meta(), "data": {"step": 10, "identity": {"packing": {"version": version, "order": 1, "sequence_length": version}}}}

    error = refusal(packed(1), packed(2))
    assert str(error).splitlines()[1:] == ["  packing.version: saved 1, now 2"]
    compare_meta(packed(1), packed(2), ["packing"])


def test_every_free_path_exists_and_has_a_reason() -> None:
    for path, reason in FREE.items():
        node: Any = TrainConfig
        for part in path.split("."):
            fields = [option.model_fields[part].annotation for option in options(node) if part in option.model_fields]
            assert part == "*" or fields, path
            node = node if part == "*" else fields[0]
        assert reason


def options(annotation: Any) -> list[Any]:
    """The config classes an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [option for argument in get_args(annotation) for option in options(argument)]


def test_every_difference_is_named_with_the_words_that_accept_it() -> None:
    now = meta("optimizer.weight_decay=0.2", "seed=5", "batch.global_batch=16", "mesh.ici.tensor=2", data="d2", tokenizer="t2")
    error = refusal(meta(), now)
    message = str(error)
    assert "the checkpoint of step 10 belongs to another run, 5 differences" in message
    for line in (
        "optimizer.weight_decay: saved 0.1, now 0.2", "seed: saved 0, now 5", "batch.global_batch: saved 8, now 16",
        "data: saved 'd1', now 'd2'", "tokenizer: saved 't1', now 't2'",
    ):  # fmt: skip
        assert f"\n  {line}" in message
    accepted = "batch.global_batch, data, optimizer.weight_decay, seed, tokenizer"
    assert f"--set 'checkpoint.allow_mismatch=[{accepted}]'" in error.hint
    compare_meta(meta(), now, accepted.split(", "))
    compare_meta(meta(), now, ["batch", "data", "optimizer", "seed", "tokenizer"])


def test_what_is_accepted_already_stays_in_the_hint() -> None:
    error = refusal(meta(), meta("seed=5", "optimizer.b1=0.8"), "seed")
    assert "1 difference:" in str(error) and "seed" not in str(error)
    assert "allow_mismatch=[optimizer.b1, seed]" in error.hint


def test_another_kind_of_node_is_shown_key_by_key() -> None:
    message = str(refusal(meta(), meta("schedule={type: constant, learning_rate: 0.1}")))
    assert "schedule.type: saved 'cosine', now 'constant'" in message
    assert "schedule.final_fraction: saved 0.1, now '(absent)'" in message


@pytest.mark.parametrize(
    ("schedule", "step", "free"),
    [
        ("{type: constant, learning_rate: 0.1}", 10, True),
        ("{type: cosine, learning_rate: 0.1}", 10, False),
        ("{type: cosine, learning_rate: 0.1, decay_until_step: 20}", 10, True),
        ("{type: wsd, learning_rate: 0.1, decay_steps: 5}", 15, True),
        ("{type: wsd, learning_rate: 0.1, decay_steps: 5}", 16, False),
    ],
)
def test_the_end_of_the_run_moves_where_no_step_taken_depends_on_it(schedule: str, step: int, free: bool) -> None:
    saved, now = meta(f"schedule={schedule}", step=step), meta(f"schedule={schedule}", "steps=40")
    if free:
        compare_meta(saved, now, ())
    else:
        assert "steps: saved 20, now 40" in str(refusal(saved, now))


def test_keys_newer_than_the_checkpoint_have_their_defaults() -> None:
    saved = meta()
    del saved["config"]["loss"], saved["config"]["optimizer"]["decay"]
    compare_meta(saved, meta(), ())
    assert "loss.z_loss_weight: saved 0.0, now 0.1" in str(refusal(saved, meta("loss.z_loss_weight=0.1")))


def test_keys_that_are_no_longer_known_are_shown() -> None:
    saved = meta()
    saved["config"]["optimizer"]["nesterov"] = True
    assert "optimizer.nesterov: saved True, now '(absent)'" in str(refusal(saved, meta()))
    saved["config"]["schedule"] = {}
    assert "steps: saved 20, now 30" in str(refusal(saved, meta("steps=30")))
