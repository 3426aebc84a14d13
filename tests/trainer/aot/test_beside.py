"""Two programs side by side: what of a report goes into the table of docs/performance.md."""

from __future__ import annotations

from typing import Any

from tests.compile.beside import BEGIN, END, HEAD, exposed, merged, row

CASE = {"name": "two", "tpu": "v5e-64", "slices": 2}


def entry(kind: str, megabytes: float, count: int, runs: str, *, overlapped: bool) -> dict[str, Any]:
    return {"kind": kind, "bytes": int(megabytes * 1e6), "count": count, "runs": runs, "overlapped": overlapped}


REPORT: dict[str, Any] = {
    "memory_per_device": {"peak": 4_269_000_000},
    "collectives": [
        {"region": "forward layer body", "executions": 32, "exposed_seconds": 1e-3,
         "collectives": [entry("all-gather", 371, 6, "async", overlapped=True), entry("all-gather", 34, 1, "async", overlapped=False)]},
        {"region": "backward outer loop body", "executions": 32, "exposed_seconds": 2e-3,
         "collectives": [entry("all-reduce", 405, 5, "sync", overlapped=False), entry("all-reduce", 0.016, 1, "sync", overlapped=False)]},
        {"region": "entry", "executions": 1, "exposed_seconds": 7.0, "collectives": []},
    ],
}  # fmt: skip


def test_exposed_time_is_that_of_all_turns_of_the_layers_and_none_of_what_runs_once_a_step() -> None:
    assert exposed(REPORT) == 32 * 3e-3


def test_a_row_tells_how_gathers_and_sums_run_and_leaves_out_what_is_small() -> None:
    assert row(CASE, "ours", REPORT, 0.25) == (
        "| 2 x v5e-64 | ours | 4.269 | 1 async, exposed (34 MB); 6 overlapped (371 MB) | - | 5 all-reduce sync (405 MB) "
        "| 1.00 + 2.00 | 96.0 | 0.250 |"
    )


def test_a_step_that_does_not_fit_has_a_row_in_the_compilers_words() -> None:
    found = {"fits": False, "compiler": "out of memory"}
    assert row(CASE, "ours", found, None).startswith("| 2 x v5e-64 | ours | out of memory |")


def test_a_page_keeps_other_rows_and_replaces_those_of_the_same_hardware_and_options() -> None:
    page = f"before\n{BEGIN}\n{HEAD}\n| v5p | plain | 1 |\n| v5p | ours | 2 |\n{END}\nafter\n"
    assert merged(page, ["| v5p | ours | 3 |", "| v6e | plain | 4 |"]) == (
        f"before\n{BEGIN}\n{HEAD}\n| v5p | plain | 1 |\n| v5p | ours | 3 |\n| v6e | plain | 4 |\n{END}\nafter\n"
    )
