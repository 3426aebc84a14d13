"""How processes become one JAX world, and how they agree to leave it. Importing this does not import JAX."""

from trainer.distributed.peers import lost_connection, lost_peer
from trainer.distributed.preemption import asked_to_leave, preemption_requested
from trainer.distributed.rank import Rank, enter_own_world, rank_from_environment
from trainer.distributed.world import World, initialise, shutdown

__all__ = [
    "Rank", "World", "asked_to_leave", "enter_own_world", "initialise", "lost_connection", "lost_peer", "preemption_requested",
    "rank_from_environment", "shutdown",
]  # fmt: skip
