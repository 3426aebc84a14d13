"""How long the newest checkpoint of a run took to save, from its commit file: in a folder of this machine, or in gs://."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, Final, cast
from urllib.parse import quote

import urllib3

from trainer.contract import CHECKPOINT_FOLDER, COMMIT_FILE, SAVE_SECONDS

PATIENCE_SECONDS: Final = 4.0
"""For a bucket, from when it was first asked: a submit does not wait longer for what may not be there."""
_NEWEST: Final = 3
"""Steps that are tried: the newest may be about to be written, or to be deleted."""
_MACHINE: Final = Path("/sys/class/dmi/id/product_name")
_READ: Final = "https://www.googleapis.com/auth/devstorage.read_only"


@dataclass(frozen=True)
class Save:
    step: int
    seconds: float  # from when it was asked for until it was committed


def last_save(run_directory: str) -> Save | None:
    """Of a folder of this machine; None where there is none, or where its trainer wrote no time down."""
    if "://" in run_directory:
        return None
    folder = Path(run_directory, CHECKPOINT_FOLDER)
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return None

    def read(step: int) -> bytes | None:
        try:
            return Path(folder, str(step), COMMIT_FILE).read_bytes()
        except OSError:
            return None

    return _newest(names, read)


def asked_for_last_save(run_directory: str) -> Callable[[], Save | None]:
    """As `last_save`, of gs:// too: the bucket is read meanwhile, until the answer is wanted and at most for `PATIENCE_SECONDS`.

    None as well where it cannot be read from here: the job may have rights that its user has not.
    """
    if not run_directory.startswith("gs://"):
        return lambda: last_save(run_directory)
    found: list[Save | None] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    thread = Thread(target=lambda: found.append(_in_bucket(run_directory)), daemon=True)
    thread.start()

    def answer() -> Save | None:
        thread.join(max(0.0, deadline - time.monotonic()))
        return found[0] if found else None

    return answer


def _newest(names: Iterable[str], read: Callable[[int], bytes | None]) -> Save | None:
    steps = sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)
    for step in steps[:_NEWEST]:
        content = read(step)
        if content is not None:
            return _save(step, content)
    return None


def _save(step: int, content: bytes) -> Save | None:
    try:
        document = json.loads(content)
    except ValueError:
        return None
    seconds = cast("dict[str, Any]", document).get(SAVE_SECONDS) if isinstance(document, dict) else None
    return Save(step, float(seconds)) if isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0 else None


def _in_bucket(run_directory: str) -> Save | None:
    """Over the JSON API itself: Google's library takes longer to import than the few requests to be answered.

    Reference: https://cloud.google.com/storage/docs/json_api/v1/objects/list
    """
    bucket, _, prefix = run_directory.removeprefix("gs://").partition("/")
    root = f"{prefix.strip('/')}/{CHECKPOINT_FOLDER}/".lstrip("/")
    folders = f"?prefix={quote(root, safe='')}&delimiter=%2F&fields=prefixes,nextPageToken&pageToken="
    try:
        get = _reader(bucket)
        names: list[str] = []
        page = ""
        while True:
            listing: Any = json.loads(get(folders + quote(page, safe="")) or b"{}")
            names += [str(name).removeprefix(root).rstrip("/") for name in listing.get("prefixes", [])]
            if not (page := str(listing.get("nextPageToken", ""))):
                return _newest(names, lambda step: get(f"/{quote(f'{root}{step}/{COMMIT_FILE}', safe='')}?alt=media"))
    except (OSError, ValueError, urllib3.exceptions.HTTPError):
        return None


def _reader(bucket: str) -> Callable[[str], bytes | None]:
    """What a path below the bucket's objects holds; None where the answer is not 200. Raises OSError where nobody is logged in."""
    http: Any = urllib3.PoolManager(timeout=PATIENCE_SECONDS, retries=False)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    failures: tuple[type[Exception], ...] = ()
    if not emulator:
        failures = (import_module("google.auth.exceptions").GoogleAuthError,)
        try:
            http = import_module("google.auth.transport.urllib3").AuthorizedHttp(_credentials(), http=http)
        except failures as error:
            raise PermissionError(str(error)) from error
    base = f"{emulator or 'https://storage.googleapis.com'}/storage/v1/b/{quote(bucket, safe='')}/o"

    def get(path: str) -> bytes | None:
        try:
            answer = http.request("GET", base + path)
        except failures as error:
            raise PermissionError(str(error)) from error
        return bytes(answer.data) if answer.status == 200 else None

    return get


def _credentials() -> Any:
    """Google's application default credentials. Those of a person's login are made here: the library would run gcloud first, to learn
    of a project that reading does not need. Raises FileNotFoundError where this machine cannot have any, before looking for a metadata
    server that is not there."""
    told = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    login = Path(told or Path(os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config/gcloud", "application_default_credentials.json"))
    if login.exists():
        known = json.loads(login.read_bytes())
        if known.get("type") == "authorized_user":
            return import_module("google.oauth2.credentials").Credentials.from_authorized_user_info(known, scopes=[_READ])
    elif not told and not _MACHINE.read_text().startswith("Google"):
        raise FileNotFoundError(str(login))
    credentials, _ = import_module("google.auth").default(scopes=[_READ])
    return credentials
