"""What a secret looks like, and text without it. Standard library only; every message the launcher prints passes through."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from typing import Final

REMOVED: Final = "[removed]"

SECRET_NAME: Final = re.compile(
    r"(^|_)(TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH)($|_)", re.IGNORECASE
)
"""Names of variables whose value is a secret."""

_KNOWN: Final = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{16,}"
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abposr]-[A-Za-z0-9-]{10,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)
"""Forms that only secrets have: private keys, tokens of known issuers, signed web tokens, passwords in URLs."""

_WORD: Final = re.compile(r"[A-Za-z0-9+/_=-]{24,}")
_HEX: Final = re.compile(r"[0-9a-fA-F]+")
_FINGERPRINT: Final = re.compile(r"(HASH|DIGEST|SHA|COMMIT|REVISION|UUID|FINGERPRINT)", re.IGNORECASE)


@cache
def _known() -> re.Pattern[str]:
    """Compiled on first use: it takes longer than all of `nnxlaunch --help` but the imports."""
    return re.compile(_KNOWN)


def redact(text: str) -> str:
    """`text` with everything that has the form of a secret removed."""
    return _known().sub(REMOVED, text)


def has_secret_form(value: str) -> bool:
    """Whether `value` contains something only a secret looks like."""
    return _known().search(value) is not None


def looks_random(name: str, value: str) -> bool:
    """Whether the value of variable `name` is one long random word, as keys and tokens are.

    24 characters or more out of a key's alphabet, with upper and lower case and digits and at least 3.5 bits a
    character; or 32 hex digits or more, unless the name says that it is a fingerprint.
    """
    if not _WORD.fullmatch(value) or _FINGERPRINT.search(name):
        return False
    if _HEX.fullmatch(value):
        return len(value) >= 32 and _bits_per_character(value) >= 3.0
    kinds = (any(c.islower() for c in value), any(c.isupper() for c in value), any(c.isdigit() for c in value))
    return all(kinds) and _bits_per_character(value) >= 3.5


def _bits_per_character(value: str) -> float:
    """Shannon entropy of the characters of `value`."""
    total = len(value)
    return -sum(count / total * math.log2(count / total) for count in Counter(value).values())
