"""The report of `nnxlaunch explain --sharding` as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from launcher.cli.output import in_units, table

KINDS: Final = {
    "weights": "weights, as stored between steps",
    "optimizer": "optimizer state",
    "activations": "activations of a microbatch, as the model asks for them",
    "batch": "the global batch",
}
HEADER: Final = ("tensor", "type", "dims: axis size / mesh axes [rule]", "a device", "copies", "replicated")


def print_sharding(report: Mapping[str, Any]) -> None:
    """`report`: what `launcher.explain.sharding.sharding_report` gives."""
    mesh = " x ".join(f"{axis}={degree}" for axis, degree in report["mesh"].items()) or "nothing is split"
    print(f"{report['devices']} devices, mesh {mesh}\n")
    print("rules, in their order; mesh axes of size 1 are left out")
    rules = [(f"[{rule['number']}]", rule["axis"], _joined(rule["mesh"]), rule["from"]) for rule in report["rules"]]
    print(_indented(table(rules, ("", "axis", "over", "from"))))
    for kind, title in KINDS.items():
        print(f"\n{title}")
        print("\n".join(_tensors(report["tensors"][kind])) or "  none")
    print()
    print("\n".join(_totals(report["totals"])))


def _tensors(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each tensor; below it, what did not apply and why."""
    rows = [
        (
            f"{entry['tensor']} x {entry['count']}" if entry["count"] > 1 else entry["tensor"],
            entry["dtype"],
            ", ".join(_dim(dim) for dim in entry["dims"]),
            in_units(entry["bytes_per_device"]),
            str(entry["copies"]),
            in_units(entry["replicated_bytes"]) if entry["replicated_bytes"] else "-",
        )
        for entry in entries
    ]
    if not rows:
        return
    header, *lines = table(rows, HEADER).splitlines()
    yield f"  {header}"
    for line, entry in zip(lines, entries, strict=True):
        yield f"  {line}"
        yield from (f"      skipped [{skip['rule']}]: {skip['reason']}" for skip in entry["skipped"])
        yield from (f"      dropped: {reason}" for reason in entry["dropped"])


def _dim(dim: Mapping[str, Any]) -> str:
    """`embed 4096 / fsdp [19]`; what `sharding.optimizer` adds to a rule's axes stands after the rule."""
    text = f"{dim['axis'] or 'any'} {dim['size']}"
    if ruled := [axis for axis in dim["mesh"] if axis not in dim["further"]]:
        text += f" / {_joined(ruled)}"
    if dim["rule"] is not None:
        text += f" [{dim['rule']}]"
    return f"{text} + {_joined(dim['further'])}" if dim["further"] else text


def _totals(totals: Mapping[str, Any]) -> Iterator[str]:
    yield f"{totals['parameters']:,} parameters"
    rows = [
        (kind, in_units(totals[f"{kind}_bytes_per_device"]), in_units(totals[f"{kind}_replicated_bytes"]))
        for kind in ("weights", "optimizer", "batch")
    ]
    yield _indented(table(rows, ("total", "a device", "replicated")))
    share, limit = totals["unsharded_share"], totals["unsharded_limit"]
    yield f"  {share:.2%} of the parameters are not split over every mesh axis for weights; the limit is {100 * limit:.4g}%"
    for entry in totals["largest_unsharded"]:
        yield f"    {entry['share']:.2%}  {entry['tensor']}, not over {_joined(entry['not_over'])}"


def _joined(axes: Sequence[str]) -> str:
    return "+".join(axes) or "-"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
