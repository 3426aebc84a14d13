"""Host rows in, global arrays out: every device gets its rows of the batch, no process reads another's."""

from __future__ import annotations

import jax
import numpy as np

from trainer.parallel.sharding import Layout


class Feed:
    """Places the rows of this process on its devices as part of a global batch of [B, T] arrays."""

    def __init__(self, layout: Layout, global_batch: int, sequence_length: int) -> None:
        self._shape = (global_batch, sequence_length)
        self._sharding = layout.sharding(("batch", "length"), self._shape)
        indices = self._sharding.addressable_devices_indices_map(self._shape).values()
        spans = [index[0].indices(global_batch)[:2] for index in indices if index is not None]
        self.local_rows = np.unique(np.concatenate([np.arange(start, stop) for start, stop in spans]))
        """Positions within the global batch that this process's devices hold, ascending."""
        self._offset = {start: int(np.searchsorted(self.local_rows, start)) for start, _ in spans}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """`batch`: arrays [len(local_rows), T] in the order of `local_rows`."""
        if self._sharding.is_fully_addressable:
            return jax.device_put(batch, self._sharding)  # one call for all: half the host's time of a call for each
        return {name: self._place(rows) for name, rows in batch.items()}

    def _place(self, rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self._shape[0])
            first = self._offset[start]
            return rows[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, shard)
