"""The parent's loop: start the child, pass signals on, copy its output, and end as it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, Final, NoReturn

from trainer.contract import FREE_EXIT_CODES, GRACE_SECONDS, SURVIVOR_WAIT_SECONDS, Exit
from trainer.parent.allocator import memory_kept
from trainer.parent.evidence import CRASH, container_memory_kills, crash_stem, redact, write_bundle, write_termination_message
from trainer.parent.link import STACKS_SIGNAL, VARIABLE, bytes_of
from trainer.parent.output import Output
from trainer.parent.uploads import Uploads
from trainer.parent.verdict import Ending, Killed, Verdict, verdict

TEARDOWN_SECONDS: Final = 90
"""From the announced exit code to the end of the child: a meeting of all processes, with a limit of 60 s, lies between."""
STACKS_SECONDS: Final = 0.5
CHATTER: Final = re.compile(rb"^\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number[^\n]*\n", re.MULTILINE)
"""What Gloo prints for every group of devices and cannot be told not to: dozens of lines that say nothing."""
EXPLAINED_EXIT_CODES: Final = (2, Exit.CONFIG)
"""Wrong usage, or a config, data or checkpoint that cannot be used: what is wrong has been said, and no evidence adds to it."""
UPLOAD_SECONDS: Final = 30.0
"""For the end of what goes to gs://, within the grace of a preempted host."""
UPLOAD_SECONDS_OF_CAUSE: Final = SURVIVOR_WAIT_SECONDS / 2
"""Where others wait for this process to be seen first."""


def main(arguments: Sequence[str], early_signals: Sequence[int] = ()) -> NoReturn:
    """Train under a parent; `arguments` are the worker's."""
    leave(Parent([sys.executable, "-m", "trainer.worker", *arguments]).run(early_signals))


def leave(code: int) -> NoReturn:
    """End without Python's shutdown, which takes the handlers away first: a SIGTERM then would replace the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads there any more
            stream.flush()
    os._exit(code)


class Parent:
    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.started = time.monotonic()
        self.requests = 0  # how often we were asked to leave
        self.asked_at = 0.0
        self.grace = float(os.environ.get(GRACE_SECONDS) or "inf")
        self.pid = 0
        self.leash = -1
        self.status: int | None = None
        self.killed: Killed = ""
        self.phase = "startup"
        self.step: int | None = None
        self.processes = 1
        self.announced: int | None = None
        self.announced_at = 0.0
        self.message = ""
        self.output = Output()
        self.uploads: Uploads | None = None  # where the run directory is on gs://
        self.log = ""  # this process's file there, without suffix
        self.selector = selectors.DefaultSelector()
        self.link_rest = b""

    def run(self, early_signals: Sequence[int] = ()) -> int:
        """Returns the exit code of the whole."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.selector.register(wake_read, selectors.EVENT_READ, self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked())
        kills = container_memory_kills()
        stacks = _stacks_file()
        process = self._start(stacks)
        for _ in early_signals:
            self._asked()
        while self.status is None:
            self._turn()
            self._reap()
            self._enforce()
        process.returncode = self.status  # we reaped it ourselves
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started and left behind
        self._drain()
        outcome = verdict(
            Ending(
                status=self.status,
                announced=self.announced,
                message=self.message,
                phase=self.phase,
                processes=self.processes,
                asked=self.requests > 0,
                killed=self.killed,
                tail=self.output.tail(),
                out_of_memory=container_memory_kills() > kills,
            )
        )
        if outcome.code != 0:
            self._keep_evidence(outcome, stacks)
        if self.uploads:
            self.uploads.finish()
        if outcome.survivor:
            self._let_the_cause_be_seen_first()
        if self.uploads:
            self._let_uploads_end(self.uploads, outcome.code)
        self.output.close()
        return outcome.code

    def _start(self, stacks: BufferedRandom) -> subprocess.Popen[bytes]:
        link_read, link_write = os.pipe()
        leash_read, leash_write = os.pipe()  # its write end lives as long as we do, in no other process
        os.set_blocking(link_read, False)
        ends = (link_write, leash_read, stacks.fileno())
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=ends,
            env={**os.environ, **memory_kept(os.environ), VARIABLE: ",".join(map(str, (*ends, os.getpid())))},
            process_group=0,  # so that a Ctrl-C reaches it once, through us
        )
        self.pid = process.pid
        os.close(link_write)
        os.close(leash_read)
        self.leash = leash_write
        assert process.stdout and process.stderr
        for stream, target in ((process.stdout, 1), (process.stderr, 2)):
            os.set_blocking(stream.fileno(), False)
            self.selector.register(stream, selectors.EVENT_READ, lambda fd, target=target: self._copy(fd, target))
        self.selector.register(link_read, selectors.EVENT_READ, self._listen)
        return process

    def _asked(self) -> None:
        """Runs inside the signal handler, so it also interrupts a write to a reader that is not reading."""
        self.requests += 1
        self.asked_at = self.asked_at or time.monotonic()
        if self.pid and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _enforce(self) -> None:
        """Kill the child when there is nothing to wait for any more."""
        now = time.monotonic()
        if self.status is not None or self.killed:
            return
        if self.announced is not None:
            if now >= self.announced_at + TEARDOWN_SECONDS or self.requests > 1 or self._grace_over(now):
                self._kill("teardown")
        elif self.requests and self.phase == "startup":
            self._read_link()
            if self.phase == "startup" and self.announced is None:
                self._kill("nothing unsaved")
        elif self.requests > 1:
            self._kill("second signal")
        elif self._grace_over(now):
            self._have_stacks_written()
            self._kill("grace expired")

    def _have_stacks_written(self) -> None:
        os.kill(self.pid, STACKS_SIGNAL)
        end = time.monotonic() + STACKS_SECONDS
        while self.status is None and (left := end - time.monotonic()) > 0:
            self._turn(left)
            self._reap()

    def _grace_over(self, now: float) -> bool:
        return bool(self.requests) and now >= self._grace_end()

    def _grace_end(self) -> float:
        # Whoever set the grace kills us at its end; before that, we need a moment for the evidence.
        return self.asked_at + self.grace - min(2.0, 0.2 * self.grace)

    def _kill(self, why: Killed) -> None:
        self.killed = why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _turn(self, timeout: float | None = None) -> None:
        if timeout is None and not self.killed:
            deadlines = [self._grace_end()] if self.requests else []
            deadlines += [self.announced_at + TEARDOWN_SECONDS] if self.announced is not None else []
            finite = [deadline for deadline in deadlines if deadline != float("inf")]
            timeout = max(0.0, min(finite) - time.monotonic()) if finite else None
        for key, _ in self.selector.select(timeout):
            key.data(key.fd)

    def _wake(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 4096)

    def _copy(self, descriptor: int, target: int) -> bool:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        if not chunk:
            self.selector.unregister(descriptor)
            return False
        if chunk := CHATTER.sub(b"", chunk):
            self.output.write(chunk, target)
        return True

    def _read_link(self) -> None:
        for key in list(self.selector.get_map().values()):
            if key.data == self._listen:
                self._listen(key.fd)

    def _listen(self, descriptor: int) -> bool:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        if not chunk:
            self.selector.unregister(descriptor)
            return False
        *lines, self.link_rest = (self.link_rest + chunk).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))
        return True

    def _hear(self, facts: dict[str, Any]) -> None:
        self.phase = facts.get("phase", self.phase)
        self.step = facts.get("step", self.step)
        self.processes = facts.get("processes", self.processes)
        if "log_file" in facts:
            self.output.keep_in(Path(facts["log_file"]))
        if "uploads" in facts and not self.uploads:
            self.uploads = uploads = Uploads(facts["uploads"], self.selector)
            self.log = log = facts["log"]
            self.output.send_to(lambda chunk: uploads.append(log, ".log", chunk))
        if "append" in facts and self.uploads:
            stem, suffix = facts["append"]
            self.uploads.append(stem, suffix, bytes_of(facts["data"]))
        if "exit_code" in facts:
            self.announced, self.announced_at = int(facts["exit_code"]), time.monotonic()
            self.message = str(facts.get("message", ""))

    def _reap(self) -> None:
        """Collect every ended process: as PID 1 we also inherit the orphans of others."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif self.uploads:
                self.uploads.reaped(pid, status)

    def _drain(self) -> None:
        for key in list(self.selector.get_map().values()):
            if key.data != self._wake:
                while key.data(key.fd):
                    pass

    def _keep_evidence(self, outcome: Verdict, stacks: BufferedRandom) -> None:
        stacks.seek(0)
        text = stacks.read().decode(errors="replace")
        tail = self.output.tail()
        cause = next(iter(outcome.cause.splitlines()), "")
        line = f"exit code {outcome.code}" + (f": {cause}" if cause not in tail else "")
        evidence: Path | str | None = None
        if outcome.code not in (*FREE_EXIT_CODES, *EXPLAINED_EXIT_CODES):
            facts = {
                "exit_code": outcome.code,
                "cause": redact(outcome.cause, os.environ),
                "child_status": self.status,
                "phase": self.phase,
                "step": self.step,
                "seconds": round(time.monotonic() - self.started, 3),
                "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            evidence = write_bundle(self.output.path, facts, tail=tail, stacks=text, environment=os.environ)
            if self.uploads and evidence:
                stem = crash_stem(self.log, outcome.code)
                self.uploads.append(stem, CRASH, evidence.read_bytes())
                evidence = f"{self.uploads.directory}/{stem}-*{CRASH}"
        if text and not (outcome.survivor and evidence):  # where another process is the cause, they only hide it
            self.output.write(text.encode(), 2)
        self.output.write(f"{line}{f' (evidence: {evidence})' if evidence else ''}\n".encode(), 2)
        write_termination_message(outcome.cause, os.environ)

    def _let_the_cause_be_seen_first(self) -> None:
        # Measured: with no wait the failure policy often judges by a survivor, with 10 s never.
        deadline = time.monotonic() + SURVIVOR_WAIT_SECONDS
        while not self.requests and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
            self._reap()

    def _let_uploads_end(self, uploads: Uploads, code: int) -> None:
        deadline = time.monotonic() + (UPLOAD_SECONDS if code in (Exit.DONE, *FREE_EXIT_CODES) else UPLOAD_SECONDS_OF_CAUSE)
        while not uploads.ended and self.requests < 2:
            left = min(deadline, self._grace_end() if self.requests else deadline) - time.monotonic()
            if left <= 0:
                break
            self._turn(left)
            self._reap()
        uploads.kill()


def _stacks_file() -> BufferedRandom:
    """A file without a name for the stacks of the child's threads; in memory where nothing is writable."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        if sys.platform != "linux":
            raise
        return open(os.memfd_create("stacks"), "w+b")
