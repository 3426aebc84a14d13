"""A problem with a document: where, what, the limit, the fix. All of them are reported at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that must be changed before a document can be used."""

    path: str  # dotted path in the document, such as `train.mesh.ici.fsdp`
    message: str  # what is wrong, with the value and the limit
    hint: str = ""  # what to write instead
    code: str = "invalid"  # stable, for scripts
    value: Any = None
    limit: Any = None

    def under(self, prefix: str) -> Problem:
        """The same problem seen from a document that holds this one at `prefix`."""
        return replace(self, path=f"{prefix}.{self.path}" if self.path != "(root)" else prefix)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


class ConfigError(ValueError):
    """A document cannot be used; `problems` says why, all at once. Ends a process with exit code 64."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
