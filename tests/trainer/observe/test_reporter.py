"""The reporter: one step late, timed by the ends of steps, never waiting for a sink."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tests.trainer.observe.conftest import metrics, reporter
from trainer.config.flops import train_flops
from trainer.loss import LossSums
from trainer.observe import reporter as reporter_module
from trainer.observe.background import Background, Record
from trainer.observe.console import clock as clock_text
from trainer.observe.console import line


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]


def run(config, clock, count: int, first: int = 0, seconds: float = 0.5) -> None:
    report = reporter(config, clock)
    for n in range(first, first + count):
        clock.now += seconds
        report.step(n, metrics(loss=10.0 - n))
    clock.now += seconds
    report.flush()
    report.close()


def test_metrics_come_back_one_step_late_with_the_step_they_belong_to(run_config, clock) -> None:
    report = reporter(run_config(), clock, primary=False)
    assert report.step(7, metrics(1.5)) is None
    assert report.step(8, metrics(2.5)) == {"step": 7, "loss": 1.5, "gradient_norm": 1.0, "tokens": 100.0}
    assert report.flush() == {"step": 8, "loss": 2.5, "gradient_norm": 1.0, "tokens": 100.0}
    assert report.flush() is None
    report.close()


def test_throughput_and_time_left_count_the_sequences_of_each_step_and_a_new_size_is_not_timed(run_config, clock, tmp_path: Path) -> None:
    ramp = {"start": 4, "increment": 4, "steps_per_size": 3}
    config = run_config(steps=8, batch={"global_batch": 8, "sequence_length": 16, "ramp_up": ramp})
    run(config, clock, 8)
    steps = lines(tmp_path)[1:]
    assert [step["global_batch"] for step in steps] == [4, 4, 4, 8, 8, 8, 8, 8]
    timed = {step["step"]: step["tokens_per_second"] for step in steps if "step_seconds" in step}
    assert timed == {n: pytest.approx((4 if n < 3 else 8) * 16 / 0.5) for n in (1, 3, 4, 5, 6, 7)}  # as the next size was compiled: not 2
    assert steps[1]["eta_seconds"] == pytest.approx(0.5 * (4 + 5 * 8) / 4)
    assert steps[4]["eta_seconds"] == pytest.approx(0.5 * 3)


def test_the_first_step_has_no_throughput_and_later_ones_the_time_between_the_ends_of_steps(run_config, clock, tmp_path: Path) -> None:
    config = run_config(steps=3)
    run(config, clock, 3)
    header, first, second, third = lines(tmp_path)
    assert header["kind"] == "header" and [line["attempt"] for line in lines(tmp_path)] == [0] * 4
    assert first["first_step_seconds"] == pytest.approx(1.0) and "step_seconds" not in first
    assert first["first_step_cpu_seconds"] > 0
    assert (second["step"], second["done"], second["step_seconds"]) == (1, 2, pytest.approx(0.5))
    assert second["tokens_per_second"] == pytest.approx(8 * 16 / 0.5)  # every position of the batch
    assert second["valid_tokens_per_second"] == pytest.approx(100 / 0.5)
    assert second["tflops_per_device"] == pytest.approx(train_flops(config.model, 8, 16) / 0.5 / 8 / 1e12)
    assert second["eta_seconds"] == pytest.approx(0.5) and third["eta_seconds"] == 0
    assert "mfu" not in second  # nobody knows a peak of this CPU


def test_mfu_is_told_where_the_launcher_names_a_peak(run_config, clock, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NNX_PEAK_BF16_TFLOPS_PER_DEVICE", "0.001")
    run(run_config(), clock, 2)
    last = lines(tmp_path)[-1]
    assert last["mfu"] == pytest.approx(last["tflops_per_device"] / 0.001)
    assert "MFU" in line(last, 20)


def test_with_log_every_steps_a_line_is_the_mean_of_its_window_and_the_last_step_is_logged(run_config, clock, tmp_path: Path) -> None:
    config = run_config("metrics.log_every_steps=3", steps=8)
    run(config, clock, 8)
    steps = [line for line in lines(tmp_path) if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [0, 3, 6, 7]
    assert all(line["step_seconds"] == pytest.approx(0.5) for line in steps[1:])


def test_a_loss_that_is_not_finite_is_logged_whatever_the_interval_and_is_valid_json(run_config, clock, tmp_path: Path) -> None:
    report = reporter(run_config("metrics.log_every_steps=100"), clock)
    report.step(0, metrics(1.0))
    report.step(1, metrics(math.nan))
    assert math.isnan((report.flush() or {})["loss"])
    report.close()
    assert [line.get("loss") for line in lines(tmp_path)] == [None, 1.0, "NaN"]


def test_steps_around_an_evaluation_have_no_time_of_their_own(run_config, clock, tmp_path: Path) -> None:
    report = reporter(run_config(eval={"every_steps": 3}), clock)
    for n in range(7):
        clock.now += 0.5
        report.step(n, metrics(1.0))
        if n == 3:  # the loop tells of the evaluation after step 2 once step 3 is dispatched
            report.eval(3, LossSums(cross_entropy=jnp.float32(200.0), z_loss=jnp.float32(0), tokens=jnp.float32(100)))
        if n == 2:
            clock.now += 60  # the evaluation
    report.flush()
    report.close()
    found = lines(tmp_path)
    (evaluation,) = (line for line in found if line["kind"] == "eval")
    assert evaluation["loss"] == 2.0 and evaluation["perplexity"] == pytest.approx(math.e**2) and evaluation["done"] == 3
    assert [round(line["step_seconds"], 3) for line in found if "step_seconds" in line] == [0.5] * 2


def test_a_second_attempt_appends_under_its_own_number_after_a_line_a_kill_cut_short(run_config, clock, tmp_path: Path) -> None:
    run(run_config(), clock, 2)
    with open(tmp_path / "metrics" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "attempt": 0, "st')
    run(run_config(), clock, 2, first=1)
    texts = (tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()
    assert texts[3].endswith('"st')
    found = [json.loads(text) for text in texts if not text.endswith('"st')]
    assert [(line["attempt"], line.get("step")) for line in found] == [(0, None), (0, 0), (0, 1), (1, None), (1, 1), (1, 2)]


def test_only_the_primary_process_writes(run_config, clock, tmp_path: Path) -> None:
    report = reporter(run_config(writers=("console", "jsonl", "tensorboard")), clock, primary=False)
    report.step(0, metrics(1.0))
    report.close()
    assert not list(tmp_path.iterdir())


def test_the_header_names_versions_flags_mesh_parameters_and_config(run_config, clock, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some_flag=true")
    monkeypatch.setenv("NNX_IMAGE_REVISION", "abc123")
    config = run_config()
    run(config, clock, 1)
    header = lines(tmp_path)[0]
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "nnxlaunch"} <= set(header["versions"])
    assert header["flags"]["LIBTPU_INIT_ARGS"] == "--some_flag=true"
    assert header["mesh"] == {"fsdp": 8}
    assert header["parameters"] == 64 * 32 * 2 + 32 + 2 * (32 * 8 * 12 + 3 * 32 * 48 + 2 * 32)
    assert header["image_revision"] == "abc123" and len(header["config_hash"]) == 64
    assert header["config"] == json.loads(config.model_dump_json())
    text = line(header, config.steps)
    assert "19,616 parameters" in text and "fsdp=8" in text and "LIBTPU_INIT_ARGS=--some_flag=true" in text


def test_the_console_is_one_plain_line_a_step(run_config, clock, capfd) -> None:
    config = run_config(writers=("console",), steps=1500)
    run(config, clock, 2)
    out = capfd.readouterr().out.splitlines()
    assert out[-1] == "[   2/1500]  loss 9.0000  256 tokens/s  500 ms/step  ETA 0:12:29"
    assert all(text.isprintable() for text in out)
    assert clock_text(3723.2) == "1:02:04"


class Slow:
    """A sink that takes its time."""

    def __init__(self, gate: threading.Event, seen: list[Record]) -> None:
        self._gate, self._seen = gate, seen

    def write(self, record: Record) -> None:
        self._gate.wait()
        self._seen.append(record)

    def flush(self) -> None:
        self._gate.wait()

    def close(self) -> None:
        self._gate.wait()


def test_a_stuck_sink_never_blocks_and_what_does_not_fit_is_counted(monkeypatch, run_config, clock) -> None:
    gate, seen = threading.Event(), []
    monkeypatch.setattr(reporter_module, "_writers", lambda *_: [Background("slow", lambda: Slow(gate, seen), capacity=10)])
    report = reporter(run_config(), clock)
    begin = time.thread_time()
    for n in range(100):
        report.step(n, metrics(1.0))
    assert report.dropped in (89, 90)  # 10 queued, and one the writer may have taken
    assert (time.thread_time() - begin) / 100 < 0.01
    gate.set()
    report.close(timeout_seconds=30)
    assert sum(record["count"] for record in seen if record.get("event") == "records_dropped") == 89 + (len(seen) < 12)


def test_close_gives_up_on_a_stuck_sink_at_its_deadline() -> None:
    gate = threading.Event()
    writer = Background("slow", lambda: Slow(gate, []))
    writer.put({"kind": "event", "event": "x"})
    begin = time.monotonic()
    assert not writer.close(begin + 0.05)
    assert time.monotonic() - begin < 5
    gate.set()
    assert writer.close(time.monotonic() + 30)


class Failing:
    def write(self, record: Record) -> None:
        raise OSError("no space left on device")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_failing_sink_is_a_warning_said_once_and_not_an_error(capsys) -> None:
    writer = Background("jsonl", Failing)
    for _ in range(5):
        writer.put({"kind": "event", "event": "x"})
    assert writer.close(time.monotonic() + 30)
    assert writer.failed == 5
    assert capsys.readouterr().err == "warning: jsonl metrics: OSError: no space left on device\n"


def test_records_wait_for_a_sink_that_cannot_be_opened_yet() -> None:
    gate, seen, tries = threading.Event(), [], []
    gate.set()

    def make() -> Slow:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("not yet")
        return Slow(gate, seen)

    writer = Background("jsonl", make, retry_seconds=0.01)
    writer.put({"kind": "event", "event": "x"})
    while len(tries) < 3:
        threading.Event().wait(0.01)
    assert writer.close(time.monotonic() + 30)
    assert [record["event"] for record in seen] == ["x"] and writer.failed == 2
