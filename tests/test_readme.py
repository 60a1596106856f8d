"""The README's example is what a new user runs first."""

import re
from pathlib import Path

import numpy as np
import sklearn

README = Path(__file__).parents[1] / "README.md"


def test_first_example_runs_and_adapting_helps():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]
    assert len(code.strip().splitlines()) <= 12
    names = {}
    with sklearn.config_context():  # the example switches metadata routing on
        exec(compile(code, str(README), "exec"), names)
    y, new, prediction = names["y"], names["new"], names["prediction"]
    error = np.sqrt(np.mean((prediction - y[new][10:]) ** 2))
    constant = np.sqrt(np.mean((y[new][:10].mean() - y[new][10:]) ** 2))
    assert error < 0.5 * constant
