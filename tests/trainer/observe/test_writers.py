"""Files: TensorBoard's format read by an independent reader, objects on gs://."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import google_crc32c
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.gcs_emulator import Gcs
from tests.trainer.observe.conftest import metrics, reporter
from trainer.checkpoint import bucket_log as log_module
from trainer.checkpoint.bucket_log import BucketLog
from trainer.checkpoint.storage import open_storage
from trainer.loss import LossSums
from trainer.observe.jsonl import evaluated
from trainer.observe.tensorboard import TensorBoard, tag


def events(data: bytes) -> list[Event]:
    """Events of an event file; the checksums are verified. (Google's own generated protobuf classes do the reading.)"""

    def masked(part: bytes) -> int:
        crc = google_crc32c.value(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found: list[Event] = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def test_event_files_hold_scalars_by_group_and_the_header_as_text(run_config, clock, tmp_path: Path) -> None:
    report = reporter(run_config(writers=("tensorboard",)), clock)
    for n in range(3):
        clock.now += 0.5
        report.step(n, metrics(loss=2.5 + n))
    report.event("checkpoint", step=2)
    report.flush()
    report.close()
    (path,) = (tmp_path / "metrics").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, header, *steps = events(path.read_bytes())
    assert version.file_version == "brain.Event:2"
    (text,) = header.summary.value
    assert text.metadata.plugin_data.plugin_name == "text" and '"config_hash"' in text.tensor.string_val[0].decode()
    assert [event.step for event in steps] == [0, 1, 2]
    values = {value.tag: value.simple_value for value in steps[1].summary.value}
    assert values["learning/loss"] == 3.5 and values["perf/step_seconds"] == pytest.approx(0.5)
    assert values["perf/tokens_per_second"] == pytest.approx(256)
    assert tag("eval", "loss") == "eval/loss"


def test_nan_steps_and_large_step_numbers_survive_the_event_file(tmp_path: Path) -> None:
    writer = TensorBoard(str(tmp_path))
    writer.write({"kind": "step", "step": 2**40, "loss": math.nan})
    writer.close()
    (path,) = tmp_path.iterdir()
    event = events(path.read_bytes())[1]
    assert event.step == 2**40 and math.isnan(event.summary.value[0].simple_value)


def test_each_attempt_writes_objects_of_its_own_on_gs(gcs: Gcs, run_config, clock) -> None:
    url = f"{gcs.url}/attempts"
    config = run_config(run_directory=url, writers=("jsonl", "tensorboard"))
    for attempt in range(2):
        report = reporter(config, clock)
        report.step(attempt, metrics(1.0))
        report.flush()
        report.close(timeout_seconds=30)
    storage = open_storage(f"{url}/metrics")
    names = sorted(storage.files())
    assert [name for name in names if name.endswith(".jsonl")] == ["metrics-00000-00000.jsonl", "metrics-00001-00000.jsonl"]
    header, step = (json.loads(line) for line in storage.read("metrics-00001-00000.jsonl").splitlines())
    assert header["kind"] == "header" and (step["attempt"], step["step"], step["loss"]) == (1, 1, 1.0)
    for name in (name for name in names if "tfevents" in name):
        assert len(events(storage.read(name))) == 3


def test_an_evaluation_is_found_in_the_objects_of_an_earlier_attempt(gcs: Gcs, run_config, clock) -> None:
    url = f"{gcs.url}/evaluated"
    for attempt in range(2):
        report = reporter(run_config(run_directory=url, writers=("jsonl",)), clock)
        if attempt == 0:
            report.eval(12, LossSums(cross_entropy=jnp.float32(200.0), z_loss=jnp.float32(0), tokens=jnp.float32(100)))
        report.close(timeout_seconds=30)
    assert evaluated(f"{url}/metrics", 12)
    assert not evaluated(f"{url}/metrics", 1) and not evaluated(f"{url}/elsewhere", 12)


def test_objects_on_gs_are_rotated_and_those_not_sent_yet_are_bounded(gcs: Gcs, monkeypatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 100)
    monkeypatch.setattr(log_module, "UNSENT_BYTES", 400)
    url = f"{gcs.url}/rotated"
    log = BucketLog(url, "m", ".jsonl")
    for index in range(30):
        log.append(b"%09d\n" % index)
    log.flush(now=True)
    storage = open_storage(url)
    assert sorted(storage.files()) == [f"m-{part:05d}.jsonl" for part in range(3)]
    assert b"".join(storage.read(f"m-{part:05d}.jsonl") for part in range(3)) == b"".join(b"%09d\n" % index for index in range(30))
    for index in range(1000):  # nothing is sent meanwhile
        log.append(b"%09d\n" % index)
    log.flush(now=True)
    assert storage.read(max(storage.files())).endswith(b"%09d\n" % 999)
    assert len(storage.files()) == 3 + 4


def test_an_upload_is_tried_again_after_storage_was_out_of_reach(gcs: Gcs, monkeypatch) -> None:
    log = BucketLog(f"{gcs.url}/again", "m", ".jsonl", upload_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(log, "_storage", open_storage("/proc/no/such/folder"))
        with pytest.raises(OSError):
            log.append(b"one\n")
    log.append(b"two\n")
    assert open_storage(f"{gcs.url}/again").read("m-00000.jsonl") == b"one\ntwo\n"
