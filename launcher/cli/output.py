"""Results on standard output: a table for people, JSON or YAML for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from launcher.cli.options import Output
from launcher.errors import visible


def emit(data: Any, output: Output) -> None:
    """Print plain `data` (dicts, lists, strings, numbers) as JSON or YAML."""
    if output is Output.JSON:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        from launcher.manifest.yaml import dump

        print(dump(data), end="")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """`rows` in aligned columns, two spaces apart, under `header` where there is one."""
    lines = [tuple(header), *map(tuple, rows)] if header else [tuple(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def in_units(count: int) -> str:
    """Bytes in the unit a person would use."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"


def count(number: int, what: str) -> str:
    """`1 host`, `4 hosts`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def screen(rows: Sequence[tuple[str, str]]) -> str:
    """`key  value` lines, values aligned; control characters of what others wrote are shown, not obeyed."""
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key.ljust(width)}  {visible(value)}".rstrip() for key, value in rows)
