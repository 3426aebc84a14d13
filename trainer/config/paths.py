"""Paths in a config: folders of a file system, or gs:// addresses. No file is touched here."""

from __future__ import annotations

import re
from typing import Final

_BUCKET: Final = re.compile(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", re.ASCII)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
MAX_LENGTH: Final = 1024


def is_gcs(path: str) -> bool:
    return path.startswith("gs://")


def path_fault(path: str) -> str | None:
    """Why `path` cannot be used, or None. Refused: control characters, `..`, other schemes, a gs:// path without a bucket."""
    if not path:
        return "is empty"
    if len(path.encode(errors="surrogatepass")) > MAX_LENGTH:
        return f"has more than {MAX_LENGTH} bytes"
    if not path.isprintable():
        return "holds control characters"
    if ".." in re.split(r"[/\\]", path):
        return "holds '..'"
    if is_gcs(path):
        bucket, _, name = path.removeprefix("gs://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            return f"does not name a bucket: {bucket[:60]!r}"
        if "//" in name or name.startswith("/"):
            return "holds an empty folder name"
        return None
    if scheme := _SCHEME.match(path):
        return f"begins with {scheme.group()[:20]!r}; folders and gs:// are understood"
    return None
