"""Profiler traces of chosen steps on chosen processes, for xprof or TensorBoard's profile page."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import jax

from trainer.checkpoint.storage import open_storage
from trainer.config.run import Profiler as ProfilerConfig


class Profiler:
    """Traces steps `first_step` to `last_step` into `<run>/profile/process-N`; does nothing without a config."""

    def __init__(self, config: ProfilerConfig | None, run_directory: str, process_index: int) -> None:
        self._config = config if config is not None and process_index in config.processes else None
        self._target = f"{run_directory.rstrip('/')}/profile/process-{process_index}"
        self._folder: Path | None = None  # where the running trace goes
        self._upload: threading.Thread | None = None

    def before(self, step: int) -> None:
        """Call before `step` is dispatched. A run resumed inside the range traces what is left of it."""
        config = self._config
        if config is not None and self._folder is None and config.first_step <= step <= config.last_step:
            self._folder = Path(tempfile.mkdtemp(prefix="profile-")) if self._remote else Path(self._target)
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder)

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Call after `step` is dispatched. Waits for the last traced step, so that the trace holds all of it."""
        if self._folder is not None and self._config is not None and step >= self._config.last_step:
            jax.block_until_ready(dict(metrics))
            self.close()

    def close(self) -> None:
        """End a running trace, and wait until a finished one is where it belongs."""
        if self._folder is not None:
            jax.profiler.stop_trace()
            if self._remote:
                self._upload = threading.Thread(target=_upload, args=(self._folder, self._target), name="profile-upload", daemon=True)
                self._upload.start()
            self._folder = self._config = None
        elif self._upload is not None:
            self._upload.join()

    @property
    def _remote(self) -> bool:
        return self._target.startswith("gs://")


def _upload(folder: Path, target: str) -> None:
    try:
        storage = open_storage(target)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
    except Exception as error:  # any client library's error: a lost trace must not end a training run
        print(f"warning: profile not uploaded to {target}, it is in {folder}: {error}", file=sys.stderr, flush=True)
