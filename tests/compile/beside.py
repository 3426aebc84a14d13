"""`python -m tests.compile.beside [CASE ...]`: one model's step twice, with the compiler's own options and with this project's.

The first program is plain FSDP as the compiler makes it of shardings alone: the trainer's step under `default_options: false`. Both are
compiled in one run with one libtpu; their peaks, gathers of weights and exposed collectives (link model: docs/compile.md) are put side by
side in docs/performance.md. For trying options, `--layers` and `--set` write nothing: two layers have the loop bodies of all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from tests.compile import __main__ as matrix
from tests.compile.cases import LAYER_BODIES, Case, cases, same_direction

PAGE: Final = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- beside: written by python -m tests.compile.beside -->", "<!-- end of beside -->"
HEAD: Final = (
    "| hardware | options | peak, GB | gathers, forward | gathers, backward | sums of gradients, backward "
    "| exposed in a layer, forward + backward, ms | in the layers of a step, ms | of the plain one |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
CASES: Final = (
    "v5e-fsdp", "v5p-fsdp", "v6e-fsdp", "v5e-two-slices", "tpu7x-fsdp",
    "pipeline-llama2-7b", "v6e-70b-tensor", "v6e-experts", "v5p-experts",
)  # fmt: skip
PLAIN, OURS = "the compiler's own", "ours"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile.beside", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"of tests/compile/matrix.yaml; default: {', '.join(CASES)}")
    parser.add_argument("--layers", type=int, metavar="N", help="of fewer layers; nothing is written")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="on top of ours; nothing is written")
    parser.add_argument("--only", choices=("plain", "ours"), help="one of the two; nothing is written")
    options = parser.parse_args()
    known = {case["name"]: case for case in cases()}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; python -m tests.compile --list prints the names")
    more = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in options.set)}
    writes = not (options.layers or options.set or options.only)
    failed: list[str] = []
    for name in options.names or CASES:
        case = known[name] | ({"layers": options.layers} if options.layers else {})
        rows: list[str] = []
        plain = None
        for what, compiler in ((PLAIN, {"default_options": False}), (OURS, {"options": more})):
            if options.only and (options.only == "plain") != (what == PLAIN):
                continue
            found, wrong, seconds = matrix.compiled(_with(case, compiler))
            in_layers = exposed(found) if "collectives" in found else None
            rows.append(row(case, what, found, in_layers / plain if plain and in_layers is not None else None))
            print(rows[-1], f"({seconds:.0f} CPU-s)", *wrong, flush=True)
            failed += [f"{name}: {problem}" for problem in wrong if what == OURS]  # of the plain one nothing is asked
            plain = in_layers
            if writes and what == OURS and not wrong:
                matrix.keep({name: matrix.row(case, found)}, known)
        if writes:
            PAGE.write_text(merged(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print("\n".join(["not as it should be:", *failed]) if failed else "all as they should be")
    return 1 if failed else 0


def _with(case: Case, compiler: Mapping[str, Any]) -> Case:
    return {**case, "train": {**case.get("train", {}), "compiler": compiler}}


def layer_bodies(found: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Regions that run more than once a step."""
    return [region for region in found["collectives"] if region["region"] != "entry"]


def exposed(found: Mapping[str, Any]) -> float:
    """Seconds of a step in which nothing runs beside a collective of a layer."""
    return sum(region["exposed_seconds"] * region["executions"] for region in layer_bodies(found))


def row(case: Case, what: str, found: Mapping[str, Any], ratio: float | None) -> str:
    hardware = (f"{case['slices']} x " if "slices" in case else "") + case["tpu"]
    if "mesh" in case:
        hardware += f": {case['model']}, {' x '.join(f'{axis} {degree}' for axis, degree in case['mesh'].items())}"
    if "memory_per_device" not in found:
        return f"| {hardware} | {what} | {found['compiler']} |" + " |" * 6
    bodies = [[region for region in layer_bodies(found) if same_direction(region["region"], name)] for name in LAYER_BODIES]
    forward, backward = ([entry for region in body for entry in region["collectives"]] for body in bodies)
    each = " + ".join(f"{1e3 * sum(region['exposed_seconds'] for region in body):.2f}" for body in bodies)
    cells = [
        hardware, what, f"{found['memory_per_device']['peak'] / 1e9:.3f}",
        runs(forward, ["all-gather"]), runs(backward, ["all-gather"]), runs(backward, ["all-reduce", "reduce-scatter", "send"]),
        each, f"{1e3 * exposed(found):.1f}", "" if ratio is None else f"{ratio:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def runs(entries: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """How those of `kinds` run: counts and MB of results, asynchronous with work beside them first; below 0.5 MB nothing is said."""
    parts: dict[str, list[float]] = {}
    for entry in entries:
        if entry["kind"] in kinds and entry["bytes"] >= 5e5:
            how = "overlapped" if entry["overlapped"] else "async, exposed" if entry["runs"] == "async" else "sync"
            label = how if len(kinds) == 1 else f"{entry['kind']} {how}"
            count_and_bytes = parts.setdefault(label, [0, 0])
            count_and_bytes[0] += entry["count"]
            count_and_bytes[1] += entry["bytes"]
    return "; ".join(f"{count:.0f} {label} ({size / 1e6:.0f} MB)" for label, (count, size) in sorted(parts.items())) or "-"


def merged(page: str, rows: Sequence[str]) -> str:
    """The page with `rows` in its table; those of the same hardware and options are replaced."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    lines = {tuple(line.split(" | ")[:2]): line for line in [*table.strip().splitlines()[2:], *rows]}
    return "\n".join([before + BEGIN, HEAD, *lines.values(), END + after])


if __name__ == "__main__":
    sys.exit(main())
