"""`nnxlaunch explain`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from launcher.cli.options import Output, OutputFormat, Overrides, SpecFile
from launcher.cli.output import in_units

EXAMPLES = """  nnxlaunch explain job.yaml
  nnxlaunch explain job.yaml --set tpu.type=v5p-256      what would another slice change?
  nnxlaunch explain job.yaml --sharding                  where every tensor lies, and by which rule
  nnxlaunch explain job.yaml --output json
"""

_BYTES = ("memory_per_device", "checkpoint_bytes", "hbm_bytes_per_device", "bytes_received_for_a_layer")

Sharding = Annotated[
    bool, typer.Option("--sharding", help="Show where every tensor lies, by which rule, and in how many copies; nothing else.")
]


def command(
    spec: SpecFile,
    overrides: Overrides = [],  # noqa: B006  (Typer reads it)
    sharding: Sharding = False,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Show what a job spec means: devices, mesh, memory, timeouts, exit codes."""
    from launcher.checks import load
    from launcher.cli.output import emit
    from launcher.cli.saves import hold_against
    from launcher.explain import explain
    from launcher.observe.saves import last_save

    loaded = load(spec, overrides)
    save = last_save(loaded.train.run_directory)
    hold_against(loaded, save)
    if sharding:
        from launcher.cli.sharding import print_sharding
        from launcher.explain.sharding import sharding_report

        report = sharding_report(loaded)
        print_sharding(report) if output is Output.TABLE else emit(report, output)
        return
    sections = explain(loaded)
    if save:
        sections["timeouts"]["last_save_seconds"] = save.seconds
    if output is not Output.TABLE:
        emit(sections, output)
        return
    dropped = {path: entry for path, entry in sections["sharding"].items() if "dropped" in entry}
    sections["sharding"] = dropped or {"weights": "every weight is split as the rules say; --sharding lists them"}
    for title, section in sections.items():
        print(f"{title.replace('_', ' ')}")
        _print(section, title, "  ")


def _print(section: dict[str, Any], title: str, indent: str) -> None:
    width = min(72, max((len(_words(key)) for key in section), default=0))
    for key, value in section.items():
        if key == "schedule":
            print(f"{indent}schedule, a letter for each repeat, a number for each microbatch, dots where there is nothing to do")
            for line in value:
                print(f"{indent}  {line}")
        elif isinstance(value, dict):
            print(f"{indent}{_words(key)}")
            _print(cast("dict[str, Any]", value), key, indent + "  ")
        else:
            print(f"{indent}{_words(key):{width}}  {_shown(value, key, in_bytes=title in _BYTES or key in _BYTES)}".rstrip())


def _words(key: str) -> str:
    return key if "/" in key or "(" in key else key.replace("_", " ")


def _shown(value: Any, key: str, *, in_bytes: bool) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, cast("list[Any]", value)))
    if key == "flops_per_step":
        power = min(max(len(str(int(value))) - 1, 0) // 3, 6)
        return f"{value / 1000**power:.4g} {' kMGTPE'[power].strip()}FLOP"
    if isinstance(value, int) and not isinstance(value, bool):
        return in_units(value) if in_bytes else f"{value:,}"
    return "-" if value is None else str(value)
