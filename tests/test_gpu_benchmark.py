"""The command for a machine with a CUDA card, on the CPU and in tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
STAGES = [
    *("tests", "steps", "jax", "precision", "models"),
    *("omniglot-5w1s", "inductor", "omniglot-20w1s"),
]

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="the benchmarks are only in the repository"
)


def run(out, *options, check=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, SCRIPT, "--out", out, *options],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def results_of(report, kind):
    """Results of a stage; of those that were written down more than once, the last."""
    found = {}
    for row in report["results"]:
        if row["kind"] == kind:
            found[
                tuple(row.get(k) for k in ("workload", "implementation", "variant", "precision"))
            ] = row
    return list(found.values())


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out"
    run(out, "--dry-run")
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "table.md"]
    return json.loads((out / "results.json").read_text()), (out / "table.md").read_text()


def test_every_stage_has_a_result(dry_run):
    stages = dry_run[0]["stages"]
    assert list(stages) == STAGES
    has_jax = all(importlib.util.find_spec(name) for name in ("jax", "optax"))
    for name, report in stages.items():
        if name == "jax" and not has_jax:
            assert (report["status"], report["reason"][:13]) == ("skipped", "not installed")
            continue
        assert report["status"] == "done", (name, report["reason"], report["log"])
        assert report["seconds"] <= report["limit"]
        # which machine, and what was found
        assert len({row["kind"] for row in report["results"]}) == 2


def test_the_tests_of_cuda_are_found(dry_run):
    (tests,) = results_of(dry_run[0]["stages"]["tests"], "tests")
    assert tests["failed"] == 0
    assert tests["passed"] + tests["skipped"] >= 9


def test_gradients_are_checked_before_anything_is_timed(dry_run):
    stages = dry_run[0]["stages"]
    rows = [row for report in stages.values() for row in results_of(report, "step")]
    timed = [row for row in rows if row["status"] == "timed"]
    assert {row["workload"] for row in timed} == {"W1", "W1_s5", "W2", "W3", "W4"}
    for row in timed:
        assert 0 < row["gradient_error"] <= row["allowed_error"], row
        assert row["ms"] > 0, row
        if row["precision"] != "bf16":
            assert row["gradient_error"] < 1e-5, row
    fits = [row for row in timed if row["variant"] == "as fit runs it" and row["workload"] != "W4"]
    assert len(fits) == 4 + 3  # and the precisions
    assert all(row["fit_ms"] > 0 for row in fits if not row["ran_as"].startswith("loop"))
    variants = {row["variant"] for row in timed if row["workload"] == "W1"}
    assert {"eager", "recorded", "CUDA graph", "inductor"} <= variants
    ran_as = {(row["workload"], row["variant"]): row["ran_as"] for row in timed}
    assert ran_as["W3", "recorded"] == "vmap, recorded"
    assert ran_as["W3", "eager vmap"] == "vmap"
    assert ran_as["W1", "inductor"] == "vmap, built"


def test_a_wrong_gradient_is_reported_and_not_timed(dry_run):
    results, table = dry_run
    rows = results_of(results["stages"]["steps"], "step")
    (planted,) = [row for row in rows if row["implementation"] == "planted"]
    assert planted["status"] == "wrong gradient"
    assert planted["gradient_error"] > 100 * planted["allowed_error"]
    assert planted["ms"] is None
    assert not [row for row in rows if row["status"] != "timed" and row is not planted]
    assert "wrong gradient, as it is meant to be" in table


def test_the_default_model_is_fitted_on_both_devices(dry_run):
    rows = dry_run[0]["stages"]["models"]["results"]
    card, cpu = [row for row in rows if row["kind"] == "model"]
    assert (card["where"], cpu["where"]) == ("card", "CPU")
    # in a dry run both are the CPU
    assert card["error"] == pytest.approx(cpu["error"])
    assert card["difference"] is None
    assert cpu["difference"] == 0
    assert min(row[name] for row in (card, cpu) for name in ("fit_seconds", "adapt_ms")) > 0


def test_omniglot_is_evaluated_both_ways(dry_run):
    for name, ways in (("omniglot-5w1s", 5), ("omniglot-20w1s", 20)):
        (row,) = results_of(dry_run[0]["stages"][name], "omniglot")
        assert row["ways"] == ways
        assert row["updates"] == row["planned"] == 5
        assert row["updates_per_second"] > 0
        for norm in ("as_published", "transductive", "inductive"):
            assert 0 < row[norm][0] < 100


def test_the_table_names_every_target(dry_run):
    table = dry_run[1]
    assert table.count("| means nothing |") + table.count("| not measured |") == 7
    assert table.startswith("**A dry run")
    for name in STAGES:
        assert f"| {name} |" in table


def test_a_stage_that_overruns_is_cut_and_the_next_one_runs(tmp_path):
    out = tmp_path / "out"
    run(out, "--dry-run", "--stages", "steps,omniglot-5w1s", "--limit", "steps=0.2")
    stages = json.loads((out / "results.json").read_text())["stages"]
    assert stages["steps"]["status"] == "cut"
    assert stages["steps"]["seconds"] < 5
    assert stages["omniglot-5w1s"]["status"] == "done"
    assert "| steps | cut |" in (out / "table.md").read_text()


def test_a_stage_that_fails_says_why_and_no_card_ends_the_run(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    out = tmp_path / "out"
    process = run(out, "--stages", "steps,precision", check=False)
    assert process.returncode == 1
    assert "torch sees no CUDA device; --dry-run" in process.stderr
    stages = json.loads((out / "results.json").read_text())["stages"]
    assert list(stages) == ["steps"]
    assert stages["steps"]["status"] == "failed"


def test_an_unknown_stage_is_refused(tmp_path):
    process = run(tmp_path / "out", "--stages", "steps,stpes", check=False)
    assert process.returncode == 2
    assert "['stpes'] are no stages" in process.stderr
