"""What has to be measured on a CUDA card, in one command of less than eight minutes.

    make gpu                                                   # ARGS="--out FOLDER" and so on
    PYTHONPATH=. python3 benchmarks/gpu.py --out gpu-results   # the same without .venv and network

The second needs a python3 with torch (with CUDA), scikit-learn, scipy, joblib, safetensors and
skorch; pytest for the tests, jax and optax for the comparison with JAX. Without them it says so.

Every stage is a process with a time limit of its own, and is killed and reported when it overruns.
Results are on disk before the next one begins: FOLDER/results.json, and FOLDER/table.md for
benchmarks/RESULTS.md. The most telling stages come first:

tests            the tests marked `gpu`, and those of the stand-in for a card on the card itself
steps            a meta-step of W1, W3 (conv4), W2, W1_s5 and W4 in the library's variants, and of a
                 plain loop over tasks; gradients are checked in float64 before anything is timed
jax              the same in JAX, jit(vmap(grad))
precision        conv4 in TF32 and bfloat16: times and errors of the gradient
models           whole fits of the default model, on the card and on the CPU
omniglot-5w1s    60,000 updates by the protocol of Finn et al. (2017), or as many as the time allows
inductor         the recorded steps, built by torch's compiler
omniglot-20w1s   20-way, as far as the time goes

`--stages omniglot-5w1s --budget 420` gives one stage all the time. `--dry-run` goes the same way in
tiny sizes on the CPU, as `tests/test_gpu_benchmark.py` does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_report import table

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "numpy", "scipy", "sklearn", "joblib", "safetensors", "skorch", "threadpoolctl")
REPORTED = ("torch", "numpy", "scikit-learn", "skorch", "jax", "triton")
# before a stage is killed it is to end by itself
MARGIN = 4.0
# of the limits in a dry run, which is for busy machines too
PATIENCE = 10.0
NO_CARD = "torch sees no CUDA device"


@dataclasses.dataclass(frozen=True)
class Stage:
    """`seconds` are its limit; those of an elastic one, what is kept for it, at least."""

    seconds: float
    elastic: bool = False
    needs: tuple[str, ...] = ()


STAGES = {
    "tests": Stage(90, needs=("pytest",)),
    "steps": Stage(90),
    "jax": Stage(55, needs=("jax", "optax")),
    "precision": Stage(25),
    "models": Stage(60),
    "omniglot-5w1s": Stage(170, elastic=True),
    "inductor": Stage(35),
    "omniglot-20w1s": Stage(45, elastic=True),
}


@dataclasses.dataclass
class StageReport:
    """How a stage went."""

    status: str  # "done", "cut", "failed", "skipped"
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    log: str = ""  # its last lines, if it was not done


@dataclasses.dataclass
class Machine:
    device: str
    python: str
    versions: dict[str, str]
    driver: str = ""
    kind: str = "machine"


@dataclasses.dataclass
class TestsResult:
    passed: int
    failed: int
    skipped: int
    failures: list[str]
    kind: str = "tests"


# -- in the process of a stage ---------------------------------------------------------------------


def tests_stage(context: Any, out: Path) -> None:
    """Run the tests marked `gpu` and, on a card, those of a second device.

    Files without any are not read, nor what only they import.
    """
    on_card = context.device.startswith("cuda")
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    # others' plugins warn, which is an error
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if on_card:
        files.append(str(ROOT / "tests" / "test_second_device.py"))
        command += ["-n", "6"] if importlib.util.find_spec("xdist") else []
    else:
        command += ["-m", "gpu"]
    report = out / "tests.xml"
    env = {**os.environ, **({"SKLEARN_MAML_TEST_DEVICE": "cuda"} if on_card else {})}
    try:
        subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, env=env, check=False)
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    finally:
        report.unlink(missing_ok=True)
    n, skipped = (int(suite.get(name, 0)) for name in ("tests", "skipped"))
    failures = [
        f"{case.get('name')}: {problem.get('message', '').splitlines()[:1]}"
        for case in suite.iter("testcase")
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    passed = n - skipped - len(failures)
    context.emit(TestsResult(passed, len(failures), skipped, failures))
    if failures:
        sys.exit(f"{len(failures)} of {n} tests failed")


def describe(device: str) -> Machine:
    import torch

    name, driver = platform.machine(), ""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            sys.exit(NO_CARD)
        if ":" in device:
            torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.check_output(query, text=True).splitlines()[0]
    versions = {}
    for package in REPORTED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Machine(name, platform.python_version(), versions, driver)


def run_stage(name: str, out: Path, device: str, seconds: float, dry_run: bool) -> None:
    """Run a stage in this process; its results are lines of a file."""
    ends_at = time.monotonic() + seconds - MARGIN
    with (out / f"{name}.jsonl").open("a", encoding="utf-8") as file:

        def emit(result: Any) -> None:
            file.write(json.dumps(finite(dataclasses.asdict(result))) + "\n")
            file.flush()

        emit(describe(device))
        # not before: torch is imported, and there may be none
        from gpu_steps import Context, inductor_stage, precision_stage, steps_stage

        context = Context(device, dry_run, ends_at, emit)
        if name == "tests":
            tests_stage(context, out)
        elif name == "jax":
            from gpu_jax import jax_stage

            jax_stage(context)
        elif name == "models":
            from gpu_models import models_stage

            models_stage(context)
        elif name.startswith("omniglot"):
            from gpu_omniglot import omniglot_stage

            omniglot_stage(context, ways=5 if "5w" in name else 20)
        else:
            stages: dict[str, Callable[[Context], None]] = {
                "steps": steps_stage,
                "precision": precision_stage,
                "inductor": inductor_stage,
            }
            stages[name](context)


def finite(value: Any) -> Any:
    """Numbers that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


# -- the process that starts them ------------------------------------------------------------------


def supervise(name: str, args: argparse.Namespace, limit: float) -> StageReport:
    """Run a stage in a process of its own, and kill it when its time is over."""
    lines, log = (args.out / f"{name}.{kind}" for kind in ("jsonl", "log"))
    command = [
        *(sys.executable, __file__, "--run", name, "--out", str(args.out)),
        *("--device", args.device, "--seconds", str(limit)),
        *(["--dry-run"] if args.dry_run else []),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    report = StageReport("done", limit=limit)
    lines.unlink(missing_ok=True)  # of a run that was killed
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            if process.wait(limit) != 0:
                report.status, report.reason = "failed", f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            report.status, report.reason = "cut", f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    report.seconds = round(time.monotonic() - start, 1)
    if lines.exists():
        for line in lines.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line, where it was cut
                report.results.append(json.loads(line))
        lines.unlink()
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    log.unlink()
    if report.status != "done":
        report.log = "\n".join(said[-60:])
        if report.status == "failed" and said:
            report.reason += f": {said[-1]}"
    return report


def missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def write(out: Path, results: dict[str, Any]) -> None:
    """Write both files, each in one go."""
    contents = {"results.json": json.dumps(results, indent=1), "table.md": table(results)}
    for name, content in contents.items():
        part = out / f"{name}.part"
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(out / name)


def limit_of(name: str, args: argparse.Namespace, left: float) -> float:
    """Seconds of a stage: an elastic one takes what the later ones do not need."""
    given = dict(item.split("=") for item in args.limit)
    if name in given:
        return min(float(given[name]), left)
    factor = PATIENCE if args.dry_run else 1.0
    later = args.stages[args.stages.index(name) + 1 :]
    limit = factor * STAGES[name].seconds
    if STAGES[name].elastic:
        limit = max(limit, left - factor * sum(STAGES[other].seconds for other in later))
    return min(limit, left)


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    budget = args.budget * (PATIENCE if args.dry_run else 1.0)
    end = time.monotonic() + budget
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "dry_run": args.dry_run,
        "device": args.device,
        "stages": {},
    }
    for name in args.stages:
        left = end - time.monotonic()
        lacking = missing(STAGES[name].needs)
        if lacking:
            report = StageReport("skipped", reason=f"not installed: {', '.join(lacking)}")
        elif left < MARGIN:
            report = StageReport("skipped", reason="the time of all stages is used up")
        else:
            report = supervise(name, args, limit_of(name, args, left))
        results["stages"][name] = dataclasses.asdict(report)
        write(args.out, results)
        print(
            f"{name:16s}{report.status:9s}{report.seconds:6.1f} s of {report.limit:5.0f}   "
            f"{report.reason}",
            flush=True,
        )
        if NO_CARD in report.reason:
            sys.exit(f"{NO_CARD}; --dry-run goes the same way on the CPU")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument(
        "--budget",
        type=float,
        default=480,
        help="seconds, of all stages (ten times that in a dry run)",
    )
    parser.add_argument("--device", default=None, help="cuda, or cpu in a dry run")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="instead of its own"
    )
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    args.stages = args.stages.split(",")
    known = {*args.stages, *(item.partition("=")[0] for item in args.limit)} - STAGES.keys()
    if known:
        parser.error(f"{sorted(known)} are no stages; there are {[*STAGES]}")
    if lacking := missing(NEEDED):
        parser.error(f"{sys.executable} lacks {', '.join(lacking)}; see the head of {__file__}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.run:
        run_stage(args.run, args.out, args.device, args.seconds, args.dry_run)
        return
    # a kill by the shell's `timeout` takes the stage along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = run_all(args)
    print(f"\n{(args.out / 'table.md').read_text(encoding='utf-8')}")
    failed = [name for name, stage in results["stages"].items() if stage["status"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their last lines are in {args.out}/results.json")


if __name__ == "__main__":
    main()
