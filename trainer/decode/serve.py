"""Continuous batching: requests enter slots as slots become free, in the order they came.

The host works one step behind the device: while step n+1 runs, the tokens of step n are read and handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np

from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[int] = ()
    """Tokens that end the answer; the one that does is not part of it."""


@dataclass(frozen=True)
class Piece:
    """One new token of a request, or its end."""

    request: int
    """Its place among the requests, from 0."""
    token: int | None
    """None where a stop token ended the answer."""
    finish: Literal["stop", "length"] | None
    """Set on the last piece of a request."""


@dataclass(eq=False)
class _Running:
    number: int
    request: Request
    made: int = 0

    def piece(self, token: int) -> Piece:
        self.made += 1
        if token in self.request.stop:
            return Piece(self.number, None, "stop")
        return Piece(self.number, token, "length" if self.made == self.request.max_tokens else None)


@dataclass
class Drafts:
    """How often a token that was guessed could have been used, those before it being right, and was right itself."""

    proposed: int = 0
    accepted: int = 0


def serve(engine: Engine, requests: Iterable[Request], drafts: Drafts | None = None) -> Iterator[Piece]:
    """Answer `requests`; pieces of different requests come interleaved, those of one in order.

    A request is taken from the iterable when a slot is free for it. `drafts` counts those of a `DraftingEngine`.
    Raises ValueError for one the engine cannot hold.
    """
    waiting = enumerate(requests)
    slots = engine.empty()
    running: list[_Running | None] = [None] * engine.slots
    unread: deque[tuple[jax.Array, list[_Running | None]]] = deque()  # tokens on the device, and whose they are
    more = True
    while True:
        for slot in range(engine.slots):
            if running[slot] is None and more:
                entry = next(waiting, None)
                if more := entry is not None:
                    number, request = entry
                    sampling, stop = request.sampling, request.stop
                    prefix = engine.prefill(request.prompt, max_tokens=request.max_tokens, sampling=sampling, stop=stop)
                    slots = engine.insert(slots, prefix, slot)
                    running[slot] = _Running(number, request)
                    unread.append((prefix.token, [running[slot]]))
        if any(running):
            slots, step = engine.generate(slots)
            unread.append((step.token, list(running)))
        elif not unread:
            return
        while len(unread) > (1 if any(running) else 0):
            yield from _read(*unread.popleft(), running, drafts or Drafts())


def _read(tokens: jax.Array, owners: list[_Running | None], running: list[_Running | None], drafts: Drafts) -> Iterator[Piece]:
    """The pieces of one step; slots of requests that ended become free. tokens: int32 [B], or [B, 1 + K], all but the first drafts."""
    for made, owner in zip(np.asarray(tokens).reshape(len(owners), -1).tolist(), owners, strict=True):
        if owner is None or owner not in running:  # a step dispatched before the request's end was known
            continue
        piece = owner.piece(made[0])
        for drafted in made[1:]:
            if piece.finish is not None:
                break
            drafts.proposed += 1
            if drafted < 0:
                break
            drafts.accepted += 1
            yield piece
            piece = owner.piece(drafted)
        if piece.finish is not None:
            running[running.index(owner)] = None
        yield piece
