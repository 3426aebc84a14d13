"""What a run's last save has to say about its spec."""

from __future__ import annotations

import sys

from launcher.observe.saves import Save
from launcher.spec import JobSpec
from trainer.config import Problem


def hold_against(spec: JobSpec, save: Save | None) -> None:
    """Raises SpecError where the grace is shorter than what that save took; says where none is long enough."""
    from launcher.errors import SpecError

    if save and (problems := grace_problems(spec, save)):
        raise SpecError(problems)
    note(spec, save)


def grace_problems(spec: JobSpec, save: Save) -> list[Problem]:
    from launcher.checks.pod import grace_fits_save

    return list(grace_fits_save(spec, step=save.step, seconds=save.seconds))


def note(spec: JobSpec, save: Save | None) -> None:
    """On standard error, where the capacity gives no grace that is long enough."""
    from launcher.checks.pod import save_outlasts_capacity

    if save and (text := save_outlasts_capacity(spec, step=save.step, seconds=save.seconds)):
        print(f"note: {text}", file=sys.stderr)
