"""Importing the package, and a first fit, cost little beside what they need."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from sklearn_maml._startup import collection_paused

HEAVY = (
    "matplotlib",
    "polars",
    "skorch",
    "sklearn.datasets",
    "sklearn.ensemble",
    "sklearn.gaussian_process",
    "sklearn.inspection",
    "sklearn.linear_model",
    "sklearn.neighbors",
    "torch._dynamo",
    "torch._inductor",
)
STARTUP = f"""
import gc, sys, weakref
collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
import numpy as np
class Held: pass
held = Held()
held.own, garbage = held, weakref.ref(held)
del held
collections.clear()
import sklearn_maml
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert len(collections) < 20, collections
def brought():
    return [name for name in {HEAVY} if name in sys.modules]
assert not brought(), brought()
X = np.random.default_rng(0).normal(size=(12, 8, 2))
sklearn_maml.MAMLRegressor(max_iter=5, hidden_layer_sizes=(4,), steps=1).fit(X, X.sum(-1))
assert brought() == ["skorch"], brought()
assert garbage() is not None
gc.collect()
assert garbage() is None and gc.get_freeze_count() < 1000
gc.freeze()  # by somebody else
gc.collect()
assert gc.get_freeze_count() > 100_000
"""
END = """
import gc, sys
class Writes:
    def __init__(self):
        self.own, self.write = self, open(sys.argv[1], "wb", buffering=0).write
    def __del__(self):
        self.write(sys.argv[2].encode())
import sklearn_maml
if sys.argv[2] == "frozen":
    gc.freeze()  # by somebody else, on top
    gc.collect()
    assert gc.get_freeze_count() > 100_000
Writes()
"""


def test_a_start_brings_nothing_it_does_not_need_and_collects_no_garbage():
    subprocess.run([sys.executable, "-W", "error", "-c", STARTUP], check=True)


@pytest.mark.parametrize("how", ["as it is", "frozen"])
def test_what_is_garbage_when_a_process_ends_is_finalised(how, tmp_path):
    subprocess.run([sys.executable, "-c", END, tmp_path / "file", how], check=True)
    assert (tmp_path / "file").read_text() == how


def test_a_collector_that_was_off_stays_off_and_frozen_objects_stay_frozen(monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 5000)
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(ImportError), collection_paused():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert not calls
