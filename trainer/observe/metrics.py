"""Step metrics as host values, and step times from the moments steps were seen to finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

import jax
import numpy as np

RECENT_STEPS: Final = 32


def start_copy(metrics: Mapping[str, jax.Array]) -> None:
    """Ask for the values without waiting: the copy to the host starts when the step has made them."""
    for value in metrics.values():
        value.copy_to_host_async()


def read(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Scalars on the host. Waits until they are computed; the only such read in the training loop."""
    return {name: float(np.asarray(value)) for name, value in metrics.items() if not value.ndim}  # a seventh of jax.device_get's host time


def read_arrays(metrics: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """Those that are not scalars, as nested lists, to four digits behind the point. Waits as `read`."""
    return {name: np.asarray(value).astype(np.float64).round(4).tolist() for name, value in metrics.items() if value.ndim}


def read_replicas(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """As `read`, of metrics with a leading dim that counts replicas: counts of tokens summed, everything else averaged.

    Also `replica_R_loss` of each. A process that does not hold all replicas speaks of its own ones: nothing is exchanged,
    and its counts are scaled to all of them.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if value.ndim > 1:
            continue
        own = {shard.index[0].start or 0: shard for shard in value.addressable_shards}
        mean = float(np.mean([np.mean(np.asarray(shard.data)) for shard in own.values()]))
        found[name] = mean * value.shape[0] if name.endswith("tokens") else mean
        if name == "loss":
            for start, shard in own.items():
                found |= {f"replica_{start + offset}_loss": float(loss) for offset, loss in enumerate(np.asarray(shard.data))}
    return found


def read_replica_arrays(metrics: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """As `read_arrays`, of the first replica that this process holds."""
    return read_arrays({name: value.addressable_shards[0].data[0] for name, value in metrics.items() if value.ndim > 1})


class StepClock:
    """Seconds a step took: the time between the ends of it and of the one before.

    The first step of a process (it compiles) and a step during which something else ran have no time.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def finished(self, now: float) -> float | None:
        """Seconds of the step that was seen to end at `now`; None where that would not be its own time."""
        last, self._last = self._last, now
        if last is None or now <= last:
            return None
        self._recent.append(now - last)
        return now - last

    def interrupt(self) -> None:
        """Something besides training took time since the last step ended."""
        self._last = None

    @property
    def typical_seconds(self) -> float | None:
        """Median over the latest steps; None before the first is known."""
        return median(self._recent) if self._recent else None
