"""The image under test. Needs a container engine; `.ci/run` brings one.

`TEST_IMAGE` names the image; where it is not set it is built.
"""

from __future__ import annotations

import os

import pytest

from launcher import image as images


@pytest.fixture(scope="session")
def image() -> str:
    named = os.environ.get("TEST_IMAGE")
    return named or str(images.build(images.find_source(), target="cpu", repository=images.DEFAULT_REPOSITORY))
