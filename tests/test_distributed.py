"""Meta-training in two processes gives what one process gives, and all of them end alike."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from sklearn_maml.training import distributed

SCRIPT = Path(__file__).with_name("distributed_script.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes that torchrun starts end with."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(port), str(SCRIPT), str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(SCRIPT.parent.parent),
        },
    )
    assert launched.returncode == 0, launched.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import distributed_script
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return distributed_script


@pytest.fixture(scope="module")
def one_process(script):
    return script.fits()


CASES = [
    "float64",
    "search",
    "gradient",
    "early stopping",
    "one task",
    "float32",
    "warm start",
    "classifier",
    "zero head",
    "centred",
    "implicit",
    "reptile",
]


def largest_difference(a, b):
    return max(float((a["state"][name] - b["state"][name]).abs().max()) for name in a["state"])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(ranks, one_process, case):
    tolerance = 1e-6 if case == "float32" else 1e-12
    expected = one_process[case]
    for found in ranks:
        assert found[case]["n_iter"] == expected["n_iter"]
        assert largest_difference(found[case], expected) <= tolerance
        np.testing.assert_allclose(
            np.array(found[case]["losses"], dtype=float),
            np.array(expected["losses"], dtype=float),
            rtol=100 * tolerance,
        )
    assert "score" not in expected or ranks[1][case]["score"] == pytest.approx(expected["score"])


@pytest.mark.parametrize("case", [*CASES, "no seed", "interrupted", "continued", "after failure"])
def test_all_processes_end_with_the_same_bits(ranks, case):
    first, second = (found[case] for found in ranks)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["losses"] == second["losses"] or case == "interrupted"
    assert first["n_iter"] == second["n_iter"]


def test_early_stopping_stopped_early(one_process):
    assert one_process["early stopping"]["n_iter"] < 400


def test_gradients_that_are_not_averaged_are_noticed(ranks, script):
    X, y, task = script.tasks(np.float64)
    expected = script.outcome(script.regressor(max_iter=3).fit(X, y, groups=task))
    assert largest_difference(ranks[0]["after failure"], expected) <= 1e-12
    assert largest_difference(ranks[0]["not averaged"], expected) > 1e-4


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("data", "the tasks in X y and groups differ"),
        ("seed", "random state differ"),
        ("parameter", "the parameters of the estimator differ"),
        ("weights", "the initial weights of the module differ"),
    ],
)
def test_what_differs_between_the_processes_is_named_on_all_of_them(ranks, case, named):
    for found in ranks:
        assert named in found[case]
        assert "rank(s) [1]" in found[case]
        assert "given to some of the processes" in found["seed of one"]


def test_fits_in_single_process_ignore_the_group(ranks):
    first, second = (found["alone"] for found in ranks)
    assert largest_difference(first, second) > 1e-3


def test_an_interrupt_of_one_process_ends_the_fit_of_all(ranks):
    for found in ranks:
        assert found["interrupted"]["n_iter"] == 7
        assert any(found["warned"])
        assert found["continued"]["n_iter"] == 67


def test_an_error_in_one_process_ends_the_fit_of_all(ranks):
    assert ranks[1]["failed"] == "ZeroDivisionError: a broken callback"
    assert "Another process of this fit has failed" in ranks[0]["failed"]


def test_a_second_fit_in_another_thread_is_refused(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_fitting", threading.Lock())
    distributed._fitting.acquire()
    with pytest.raises(RuntimeError, match="one after another"), distributed.Processes():
        pass
