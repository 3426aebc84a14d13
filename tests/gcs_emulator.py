"""A Google Cloud Storage server for tests: the JSON API that gcsfs, TensorStore and google-cloud-storage speak.

    with gcs_emulator() as gcs:
        subprocess.run(..., env={**os.environ, **gcs.environment})    # writes to gs://{gcs.bucket}/...

The server itself: tests/gcs_server.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BUCKET = "bucket"  # as in the server
SERVER = Path(__file__).with_name("gcs_server.py")


@dataclass(frozen=True)
class Gcs:
    """A running server: its bucket, its address, and the variables that send all three clients to it."""

    endpoint: str
    bucket: str
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"gs://{self.bucket}"


@contextmanager
def gcs_emulator(address: str = "127.0.0.1") -> Iterator[Gcs]:
    """Run the server in a process of its own, on `address`; it ends with the block, and by itself when this process dies."""
    process = subprocess.Popen([sys.executable, str(SERVER), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        if not endpoint:
            raise RuntimeError(f"the storage server did not start (exit code {process.wait()})")
        environment = {
            "STORAGE_EMULATOR_HOST": endpoint,  # gcsfs (so etils and fsspec) and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": endpoint,  # tensorstore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks a gRPC service that is not here
        }
        yield Gcs(endpoint=endpoint, bucket=BUCKET, environment=environment)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def _this_process_uses(gcs: Gcs) -> Iterator[None]:
    """Point the clients of this very process at the server. gcsfs and etils keep theirs for ever: forget them before and after."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment.items():
            patch.setenv(name, value)
        # Imported here: gcsfs decides at its import, by the last of the variables, which service it asks.
        from etils.epath import backend
        from gcsfs import GCSFileSystem

        def forget() -> None:
            GCSFileSystem.clear_instance_cache()
            backend.fsspec_backend._get_filesystem.cache_clear()

        forget()
        yield
        forget()


@pytest.fixture(scope="module")
def gcs() -> Iterator[Gcs]:
    """A server for the tests of one module, used by this process and by every child it starts."""
    with gcs_emulator() as server, _this_process_uses(server):
        yield server
