"""Which steps stay. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def steps_to_delete(steps: Iterable[int], *, keep_last: int, keep_every_steps: int | None) -> list[int]:
    """Committed steps that are neither among the newest `keep_last` nor divisible by `keep_every_steps`, oldest first."""
    older = sorted(steps)[:-keep_last]
    return [step for step in older if keep_every_steps is None or step % keep_every_steps]
