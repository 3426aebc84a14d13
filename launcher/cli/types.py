"""`nnxlaunch types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.options import Output, OutputFormat

if TYPE_CHECKING:
    from launcher.tpu import Slice

EXAMPLES = """  nnxlaunch types               the families
  nnxlaunch types v5p           names of a family, smallest first
  nnxlaunch types v5p-128       one type
  nnxlaunch types trillium-256 --output json
"""


def _begin_with(typed: str) -> list[str]:
    """For the shell: the families, and the types of the family that is typed already."""
    from launcher.tpu import families

    types = [f"{family.name}-{size}" for family in families().values() if typed.startswith(f"{family.name}-") for size in family.names]
    return [name for name in types or families() if name.startswith(typed)]


Name = Annotated[
    str | None,
    typer.Argument(metavar="[FAMILY|TYPE]", autocompletion=_begin_with, help="A family such as v5p, or a type such as v5p-128."),
]
All = Annotated[bool, typer.Option("--all", help="List every name of a family, not only the first 24.")]

_SHORT = 24


def command(name: Name = None, everything: All = False, output: OutputFormat = Output.TABLE) -> None:
    """List the accelerator types and their arithmetic."""
    from launcher.cli.output import emit, table
    from launcher.errors import SpecError
    from launcher.tpu import TpuError
    from trainer.config import Problem

    try:
        rows = _rows(name)
    except TpuError as error:
        raise SpecError([Problem(path=error.key, message=str(error), hint=error.hint, code=error.code, value=name)]) from None
    if output is not Output.TABLE:
        emit(rows, output)
        return
    shown = rows if everything else rows[:_SHORT]
    print(table([[str(value) for value in row.values()] for row in shown], [key.replace("_", " ") for key in rows[0]]))
    if len(shown) < len(rows):
        print(f"... and {len(rows) - len(shown)} more: --all")
    if name is None:
        print("A type is FAMILY-N, where N counts what `name counts` says, or FAMILY-TOPOLOGY such as v5p-4x4x8.")


def _rows(name: str | None) -> list[dict[str, Any]]:
    from launcher.tpu import TpuError, families, find_family
    from launcher.tpu.table import Slice, parse_topology, ways

    if name is None:
        return [
            {
                "family": family.name,
                "aliases": ", ".join(family.aliases),
                "name_counts": family.name_counts,
                "devices_per_chip": family.devices_per_chip,
                "hbm_gib_per_chip": family.hbm_gib_per_chip,
                "bf16_tflops_per_chip": family.peak_bf16_tflops_per_chip,
                "ici_gbytes_per_s": family.ici_gbytes_per_s_per_chip,
                "gke_label": family.gke_accelerator,
            }
            for family in families().values()
        ]
    try:
        family = find_family(name)
    except TpuError:
        return [_row(one) for one in ways(name)]
    slices: list[Slice] = []
    for topology in family.names.values():
        shape = parse_topology(topology)
        slices += [Slice(family=family, topology=shape, machine=m, chips_per_host=count) for m, count in family.hosts_of(shape)]
    return [_row(one) for one in slices]


def _row(one: Slice) -> dict[str, Any]:
    return {
        "type": one.name,
        "topology": one.topology_text,
        "hosts": one.hosts,
        "chips": one.chips,
        "devices": one.devices,
        "hbm_gib": one.chips * one.family.hbm_gib_per_chip,
        "bf16_tflops": one.chips * one.family.peak_bf16_tflops_per_chip,
        "machine": one.machine,
    }
