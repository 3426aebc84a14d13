"""The launcher's exception tree, its exit codes, and the one place that prints an error.

NnxlaunchError             anything the launcher says no to on purpose (1)
├── SpecError              the job spec cannot be used; carries every problem (64)
├── NotFound               no such job, pod or file (66)
├── Unavailable            the cluster or backend cannot be reached or used, credentials included (69)
├── ToolFailed             a program the launcher started failed: container engine, trainer tool (70)
├── AlreadyExists          the name is taken (73)
├── WaitTimeout            `wait` gave up; the job goes on (124)
└── JobFailed              the job ended, but not well (125)

Further exit codes: 0 success, 2 wrong usage of a command, 130 interrupted. `trainer.config.ConfigError` (64, with
the same list of problems) stands beside the tree because the trainer raises it too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from launcher.redact import redact

if TYPE_CHECKING:
    from trainer.config import Problem

EXIT_CODES: Final[dict[int, str]] = {
    0: "success",
    1: "an error without a code of its own",
    2: "wrong usage of a command",
    64: "the job spec cannot be used",
    66: "no such job, pod or file",
    69: "the cluster or backend cannot be reached or used",
    70: "a program the launcher started failed",
    73: "the name is taken",
    124: "`wait` timed out; the job goes on",
    125: "the job ended, but not well",
    130: "interrupted",
}


class NnxlaunchError(Exception):
    """Printed as `error: MESSAGE` and `hint: HINT`; never with a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SpecError(NnxlaunchError):
    """Every problem of a spec at once."""

    exit_code = 64

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class NotFound(NnxlaunchError):
    exit_code = 66


class Unavailable(NnxlaunchError):
    exit_code = 69


class ToolFailed(NnxlaunchError):
    exit_code = 70


class AlreadyExists(NnxlaunchError):
    exit_code = 73


def way_past(*, finished: bool) -> str:
    """The hint beside a job whose name is taken."""
    if finished:
        return "take its place with --replace, which goes on from its last committed checkpoint, or choose another name"
    return "follow it with --attach, choose another name, or take its place with --replace"


class WaitTimeout(NnxlaunchError):
    exit_code = 124


class JobFailed(NnxlaunchError):
    exit_code = 125


def report(error: Exception) -> int:
    """Print `error` on stderr as `error:` then `hint:` lines, once for each problem it carries; return the exit code.

    Raises `error` again when it is neither ours nor the machine's (OSError): a defect deserves its traceback.
    """
    problems: Sequence[Problem] | None = getattr(error, "problems", None)
    if problems is not None and (isinstance(error, SpecError) or type(error).__name__ == "ConfigError"):
        for problem in problems:
            complain(f"{problem.path}: {problem.message} [{problem.code}]", problem.hint)
        return SpecError.exit_code
    if isinstance(error, NnxlaunchError):
        complain(str(error), error.hint)
        return error.exit_code
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
        return NnxlaunchError.exit_code
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        complain(f"{error.filename}: {reason}" if error.filename else reason, "")
        return NnxlaunchError.exit_code
    raise error


def complain(message: str, hint: str) -> None:
    """One problem on stderr, as `error: MESSAGE` and, where there is one, `hint: HINT`."""
    print(f"error: {visible(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {visible(hint)}", file=sys.stderr)


def visible(text: str) -> str:
    """`text` without secrets, and without control characters that could rewrite the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in redact(text))
