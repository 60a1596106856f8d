"""Fixtures of more than one file."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def impatient_threads():
    """Make threads take turns often, so that what they share is seen in all states."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
