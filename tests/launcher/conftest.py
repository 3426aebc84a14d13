"""What several files of launcher tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.backend.local import LocalBackend
from launcher.backend.local_state import STATE_VARIABLE


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalBackend]:
    """The local backend, empty, for this process and for commands; its jobs end with the test."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("NNXLAUNCH_BACKEND", "local")
    backend = LocalBackend()
    yield backend
    for status in backend.list():
        backend.delete(status.name)
