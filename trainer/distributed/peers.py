"""Telling the loss of a peer from an error of our own, where JAX raises instead of aborting."""

from __future__ import annotations

import re
from typing import Final

# What gloo (CPU), the coordination service and the DCN transport say when the other side is gone.
_WORDS: Final = re.compile(
    r"Connection (?:closed|reset) by peer|Connection refused|Socket closed|Broken pipe|connection .{0,80}timed out"
    r"|Timed out waiting .{0,200}|heartbeat|another task died|tasks? (?:is|are) unhealthy|coordination service|CoordinationService"
    r"|Barrier (?:timed out|failed)|DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED",
    re.IGNORECASE,
)


def lost_peer(error: BaseException) -> bool:
    """Whether `error`, raised while several processes worked together, means that another one is gone."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, ConnectionError | TimeoutError):
            return True
        if type(current).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _WORDS.search(str(current)):
            return True
        current = current.__cause__ or current.__context__
    return False
