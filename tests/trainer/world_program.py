"""One process of a small JAX world under the real parent, without a model: `python -m tests.trainer.world_program FOLDER`.

It writes `ready-INDEX` into the folder once the world stands, then polls until all leave.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from trainer.parent import link


def world(folder: Path) -> None:
    link.attach()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from trainer.config.run import Distributed
    from trainer.distributed import initialise, preemption_requested, shutdown
    from trainer.distributed.preemption import install_handlers

    install_handlers()
    mine = initialise(Distributed(initialization_timeout_seconds=120, heartbeat_timeout_seconds=5))
    step = 0
    while not preemption_requested(step):
        step += 1
        time.sleep(0.05)  # what a step takes
        if step == 1:
            (folder / f"ready-{mine.process_index}").write_text(str(os.getpid()))
    link.tell(exit_code=75, message=f"left at {step}")
    shutdown()
    sys.exit(75)


def main(folder: str) -> None:
    if link.VARIABLE in os.environ:
        return world(Path(folder))
    from trainer.parent.process import Parent, leave

    leave(Parent([sys.executable, "-m", "tests.trainer.world_program", folder]).run())


if __name__ == "__main__":
    main(sys.argv[1])
