"""Fixtures of more than one file."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

# The suite is about the CPU, whose numbers it knows; what is about a card asks for it
if os.environ.get("SKLEARN_MAML_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# torch counts devices when autograd first runs: the second device has to be there before
with contextlib.suppress(pytest.skip.Exception):
    import second_device  # noqa: F401


@pytest.fixture
def impatient_threads():
    """Make threads take turns often, so that what they share is seen in all states."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
