"""The backends by name, apart from their code: options are read before anyone knows whether a backend is needed."""

from __future__ import annotations

from enum import StrEnum


class BackendKind(StrEnum):
    KUBERNETES = "kubernetes"
    LOCAL = "local"
