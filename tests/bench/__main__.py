"""`python -m tests.bench [NAME ...]`: measure, print a table, keep the figures in docs/performance.md."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench import commands, decode, loop, peer, pipeline, scale, sigterm, startup, step
from tests.bench.measure import Row

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- results: written by python -m tests.bench -->", "<!-- end of results -->"
HEAD = "| figure | value | limit | met | note | measured |\n| --- | --- | --- | --- | --- | --- |"
MEASURES: dict[str, Callable[[], list[Row]]] = {
    "commands": commands.rows,
    "startup": startup.rows,
    "step-1": lambda: step.rows(1),
    "step-8": lambda: step.rows(8),
    "pipeline": pipeline.rows,
    "loop": loop.rows,
    "decode": decode.rows,
}
ON_A_CLUSTER: dict[str, Callable[[], list[Row]]] = {"scale": scale.rows, "sigterm": sigterm.rows}
BESIDE_OTHERS: dict[str, Callable[[], list[Row]]] = {"peer": peer.rows}
"""Both only by name."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    by_name = f"on a cluster: {', '.join(ON_A_CLUSTER)}; with PEER_PYTHON: {', '.join(BESIDE_OTHERS)}"
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(MEASURES)}; {by_name}")
    parser.add_argument("--no-write", action="store_true", help="leave docs/performance.md as it is")
    options = parser.parse_args()
    known = MEASURES | ON_A_CLUSTER | BESIDE_OTHERS
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    missed = 0
    for name in options.names or list(MEASURES):
        rows = known[name]()
        for row in rows:
            print(
                f"{row.name:45} {text(row.value):>8} {row.unit:6} limit {text(row.limit):>6}  {'met' if row.met else 'MISSED'}  {row.note}",
                flush=True,
            )
        missed += sum(not row.met for row in rows)
        if not options.no_write:
            PAGE.write_text(merged(PAGE.read_text(), rows, where()))
    return 1 if missed else 0


def merged(page: str, rows: list[Row], measured: str) -> str:
    """The page with `rows` in its table of results; rows of the same name are replaced, others stay."""
    before, _, rest = page.partition(BEGIN)
    block, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{PAGE.name} has no block between {BEGIN!r} and {END!r}")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in block.strip().splitlines()[2:]}
    for row in rows:
        value = f"{text(row.value)} {row.unit}"
        lines[row.name] = f"| {row.name} | {value} | {text(row.limit)} | {'yes' if row.met else 'no'} | {row.note} | {measured} |"
    return "\n".join([before + BEGIN, HEAD, *lines.values(), END]) + after


def where() -> str:
    """The day, the kind of machine and how busy it was: load averages say how far the figures can be trusted."""
    load = os.getloadavg()[1]
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}, {os.cpu_count()} x {platform.machine()}, load {load:.1f}"


def text(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
