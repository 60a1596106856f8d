"""Classes that are defined in a notebook, or a script, are known to its process alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

MODULE = """
import numpy as np
import torch
from sklearn.model_selection import GroupKFold, cross_val_score, cross_validate
from torch import nn
from sklearn_maml import FewShotRegressor, MAMLRegressor, adapt_predict
from sklearn_maml.datasets import make_sinusoid_tasks


class Net(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.into, self.out = nn.Linear(in_features, 8), nn.Linear(8, out_features)

    def forward(self, x):
        return self.out(torch.tanh(self.into(x)))


X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
kwargs = {"module": Net, "max_iter": 5, "random_state": 0}
reg = MAMLRegressor(**kwargs).fit(X, y, groups=task)
"""

PROCESSES = """
def in_partitions(n_jobs):
    return adapt_predict(
        reg, X, y, X, groups_support=task, groups_query=task, n_jobs=n_jobs, tasks_per_partition=10
    )

assert (in_partitions(2) == in_partitions(1)).all()

few = FewShotRegressor(reg)
scores = [cross_val_score(few, X[:20], y[:20], cv=2, n_jobs=n) for n in (1, 2)]
assert (scores[0] == scores[1]).all()

rows = np.column_stack([task, X])
found = cross_validate(
    MAMLRegressor(task_column=0, **kwargs), rows, y, groups=task, cv=GroupKFold(2), n_jobs=2,
    return_estimator=True, error_score="raise",
)
assert [type(e.module_) for e in found["estimator"]] == [Net, Net]
found["estimator"][0].adapt(rows[:10], y[:10]).predict(rows[:10])
"""

ELSEWHERE = """
import pickle
import sys
import numpy as np

with open(sys.argv[1], "rb") as file:
    reg, (X, y), before, adapted = pickle.load(file)
assert np.array_equal(reg.predict(X), before)
assert np.array_equal(reg.adapt(X[5:], y[5:]).predict(X), adapted)
assert list(reg.net_.module_.parameters())[0] is list(reg._learner.parameters())[0]
n_before = reg.n_iter_
assert reg.set_params(warm_start=True, max_iter=3).fit(np.tile(X, (9, 1)), np.tile(y, 9),
    groups=np.repeat(np.arange(9), 10)).n_iter_ > n_before
"""


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_module_class_of_main_goes_to_other_processes():
    run("-c", MODULE + PROCESSES)


def test_a_model_with_a_module_class_of_main_is_whole_in_another_process(tmp_path):
    dump = """
    import sys
    try:
        import cloudpickle
    except ImportError:  # joblib brings its own, or asks for it
        from joblib.externals import cloudpickle

    reg.adapt(X[:5], y[:5])
    before = reg.predict(X[:10])
    adapted = MAMLRegressor(**kwargs).fit(X, y, groups=task).adapt(X[5:10], y[5:10]).predict(X[:10])
    with open(sys.argv[1], "wb") as file:
        cloudpickle.dump((reg, (X[:10], y[:10]), before, adapted), file)
    """
    path = str(tmp_path / "model.pickle")
    run("-c", MODULE + textwrap.dedent(dump), path)
    run("-c", ELSEWHERE, path)


CELLS = [
    MODULE,
    "MAMLRegressor(max_iter=20, random_state=0, verbose=1).fit(X, y, groups=task)",
    PROCESSES,
    "reg",
]


@pytest.mark.integration
def test_an_executed_notebook():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    _, fit, _, shown = (cell.outputs for cell in notebook.cells)
    printed = "".join(output.text for output in fit if output.output_type == "stream")
    # a table, without the bar, of which every state would stay
    assert "valid_loss" in printed.splitlines()[0]
    assert "%|" not in printed
    assert "MAMLRegressor" in shown[0].data["text/html"]
