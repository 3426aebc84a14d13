"""One process of a world that makes the first state of a config and writes its own part of the parameters beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from trainer.config import load_train_config
from trainer.config.run import Distributed
from trainer.worker import prepare_environment


def main(file: str) -> None:
    prepare_environment()
    import jax

    from trainer.distributed import initialise, shutdown
    from trainer.parallel.sharding import Layout
    from trainer.state import describe_state, initial_state, state_items

    config = load_train_config(file, [])
    mine = initialise(Distributed(initialization_timeout_seconds=120))
    layout = Layout.of(config, jax.devices(), slices=mine.slices)
    part: dict[str, np.ndarray] = {}
    for name, array in state_items(initial_state(config, describe_state(config, layout)))["params"].items():
        for shard in array.addressable_shards:
            begins = (index.indices(size)[0] for index, size in zip(shard.index, array.shape, strict=True))
            part[f"{name}@{','.join(map(str, begins))}"] = np.asarray(shard.data)
    with Path(file).with_name(f"part-{mine.process_index}.npz").open("wb") as out:
        np.savez(out, **part)  # type: ignore[arg-type]
    shutdown()


if __name__ == "__main__":
    main(sys.argv[2])
