"""A save that cannot succeed says so at the next step, with the cause and the fix, and costs no committed step."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from google.api_core import exceptions as api
from google.auth.exceptions import TransportError

from tests.trainer.checkpoint.states import abstract, differences, mesh, state
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.storage import _Bucket, open_storage
from trainer.checkpoint.trouble import read_error, save_error
from trainer.config.run import Checkpoint
from trainer.contract import Exit
from trainer.errors import CheckpointError, PeerLost, SaveFailed
from trainer.worker import unexpected

NOBODY = 65534


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the powers of root, which no file mode stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def run() -> Iterator[Path]:
    """A run with step 10 in a folder that every user may enter."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    checkpoints = Checkpoints(Checkpoint(), str(directory))
    checkpoints.save(10, state(10, mesh(8)), {})
    checkpoints.close()
    if os.geteuid() == 0:
        for path in directory.rglob("*"):
            os.chown(path, NOBODY, NOBODY)
    yield directory
    for thread in threading.enumerate():  # a failed save ends when the last write has
        if thread.name.startswith("checkpoint "):
            thread.join()
    shutil.rmtree(directory)


def large(step: int) -> dict[str, Any]:
    return {**state(step, mesh(8)), "params": {"w": jnp.zeros(100_000)}}


def check_until_done(checkpoints: Checkpoints) -> None:
    """As the loop does, without its steps."""
    while checkpoints.in_flight:
        checkpoints.check()
        time.sleep(0.01)


def test_a_write_that_fails_surfaces_once_and_the_last_step_stays(run: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(), str(run))
    assert checkpoints.latest_step() == 10
    with files_limited_to(50_000):
        checkpoints.save(20, large(20), {})
        with pytest.raises(CheckpointError, match=r"step 20 could not be saved to .*: File too large") as raised:
            checkpoints.wait()
    assert raised.value.exit_code == Exit.CONFIG
    assert "ulimit -f" in raised.value.hint and "committed steps are untouched" in raised.value.hint
    checkpoints.check()
    assert Checkpoints(Checkpoint(), str(run)).latest_step() == 10
    checkpoints.save(30, state(30, mesh(8)), {})
    checkpoints.close()
    fresh = Checkpoints(Checkpoint(), str(run))
    assert fresh.latest_step() == 30
    assert differences(fresh.restore(10, abstract(mesh(8))), 10, mesh(8)) == []


def test_check_raises_a_failed_save_without_being_asked_to_wait(run: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(), str(run))
    with files_limited_to(50_000):
        checkpoints.save(20, large(20), {})
        with pytest.raises(CheckpointError, match="File too large"):
            check_until_done(checkpoints)


def test_a_full_commit_file_system_fails_the_save_not_the_step_before(run: Path) -> None:
    """The data fits, `meta.json` does not."""
    checkpoints = Checkpoints(Checkpoint(), str(run))
    with files_limited_to(100_000):
        checkpoints.save(20, state(20, mesh(8)), {"large": "x" * 200_000})
        with pytest.raises(CheckpointError, match="File too large"):
            checkpoints.close()
    assert committed_steps(str(run)) == [10]


def test_a_directory_that_cannot_be_written_is_refused_with_the_fix(run: Path) -> None:
    (run / "checkpoints").chmod(0o555)
    with as_nobody():
        checkpoints = Checkpoints(Checkpoint(), str(run))
        assert checkpoints.latest_step() == 10
        with pytest.raises(CheckpointError, match=r"step 20 could not be saved to .*: Permission denied") as raised:
            checkpoints.save(20, state(20, mesh(8)), {})
            checkpoints.wait()
    assert "write permission" in raised.value.hint


def test_a_directory_that_cannot_be_read_is_refused(run: Path) -> None:
    (run / "checkpoints").chmod(0)
    with as_nobody(), pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        Checkpoints(Checkpoint(), str(run)).latest_step()
    (run / "checkpoints").chmod(0o777)


def test_old_steps_that_cannot_be_deleted_do_not_fail_the_run(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints/10").chmod(0o555)
    with as_nobody():
        checkpoints = Checkpoints(Checkpoint(keep_last=1), str(run))
        checkpoints.save(20, state(20, mesh(8)), {})
        checkpoints.close()
    assert "old checkpoints of" in caplog.text and "Permission denied" in caplog.text
    assert committed_steps(str(run)) == [10, 20]
    for path in (run / "checkpoints/10", *(run / "checkpoints/10").rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IRWXU)


def test_a_save_past_its_deadline_fails_the_attempt_not_the_job(run: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(save_timeout_seconds=1), str(run))
    checkpoints.save(15, state(15, mesh(8)), {})
    checkpoints.wait()
    pipe = run / "checkpoints/20/params/ocdbt.process_0/d/pipe"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # reading it back waits for somebody who writes
    checkpoints.save(20, state(20, mesh(8)), {})
    with pytest.raises(SaveFailed, match=r"step 20 is still not committed to .* after 1 s") as raised:
        check_until_done(checkpoints)
    assert raised.value.exit_code == Exit.PEER
    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


def test_a_commit_by_somebody_else_is_not_replaced(run: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(), str(run))
    checkpoints.save(15, state(15, mesh(8)), {})
    checkpoints.wait()
    (run / "checkpoints/20").mkdir()
    (run / "checkpoints/20/commit.json").write_text("theirs")
    checkpoints.save(20, state(20, mesh(8)), {})
    with pytest.raises(CheckpointError, match="20 was committed by somebody else") as raised:
        checkpoints.wait()
    assert "two attempts share this run directory" in raised.value.hint
    assert (run / "checkpoints/20/commit.json").read_text() == "theirs"


def test_causes_are_found_under_other_exceptions() -> None:
    try:
        try:
            raise OSError(30, "Read-only file system")
        except OSError as error:
            raise ValueError("wrapped") from error
    except ValueError as error:
        found = save_error(5, "/run", error)
    assert type(found) is CheckpointError and "mount the run directory writable" in found.hint
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Error writing local file [OS error 28: ENOSPC No space left on device]")
    assert "free space" in save_error(5, "/run", tensorstore).hint
    assert type(save_error(5, "/run", ValueError("UNAVAILABLE: 503"))) is SaveFailed
    assert "TimeoutError" in str(save_error(5, "/run", TimeoutError()))
    lost = PeerLost("process 3")
    assert save_error(5, "/run", lost) is lost


def test_storage_out_of_reach_while_a_checkpoint_is_read_is_no_reason_to_end_the_job() -> None:
    unavailable = ConnectionError(errno.EIO, "503 the service is unavailable", "gs://b/run/8/commit.json")
    for error in (unavailable, TimeoutError(), ValueError("UNAVAILABLE: Error reading gs://b/run/8/params/manifest.ocdbt")):
        found = read_error("gs://b/run", error)
        assert type(found) is PeerLost and found.exit_code == 76 and "is out of reach" in str(found)
    lasting = (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"), ValueError("DATA_LOSS: bad"))
    for error in lasting:
        found = read_error("/run", error)
        assert type(found) is CheckpointError and found.exit_code == 64 and "cannot be read" in str(found)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (api.ServiceUnavailable("503"), 76),
        (api.TooManyRequests("429"), 76),
        (api.RetryError("timeout of 120 s exceeded", api.ServiceUnavailable("503")), 76),
        (TransportError("the metadata server does not answer"), 76),
        (api.BadRequest("400"), 70),
    ],
)
def test_a_bucket_that_does_not_answer_as_it_should_is_told_from_one_that_refuses(answer: Exception, code: int) -> None:
    bucket = open_storage("gs://bucket/run")
    assert isinstance(bucket, _Bucket)
    with pytest.raises(OSError) as raised, bucket._as_os_error("x"):
        raise answer
    assert unexpected(raised.value, 1)[0] == code


def test_the_values_are_not_needed_after_save_returns(run: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(), str(run))
    live = state(20, mesh(8))
    checkpoints.save(20, live, {})
    for leaf in jax.tree.leaves(live):
        leaf.delete()
    checkpoints.wait()
    assert differences(checkpoints.restore(20, abstract(mesh(8))), 20, mesh(8)) == []


class ChangedOnItsWay(BaseHTTPRequestHandler):
    """Answers every read with bytes that are not those of the checksum beside them."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.send_header("x-goog-hash", "crc32c=AAAAAA==")
        self.end_headers()
        self.wfile.write(b"bytes")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_of_a_bucket_that_is_not_what_was_sent_is_an_error_of_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), ChangedOnItsWay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OSError, match="Checksum mismatch"):
            open_storage("gs://bucket/run").read("decided.json")
        server.shutdown()
