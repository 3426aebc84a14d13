"""Fixtures of the data tests."""

from tests.gcs_emulator import gcs

__all__ = ["gcs"]
