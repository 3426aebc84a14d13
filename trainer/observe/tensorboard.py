"""TensorBoard event files, written without TensorBoard: framed records of a few protobuf fields.

Formats: TFRecord framing (length, masked CRC-32C, data, masked CRC-32C) and tensorflow/core/util/event.proto,
framework/summary.proto. tensorboardX would do the same, at 425 imported modules and 0.5 s of start-up.
"""

from __future__ import annotations

import json
import struct
import time
from typing import Final

import google_crc32c

from trainer.observe.background import Record
from trainer.observe.jsonl import plain
from trainer.observe.log import open_log

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DT_STRING: Final = 7
GROUPS: Final = {
    "learning": ("loss", "cross_entropy", "z_loss", "gradient_norm", "learning_rate", "perplexity"),
    "perf": ("step_seconds", "tokens_per_second", "valid_tokens_per_second", "tflops_per_device", "mfu"),
}


class TensorBoard:
    """One event file an attempt; scalars are grouped as `learning/`, `perf/`, `eval/` and `other/`."""

    def __init__(self, directory: str) -> None:
        # TensorBoard reads the files of a folder in the order of their names and wants "tfevents" in them.
        self._log = open_log(directory, f"events.out.tfevents.{time.time_ns():020d}")
        self._log.append(frame(event(time.time(), 0, _text(3, "brain.Event:2"))))

    def write(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "header":
            text = json.dumps(plain(dict(record)), indent=2)
            values = [text_value("run", f"<pre>{text}</pre>")]
        elif kind in ("step", "eval"):
            values = [scalar(tag(kind, name), value) for name, value in record.items() if isinstance(value, float)]
        else:
            return
        summary = b"".join(_message(1, value) for value in values)
        self._log.append(frame(event(time.time(), int(record.get("step", 0)), _message(5, summary))))

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        self._log.flush(now=True)


def tag(kind: str, name: str) -> str:
    """Name of a scalar in TensorBoard, such as `learning/loss`."""
    if kind == "eval":
        return f"eval/{name}"
    return next((f"{group}/{name}" for group, names in GROUPS.items() if name in names), f"other/{name}")


def frame(data: bytes) -> bytes:
    """`data` as a TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def event(wall_time: float, step: int, what: bytes) -> bytes:
    return _key(1, _FIXED64) + struct.pack("<d", wall_time) + _key(2, _VARINT) + _varint(step) + what


def scalar(name: str, value: float) -> bytes:
    return _text(1, name) + _key(2, _FIXED32) + struct.pack("<f", value)


def text_value(name: str, text: str) -> bytes:
    """A summary value for TensorBoard's text page: a string tensor of shape [1]."""
    shape = _message(2, _key(1, _VARINT) + _varint(1))
    tensor = _key(1, _VARINT) + _varint(_DT_STRING) + _message(2, shape) + _text(8, text)
    return _text(1, name) + _message(8, tensor) + _message(9, _message(1, _text(1, "text")))


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _message(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
