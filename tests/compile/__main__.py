"""`python -m tests.compile [NAME ...]`: compile the matrix for TPUs that are not here; say what is not as it should be.

Rows of docs/compile.md are replaced by what was found where that is as it should be. `--small`: the small ones, and the page is left alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.explain.compiled import target_of
from tests.compile.cases import LAYER_BODIES, Case, cases, job_of, same_direction, violations
from trainer.aot.__main__ import compile_and_report, prepare_environment

PAGE = Path(__file__).parents[2] / "docs" / "compile.md"
BEGIN, END = "<!-- matrix: written by python -m tests.compile -->", "<!-- end of matrix -->"
HEAD = (
    "| case | hardware | model, batch, mesh and more | peak GB of | fits | forward layer body, MB | backward layer body, MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)
SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter", "collective-permute": "permute",
         "all-to-all": "exchange", "ragged-all-to-all": "ragged exchange", "send": "send"}  # fmt: skip


def main() -> int:
    known = {case["name"]: case for case in cases()}
    parser = argparse.ArgumentParser(prog="python -m tests.compile", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--small", action="store_true", help="the small ones")
    parser.add_argument("--list", action="store_true", help="only print the names")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; --list prints the names")
    chosen = [known[name] for name in options.names] or [case for case in known.values() if case.get("small") or not options.small]
    if options.list:
        print("\n".join(case["name"] for case in chosen))
        return 0
    rows: dict[str, str] = {}
    failed: list[str] = []
    for case in chosen:
        found, wrong, seconds = compiled(case)
        if not wrong:
            rows[case["name"]] = row(case, found)
        print(f"{case['name']:28} {peak(found):>14}  {seconds:4.0f} s  {'; '.join(wrong) or 'as it should be'}", flush=True)
        failed += [case["name"]] if wrong else []
        if not options.small:
            keep(rows, known)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} as they should be" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def keep(rows: Mapping[str, str], known: Iterable[str]) -> None:
    """Put `rows` into the page's table, in the order of `known`; a row of no case falls out."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    merged = {line.split("|")[1].strip(): line for line in table.strip().splitlines()[2:]} | dict(rows)
    PAGE.write_text("\n".join([before + BEGIN, HEAD, *(merged[name] for name in known if name in merged), END + after]), encoding="utf-8")


def compiled(case: Case) -> tuple[Mapping[str, Any], Sequence[str], float]:
    """The report, what is wrong with it, and the CPU-seconds it took."""
    job = job_of(case)
    target = target_of(job)
    prepare_environment(target)
    import jax

    start = time.process_time()
    with tempfile.NamedTemporaryFile("r") as program:
        found = compile_and_report(job.train, target, save=None, hlo=program.name)
        wrong = list(violations(case, found, program.read()))
    jax.clear_caches()
    return found, wrong, time.process_time() - start


def row(case: Case, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    hardware = case["tpu"] + (f" x {case['slices']}" if "slices" in case else "")
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in found["mesh"].items())
    extra = [f"{name}: {value}" for name in ("layers", "accumulation", "remat") if (value := case.get(name)) is not None]
    extra += [f"{name}: {_plain(value)}" for name, value in case.get("train", {}).items()]
    what = "; ".join([f"{case['model']}, {case['batch'].replace('x', ' x ')}, {mesh}", *extra])
    bodies = [_body(found.get("collectives", ()), name) for name in LAYER_BODIES]
    fits = "yes" if found["fits"] else "no"
    return f"| {case['name']} | {hardware} | {what} | {peak(found)} | {fits} | {' | '.join(bodies)} |"


def peak(found: Mapping[str, Any]) -> str:
    if "memory_per_device" not in found:
        return "-"
    memory = found["memory_per_device"]
    return f"{memory['peak'] / 1e9:.2f} of {memory['capacity'] / 1e9:.1f}"


def _body(regions: Iterable[Mapping[str, Any]], name: str) -> str:
    """Kinds of collectives of that direction's region with the most bytes, the largest first: bytes, and how they run."""
    there = [region["collectives"] for region in regions if same_direction(region["region"], name)]
    kinds: dict[tuple[str, str], int] = {}
    for entry in max(there, key=lambda entries: sum(entry["bytes"] for entry in entries), default=()):
        key = SHORT.get(entry["kind"], entry["kind"]), "overlapped" if entry["overlapped"] else "exposed"
        kinds[key] = kinds.get(key, 0) + entry["bytes"]
    listed = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size / 1e6:.0f} {how}" for (kind, how), size in listed if size >= 5e5) or "-"


def _plain(value: Any) -> str:
    """A value of a spec as one writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
