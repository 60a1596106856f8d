"""The demo runs, prints its tables and saves its figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")
DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.mark.skipif(not DEMO.exists(), reason="examples are not installed")
def test_demo_prints_its_tables_and_saves_its_figure(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    figure = tmp_path / "folder" / "demo.png"

    with matplotlib.rc_context():
        demo.main(["--fast", "--output", str(figure)])

    assert figure.stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Characters"))
    error, accuracy = (
        {line[:34].strip(): float(line[34:].split()[0]) for line in part if " ± " in line[40:50]}
        for part in (lines[:start], lines[start:])
    )
    assert len(error) == 8
    assert len(accuracy) == 6
    # adaptation helps on tasks never seen, already after a tenth of the meta-training
    assert error["MAMLRegressor()"] < 0.5 * error["MAMLRegressor() before adaptation"]
    assert error["MAMLRegressor()"] < error["ridge on the K rows"]
    assert error["MAML, gradient steps alone"] < error["MAMLRegressor() before adaptation"]
    # the one model that is drawn, scored and told of
    assert sum("held-out videos choose: gaussian-head" in line for line in lines) == 1
    steps, closed = accuracy["MAML, gradient steps, after it"], accuracy["MAMLClassifier()"]
    assert closed > steps > accuracy["nearest neighbour, pixels"] > 30
    assert sum("gaussian-head 100%: " in line for line in lines) == 1
    assert 10 < accuracy["MAML before adaptation"] < 30
    progress = [line for line in lines if " updates " in line]
    assert len(progress) == 7
    assert not any("\r" in line for line in progress)
