"""Memory on CPU: kept from step to step.

XLA takes a program's temporaries from malloc for each step. glibc gives large ones back to the kernel at once, so that every step pays
for fresh, zeroed pages: 152,000 of them in the step of eight devices in `docs/performance.md`, a seventh of its CPU time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trainer.contract import DEVICES_PER_HOST

KEPT: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
"""glibc's mallopt(3): nothing mapped by itself, nothing given back, one heap (others hold at most 64 MB and map what is larger)."""


def memory_kept(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a trainer: nothing where it has devices of its own, and nothing over what is set already."""
    if DEVICES_PER_HOST not in environment and environment.get("JAX_PLATFORMS") != "cpu":
        return {}
    return {name: value for name, value in KEPT.items() if name not in environment}
