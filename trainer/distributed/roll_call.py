"""Every process names itself to process 0 before JAX starts; standard library only.

JAX accepts processes that disagree about their number, waits in silence for one that never comes, and aborts
without naming it. So process 0 first hears everyone on the coordinator's own port (which also shows that the port
is open): who is missing is said every half minute and at the deadline; a duplicate, a wrong count or another
version is refused with its name. A process of an older attempt is sent away, one of a newer attempt told to wait
until this one is gone.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from trainer.distributed.rank import Rank
from trainer.errors import PeerLost, WorldError

REPORT_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 0.5
CONNECT_SECONDS: Final = 5.0
LINE_BYTES: Final = 8192
Identity = Mapping[str, str]


def roll_call(rank: Rank, identity: Identity, *, bind_host: str, timeout_seconds: float) -> None:
    """Return when every process is there. `identity` must be equal on all (versions, spec hash).

    Raises WorldError (a duplicate, a wrong count, another identity) on every process that can hear it, PeerLost
    when someone is missing at the deadline or this process belongs to an older attempt.
    """
    deadline = time.monotonic() + timeout_seconds
    if rank.process_index == 0:
        _Host(rank, identity, deadline).hold(bind_host)
    else:
        _answer(rank, identity, deadline)


def resolve(host: str, deadline: float) -> str:
    """The first address of `host`, waiting for its DNS record: it appears only once the pod exists."""
    reported = time.monotonic()
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            now = time.monotonic()
            if now >= deadline:
                raise PeerLost(f"no address for {host}: {error.strerror}", hint="is the pod of slice 0, worker 0 scheduled?") from None
            if now - reported >= REPORT_SECONDS:
                _say(f"still no address for {host}: {error.strerror}")
                reported = now
            time.sleep(RETRY_SECONDS)


@dataclass
class _Guest:
    connection: socket.socket
    received: bytes = b""
    hello: dict[str, Any] = field(default_factory=dict[str, Any])


class _Host:
    def __init__(self, rank: Rank, identity: Identity, deadline: float) -> None:
        self.rank, self.identity, self.deadline = rank, dict(identity), deadline
        self.guests: dict[int, _Guest] = {}  # by process index
        self.selector = selectors.DefaultSelector()

    def hold(self, bind_host: str) -> None:
        with self.selector, self._listen(bind_host) as listener, contextlib.closing(self):
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)
            report_at = time.monotonic() + REPORT_SECONDS
            while len(self.guests) < self.rank.process_count - 1:
                now = time.monotonic()
                if now >= self.deadline:
                    self._refuse(PeerLost(f"{self._missing()} did not come", hint="look at the events and logs of these pods"))
                if now >= report_at:
                    _say(f"waiting for {self._missing()}")
                    report_at = now + REPORT_SECONDS
                for key, _ in self.selector.select(min(self.deadline, report_at) - now):
                    if key.data is None:
                        self._accept(listener)
                    else:
                        self._read(key.data)
            self._tell_all({"verdict": "go"})
            # They close first, so that JAX can bind the port at once.
            for guest in self.guests.values():
                guest.connection.settimeout(CONNECT_SECONDS)
                with contextlib.suppress(OSError):
                    guest.connection.recv(1)

    def close(self) -> None:
        """Every connection, whoever is at its other end."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.data, _Guest):
                key.data.connection.close()

    def _listen(self, bind_host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
        while True:
            try:
                return socket.create_server((bind_host, self.rank.coordinator_port), family=family, backlog=4096)
            except OSError as error:
                if time.monotonic() >= self.deadline:
                    raise PeerLost(f"cannot listen on {bind_host}:{self.rank.coordinator_port}: {error.strerror}") from None
                _say(f"{bind_host}:{self.rank.coordinator_port}: {error.strerror}; trying again")
                time.sleep(RETRY_SECONDS * 10)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, _Guest(connection))

    def _read(self, guest: _Guest) -> None:
        try:
            chunk = guest.connection.recv(LINE_BYTES)
        except OSError:
            chunk = b""
        guest.received += chunk
        line, end, _ = guest.received.partition(b"\n")
        if not chunk or len(guest.received) > LINE_BYTES:
            self._drop(guest)
        elif end and not guest.hello:
            self._hear(guest, line)

    def _hear(self, guest: _Guest, line: bytes) -> None:
        try:
            hello = json.loads(line)
            index, count, attempt, pod = int(hello["process"]), int(hello["count"]), int(hello["attempt"]), str(hello["pod"])
            identity = dict(hello["identity"])
        except (ValueError, KeyError, TypeError):
            self._drop(guest)  # not one of us
            return
        if attempt != self.rank.attempt:
            _send(guest.connection, {"verdict": "other attempt", "attempt": self.rank.attempt})
            self._drop(guest)
            return
        guest.hello = hello
        who = f"process {index}{f' (pod {pod})' if pod else ''}"
        problem = ""
        if count != self.rank.process_count:
            problem = f"{who} counts {count} processes, process 0 counts {self.rank.process_count}"
        elif not 0 < index < count:
            problem = f"{who} cannot be: process 0 is {self.rank.pod or 'here'} and there are {count} in all"
        elif index in self.guests:
            problem = f"process {index} is there twice: pods {self.guests[index].hello['pod'] or '?'} and {pod or '?'}"
        elif different := sorted(key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key)):
            problem = f"{who} differs from process 0: " + ", ".join(
                f"{key} {identity.get(key, 'absent')} instead of {self.identity.get(key, 'absent')}" for key in different
            )
        if problem:
            _send(guest.connection, {"verdict": "refused", "message": problem})
            self._refuse(WorldError(problem, hint="every process must run the same image with the same job spec"))
        self.guests[index] = guest

    def _refuse(self, error: PeerLost | WorldError) -> None:
        self._tell_all({"verdict": "lost" if isinstance(error, PeerLost) else "refused", "message": str(error)})
        raise error

    def _tell_all(self, verdict: dict[str, Any]) -> None:
        for guest in self.guests.values():
            _send(guest.connection, verdict)

    def _drop(self, guest: _Guest) -> None:
        self.selector.unregister(guest.connection)
        guest.connection.close()
        for index, present in list(self.guests.items()):
            if present is guest:
                del self.guests[index]

    def _missing(self) -> str:
        hosts = self.rank.hosts_per_slice
        missing = [index for index in range(1, self.rank.process_count) if index not in self.guests]
        names = [f"process {index} (slice {index // hosts}, worker {index % hosts})" for index in missing[:8]]
        return ", ".join(names) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")


def _answer(rank: Rank, identity: Identity, deadline: float) -> None:
    address = (resolve(rank.coordinator_host, deadline), rank.coordinator_port)
    where = f"process 0 at {rank.coordinator_host}:{rank.coordinator_port}"
    hello = {
        "process": rank.process_index, "count": rank.process_count, "attempt": rank.attempt, "pod": rank.pod, "identity": dict(identity),
    }  # fmt: skip
    reported, trouble = time.monotonic(), "no answer"
    while (now := time.monotonic()) < deadline:
        try:
            with socket.create_connection(address, timeout=CONNECT_SECONDS) as connection:
                _send(connection, hello)
                verdict = _verdict(connection, deadline)
        except OSError as error:
            trouble, verdict = error.strerror or str(error), {}
        match verdict:
            case {"verdict": "go"}:
                return
            case {"verdict": "refused", "message": str(message)}:
                raise WorldError(message, hint="every process must run the same image with the same job spec")
            case {"verdict": "lost", "message": str(message)}:
                raise PeerLost(message)
            case {"verdict": "other attempt", "attempt": int(attempt)} if attempt > rank.attempt:
                raise PeerLost(f"{rank} is of attempt {rank.attempt}, process 0 is of attempt {attempt} already")
            case {"verdict": "other attempt"}:
                trouble = "process 0 of the attempt before is still there"
            case _:
                pass
        if now - reported >= REPORT_SECONDS:
            _say(f"waiting for {where}: {trouble}")
            reported = now
        time.sleep(RETRY_SECONDS)
    raise PeerLost(f"{where}: {trouble}", hint="does the pod of slice 0, worker 0 run, and is this port open between the pods?")


def _verdict(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """The answer, an empty dict when the other side went away without one."""
    connection.settimeout(max(deadline - time.monotonic(), 0.1) + CONNECT_SECONDS)  # process 0 keeps the time
    received = b""
    while b"\n" not in received:
        chunk = connection.recv(LINE_BYTES)
        if not chunk or len(received) > LINE_BYTES:
            return {}
        received += chunk
    try:
        answer = json.loads(received)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it is gone; the reader of its silence decides


def _say(text: str) -> None:
    print(f"roll-call: {text}", file=sys.stderr, flush=True)
