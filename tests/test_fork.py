"""Processes that are forked after a public call can compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")

START = """
import os, sys, tempfile, time
import numpy as np
import torch
from torch import nn
import sklearn_maml
from sklearn_maml import (
    FewShotClassifier, FewShotRegressor, MAMLClassifier, MAMLRegressor, adapt, adapt_predict,
    task_scorer, task_scores,
)
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0}
rng = np.random.default_rng(0)
# more numbers than torch gives to one thread of its own accord
X, task = rng.normal(size=(8000, 5)), np.repeat(np.arange(20), 400)
y = X[:, 0] * (1 + task % 3)
labels = np.where(y > 0, "up", "down")
folder = tempfile.mkdtemp()

def saved(model):
    path = os.path.join(folder, "model.safetensors")
    model.save(path)
    return sklearn_maml.load(path)
"""

SMALL_NETWORKS = (
    START
    + """
def n_threads():
    return len(os.listdir("/proc/self/task"))

def n_left(before):
    for _ in range(500):  # one that has been joined takes a moment to be gone
        if n_threads() > before:
            time.sleep(0.01)
    return n_threads() - before

if torch.get_num_threads() < 2:
    sys.exit("torch has one thread only")
reg = MAMLRegressor(**SMALL)
clf = MAMLClassifier(**SMALL)
steps = MAMLRegressor(update_rule="sgd", **SMALL)
calls = {
    "fit of a regressor": lambda: reg.fit(X, y, groups=task),
    "fit of gradient steps": lambda: steps.fit(X, y, groups=task),
    "fit of a classifier": lambda: clf.fit(X, labels, groups=task),
    "fit of one task": lambda: MAMLRegressor(**SMALL).fit(X, y, groups=task * 0),
    "adapt": lambda: (reg.adapt(X, y), steps.adapt(X, y), clf.adapt(X, labels)),
    "predict": lambda: (reg.predict(X), steps.predict(X), clf.predict(X), clf.predict_proba(X)),
    "return_std": lambda: reg.predict(X, return_std=True),
    "score": lambda: (reg.score(X, y, groups=task), clf.score(X, labels, groups=task)),
    "adapt of a copy": lambda: adapt(reg, X, y, groups=task).predict(X, groups=task),
    "adapt_predict": lambda: adapt_predict(
        reg, X, y, X, groups_support=task, groups_query=task
    ),
    "FewShot": lambda: (FewShotRegressor(reg).fit(X, y).predict(X), FewShotRegressor().fit(X, y)),
    "FewShot of classes": lambda: FewShotClassifier(clf).fit(X, labels).predict_proba(X),
    "task_scorer": lambda: task_scorer("neg_root_mean_squared_error")(reg, X, y, groups=task),
    "task_scores": lambda: task_scores(reg, X, y, groups=task),
    "save and load": lambda: (saved(reg).predict(X), saved(steps), saved(clf)),
}
for name, call in calls.items():
    before = n_threads()
    call()
    print(name, n_left(before))
torch.from_numpy(X).exp()  # which takes threads, when nothing keeps it from it
print("torch", n_threads() - before)
"""
)

LARGE_NETWORKS = (
    START
    + """
def child_computes(work):
    child = os.fork()
    if child == 0:
        work()
        torch.from_numpy(X).exp()
        os._exit(0)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False

images = rng.normal(size=(4, 12, 1, 16, 16)).astype(np.float32)
values = images.mean((2, 3, 4))
conv = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 1))
reg = MAMLRegressor(module=conv, update_rule="sgd", alpha=1e-4, max_iter=2, random_state=0)
reg.fit(images, values)
torch.from_numpy(X).exp()
print(child_computes(lambda: reg.adapt(images[0], values[0]).predict(images[0])))
"""
)


def run(script):
    """Run a script in a process with threads, which those of the suite have not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads cannot be counted")
def test_no_public_call_on_a_small_network_leaves_threads_behind():
    started = dict(line.rsplit(" ", 1) for line in run(SMALL_NETWORKS))
    assert int(started.pop("torch")) > 0
    assert len(started) == 15
    assert started == dict.fromkeys(started, "0")


def test_children_compute_after_a_fit_of_a_large_network():
    assert run(LARGE_NETWORKS) == ["True"]


KERNELS = """
import numpy as np
from sklearn_maml import MAMLRegressor, native

used = set()
make = native.Kernel.__init__
def noted(self, *args):
    used.add(args[-1])
    make(self, *args)
native.Kernel.__init__ = noted

X = np.random.default_rng(0).normal(size=(4, 10, 3))
reg = MAMLRegressor(update_rule="sgd", max_iter=2, random_state=0).fit(X, X.sum(2))
reg.adapt(X[:2], X[:2].sum(2)).predict(X[:2])
print(used)
"""


def test_kernels_have_the_threads_of_the_caller_in_a_fit():
    # they start their own in each call, and end them
    assert run(KERNELS) == ["{2}"]
