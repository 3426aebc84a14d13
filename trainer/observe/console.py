"""Progress a person can read, on standard output, without colour or cursor movement."""

from __future__ import annotations

import math
from typing import Any

from trainer.observe.background import Record


class Console:
    """One line a logged step, numbers in fixed columns; `[done/total]` counts finished steps, as checkpoints do."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, record: Record) -> None:
        print(line(record, self._total), flush=True)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def line(record: Record, total_steps: int) -> str:
    """The text of a record."""
    match record["kind"]:
        case "header":
            return header_text(record)
        case "step":
            return step_text(record, total_steps)
        case "eval":
            return f"{_progress(record['done'], total_steps)}  eval loss {record['loss']:.4f}  perplexity {record['perplexity']:.4g}"
        case _:
            fields = "  ".join(f"{key} {value}" for key, value in record.items() if key not in ("kind", "event"))
            return f"{record['event']}: {fields}" if fields else str(record["event"])


def header_text(record: Record) -> str:
    versions, devices = record["versions"], record["devices"]
    mesh = " x ".join(f"{axis}={degree}" for axis, degree in record["mesh"].items() if degree != 1) or "1 device"
    revision = record["image_revision"] or "unknown"
    flops = f"{record['flops_per_step'] / 1e12:.4g} TFLOP a step"
    lines = [
        f"nnxlaunch {versions['nnxlaunch']}  jax {versions['jax']}  python {versions['python']}  revision {revision}",
        f"{record['parameters']:,} parameters  mesh {mesh}  {devices['count']} x {devices['kind']}  {devices['processes']} process(es)",
        f"{record['tokens_per_step']:,} tokens a step  {flops}  config {record['config_hash'][:12]}",
    ]
    lines += [f"{name}={value}" for name, value in record["flags"].items()]
    return "\n".join(lines)


def step_text(record: Record, total_steps: int) -> str:
    parts = [_progress(record["done"], total_steps), f"loss {record['loss']:.4f}"]
    seconds = record.get("step_seconds")
    if seconds is None:
        parts.append(f"first step after {record['first_step_seconds']:.1f} s" if "first_step_seconds" in record else "")
    else:
        parts += [f"{record['tokens_per_second']:,.0f} tokens/s", f"{_duration(seconds)}/step"]
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record.get("eta_seconds") is not None:
        parts.append(f"ETA {clock(record['eta_seconds'])}")
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as `1:02:03`."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _progress(done: Any, total: int) -> str:
    return f"[{done:>{len(str(total))}}/{total}]"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
