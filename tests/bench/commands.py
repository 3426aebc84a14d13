"""CPU-seconds of launcher commands, as whole processes."""

from __future__ import annotations

from statistics import median

from tests.bench.measure import Row, child_cpu_seconds

RUNS = 5
SPEC = "k8s/examples/v5p-128-spot.job.yaml"  # four slices


def rows() -> list[Row]:
    found: list[Row] = []
    for arguments, limit in ((["--help"], 0.7), (["validate", SPEC], 0.9), (["render", SPEC], 0.9)):
        times = [child_cpu_seconds(["-m", "launcher", *arguments]) for _ in range(RUNS)]
        found.append(Row(f"nnxlaunch {arguments[0]}", "CPU-s", median(times), limit, f"range {min(times):.2f}-{max(times):.2f}"))
    return found
