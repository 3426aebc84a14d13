"""Short messages between the processes of a run, through JAX's coordination service: no device takes part."""

from __future__ import annotations

import itertools
import time
from typing import Any, Final

import jax
from jax._src import distributed  # the client has no public name

from trainer.errors import PeerLost

_instances: Final = itertools.count()
_SLICE_MILLISECONDS: Final = 500


class PeerFailed(PeerLost):
    """Another process gave up on the operation this one takes part in."""


class Peers:
    """One namespace of messages. Every process creates its instances in the same order.

    With a single process nothing is sent. Every key is used once. Waiting raises PeerFailed as soon as any
    process has called `fail` for the operation, and PeerLost when `deadline` (time.monotonic seconds) passes.
    """

    def __init__(self) -> None:
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._scope = f"nnxlaunch/checkpoint/{next(_instances)}"

    @property
    def is_primary(self) -> bool:
        return self.index == 0

    def gather(self, operation: str, value: str, *, deadline: float) -> list[str]:
        """Every process's value in process order at process 0; an empty list elsewhere."""
        if self.count == 1:
            return [value]
        self._client.key_value_set(f"{self._scope}/{operation}/{self.index}", value)
        if not self.is_primary:
            return []
        return [self._wait(operation, str(index), deadline) for index in range(self.count)]

    def broadcast(self, operation: str, value: str | None, *, deadline: float) -> str:
        """Process 0's value; the others pass None."""
        if self.count > 1:
            if not self.is_primary:
                return self._wait(operation, "all", deadline)
            assert value is not None
            self._client.key_value_set(f"{self._scope}/{operation}/all", value)
        assert value is not None
        return value

    def barrier(self, operation: str, *, deadline: float) -> None:
        self.gather(operation, "", deadline=deadline)
        self.broadcast(operation, "" if self.is_primary else None, deadline=deadline)

    def fail(self, operation: str, reason: str) -> None:
        """Tell everyone who waits in `operation`, now or later."""
        if self.count > 1:
            self._client.key_value_set(f"{self._scope}/{operation}/failed", f"process {self.index}: {reason}", allow_overwrite=True)

    def forget(self, operation: str) -> None:
        """Free the messages of an operation that every process has left; the service keeps them otherwise."""
        if self.count > 1 and operation:
            self._client.key_value_delete(f"{self._scope}/{operation}/")

    def failure(self, operation: str) -> str | None:
        """Who failed and why, where somebody has."""
        if self.count == 1:
            return None
        try:
            return str(self._client.key_value_try_get(f"{self._scope}/{operation}/failed"))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise PeerLost(f"the coordination service does not answer: {error}") from error

    def _wait(self, operation: str, key: str, deadline: float) -> str:
        while True:
            try:
                return str(self._client.blocking_key_value_get(f"{self._scope}/{operation}/{key}", _SLICE_MILLISECONDS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise PeerLost(f"the coordination service does not answer: {error}") from error
            if reason := self.failure(operation):
                raise PeerFailed(reason)
            if time.monotonic() > deadline:
                who = "process 0" if key == "all" else f"process {key}"
                raise PeerLost(f"{who} did not finish its part of {operation} in time")

    @property
    def _client(self) -> Any:
        client = distributed.global_state.client
        assert client is not None, "jax.distributed.initialize was not called"
        return client
