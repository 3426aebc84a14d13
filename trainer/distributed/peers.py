"""Telling the loss of a peer, or of the network, from an error of our own, where JAX raises instead of aborting."""

from __future__ import annotations

import re
from typing import Final

# What gloo (CPU), the coordination service and the DCN transport say when the other side is gone.
_WORDS: Final = re.compile(
    r"Connection (?:closed|reset) by peer|Connection refused|Socket closed|Broken pipe|connection .{0,80}timed out"
    r"|Timed out waiting .{0,200}|heartbeat|another task died|tasks? (?:is|are) unhealthy|coordination service|CoordinationService"
    r"|Barrier (?:timed out|failed)|DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED|gloo/transport|gloo::|Gloo [\w-]+ failed",
    re.IGNORECASE,
)


def lost_peer(error: BaseException) -> bool:
    """Whether `error`, raised while several processes worked together, means that another one is gone."""
    return lost_connection(error) or any(
        type(part).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _WORDS.search(str(part)) for part in _chain(error)
    )


def lost_connection(error: BaseException) -> bool:
    """Whether the network is behind `error`: of a process that is alone, the way to the storage, which may come back."""
    return any(isinstance(part, ConnectionError | TimeoutError) for part in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and what led to it."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and not any(current is part for part in found):
        found.append(current)
        current = current.__cause__ or current.__context__
    return found
