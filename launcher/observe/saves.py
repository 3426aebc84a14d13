"""How long the newest checkpoint of a run took to save, from its commit file: in a folder of this machine, or in gs://."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, Final
from urllib.parse import quote

import urllib3

from launcher.observe.commits import Committed, last_commit, newest_commit
from trainer.contract import CHECKPOINT_FOLDER, COMMIT_FILE

PATIENCE_SECONDS: Final = 4.0
"""For a bucket, from when it was first asked: a submit does not wait longer for what may not be there."""
_MACHINE: Final = Path("/sys/class/dmi/id/product_name")
_READ: Final = "https://www.googleapis.com/auth/devstorage.read_only"


@dataclass(frozen=True)
class Save:
    step: int
    seconds: float  # from when it was asked for until it was committed


def last_save(run_directory: str) -> Save | None:
    """Of a folder of this machine; None where there is none, or where its trainer wrote no time down."""
    return _save(last_commit(run_directory))


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


def _save(found: Committed | None) -> Save | None:
    return None if found is None or found.save_seconds is None else Save(found.step, found.save_seconds)


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
                break
        return _save(newest_commit(names, lambda step: _undated(get(f"/{quote(f'{root}{step}/{COMMIT_FILE}', safe='')}?alt=media"))))
    except (OSError, ValueError, urllib3.exceptions.HTTPError):
        return None


def _undated(content: bytes | None) -> tuple[bytes, None] | None:
    return None if content is None else (content, None)


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
