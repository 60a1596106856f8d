"""Whole processes, from starting Python to a fitted model: ours, JAX's and learn2learn's.

    python benchmarks/whole_process.py [--cells W1:100,W1:1000] [--turns 5] [--json FILE]
    python benchmarks/whole_process.py --imports [--turns 9]

Every run is a process of its own: it imports its library, loads the same tasks from a file, draws
them in NumPy and makes its meta-updates. Runs take turns. "jax" compiles in each process; "jax
cached" is JAX with its compilation cache filled, which it uses only if asked to. Wall time
is from the start of the process to its end, CPU time that of the process and those it started.

JAX and learn2learn are left out with a message where they are not installed. `--imports` measures
what `import sklearn_maml` costs on top of torch and scikit-learn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tasks of `n_rows` rows; a classification task has its rows sorted by class."""

    n_features: int
    hidden: tuple[int, ...]
    n_outputs: int
    n_collection: int  # tasks there are
    n_rows: int
    n_tasks: int  # in a meta-batch
    n_shots: int
    n_queries: int
    steps: int
    alpha: float
    classification: bool


WORKLOADS = {
    "W1": Workload(1, (40, 40), 1, 1000, 20, 25, 10, 10, 1, 0.01, False),
    "W2": Workload(20, (64, 64), 5, 200, 100, 32, 5, 15, 5, 0.05, True),
}
# learn2learn takes minutes for the cells of many updates
CELLS = "W1:100,W1:1000,W1:20000,W2:2000"
SLOW = {"W1": 1000, "W2": 500}  # updates from which on learn2learn runs once only
Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_tasks(workload: Workload) -> dict[str, np.ndarray]:
    """X (tasks, rows, features) and y (tasks, rows)."""
    rng = np.random.default_rng(0)
    n, rows = workload.n_collection, workload.n_rows
    if workload.classification:
        classes = np.arange(workload.n_outputs).repeat(rows // workload.n_outputs)
        centres = rng.normal(size=(n, workload.n_outputs, workload.n_features))
        X = centres[:, classes] + 0.5 * rng.normal(size=(n, rows, workload.n_features))
        return {"X": X.astype(np.float32), "y": np.tile(classes, (n, 1))}
    X = rng.uniform(-5, 5, (n, rows, workload.n_features))
    amplitude, phase = rng.uniform(0.1, 5, (n, 1)), rng.uniform(0, np.pi, (n, 1))
    return {"X": X.astype(np.float32), "y": (amplitude * np.sin(X[..., 0] - phase))}


class Sampler:
    """The meta-batches of the other libraries: the draws that ours makes too."""

    def __init__(self, workload: Workload, X: np.ndarray, y: np.ndarray) -> None:
        self.workload, self.X, self.rng = workload, X, np.random.default_rng(0)
        # as our regressor does by default
        self.y = y if workload.classification else ((y - y.mean()) / y.std()).astype(np.float32)

    def __call__(self) -> Batch:
        w = self.workload
        tasks = self.rng.choice(len(self.X), w.n_tasks, replace=False)
        if not w.classification:
            rows = self.rng.random((w.n_tasks, w.n_rows)).argsort(1)
            parts = rows[:, : w.n_shots], rows[:, w.n_shots : w.n_shots + w.n_queries]
            y: Any = self.y
        else:  # rows of each class, and classes to outputs at random
            per_class = w.n_rows // w.n_outputs
            rows = self.rng.random((w.n_tasks, w.n_outputs, per_class)).argsort(2)
            rows += per_class * np.arange(w.n_outputs)[:, None]
            outputs = self.rng.random((w.n_tasks, w.n_outputs)).argsort(1)
            last = w.n_shots + w.n_queries
            cut = rows[:, :, : w.n_shots], rows[:, :, w.n_shots : last]
            parts = cut[0].reshape(w.n_tasks, -1), cut[1].reshape(w.n_tasks, -1)
            y = None
        result = []
        for part in parts:
            result.append(self.X[tasks[:, None], part])
            labels = self.y[tasks[:, None], part]
            result.append(labels if y is not None else np.take_along_axis(outputs, labels, 1))
        return result[0], result[1], result[2], result[3]


# -- the three jobs; each returns the mean query loss of the last tenth of the updates ------------


def run_ours(workload: Workload, X: np.ndarray, y: np.ndarray, updates: int) -> float:
    from sklearn_maml import MAMLClassifier, MAMLRegressor

    settings: dict[str, Any] = {
        "hidden_layer_sizes": workload.hidden,
        "update_rule": "sgd",
        "alpha": workload.alpha,
        "beta": 1e-3,
        "beta_decay": 0.0,
        "steps": workload.steps,
        "meta_batch_size": workload.n_tasks,
        "n_shots": workload.n_shots,
        "n_queries": workload.n_queries,
        "max_iter": updates,
        "early_stopping": False,
        "random_state": 0,
    }
    estimator: Any
    if workload.classification:
        estimator = MAMLClassifier(n_ways=workload.n_outputs, **settings)
    else:
        estimator = MAMLRegressor(**settings)
    estimator.fit(X, y)
    losses = estimator.history_[:, "train_loss"]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def run_jax(workload: Workload, X: np.ndarray, y: np.ndarray, updates: int) -> float:
    import jax
    import jax.numpy as jnp
    from jax_maml import jax_maml

    w, draw = workload, Sampler(workload, X, y)
    sizes = (w.n_features, *w.hidden, w.n_outputs)
    rng = np.random.default_rng(1)
    params = []
    for a, b in itertools.pairwise(sizes):
        bound = 1 / np.sqrt(a)
        shapes = ((a, b), (b,))
        params.append([rng.uniform(-bound, bound, s).astype(np.float32) for s in shapes])

    params = jax.tree.map(jnp.asarray, params)
    maml = jax_maml(w.alpha, w.steps)
    state = maml.init(params)
    losses = []
    for _ in range(updates):
        params, state, value = maml.update(params, state, draw())
        losses.append(value)  # not read here: the next batch is drawn meanwhile
    jax.block_until_ready(params)
    return float(np.mean([float(v) for v in losses[-max(1, updates // 10) :]]))


@functools.cache
def learn2learn_maml() -> Any:
    """Return its MAML class alone: the package's own imports want gym and torchvision."""
    spec = importlib.util.find_spec("learn2learn")
    root = Path(str(spec.origin)).parent  # type: ignore[union-attr]
    for name, folder in (("learn2learn", root), ("learn2learn.algorithms", root / "algorithms")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def run_learn2learn(workload: Workload, X: np.ndarray, y: np.ndarray, updates: int) -> float:
    import torch
    from torch import nn

    w, draw = workload, Sampler(workload, X, y)
    torch.manual_seed(0)
    layers: list[Any] = []
    size = w.n_features
    for hidden in w.hidden:
        layers += [nn.Linear(size, hidden), nn.ReLU()]
        size = hidden
    maml = learn2learn_maml()(nn.Sequential(*layers, nn.Linear(size, w.n_outputs)), lr=w.alpha)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)

    def loss(output: Any, target: Any) -> Any:
        if w.classification:
            return nn.functional.cross_entropy(output, target)
        return nn.functional.mse_loss(output.squeeze(-1), target)

    losses = []
    for _ in range(updates):
        optimizer.zero_grad()
        total = 0.0
        for X_s, y_s, X_q, y_q in zip(*map(torch.from_numpy, draw()), strict=True):
            learner = maml.clone()
            for _ in range(w.steps):
                learner.adapt(loss(learner(X_s), y_s))
            query_loss = loss(learner(X_q), y_q)
            query_loss.backward()
            total += query_loss.item()
        for p in maml.parameters():
            p.grad.mul_(1 / w.n_tasks)
        optimizer.step()
        losses.append(total / w.n_tasks)
    return float(np.mean(losses[-max(1, updates // 10) :]))


JOBS: dict[str, Callable[[Workload, np.ndarray, np.ndarray, int], float]] = {
    "ours": run_ours,
    "jax": run_jax,
    "learn2learn": run_learn2learn,
}


# -- processes ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    wall: float
    cpu: float
    loss: float = float("nan")


def run_process(arguments: list[str], env: dict[str, str]) -> tuple[Run, str]:
    """Run Python to its end; its CPU time includes the processes it waited for."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} exited with {process.returncode}")
        output.seek(0)
        text = output.read().decode()
    return Run(wall, usage.ru_utime + usage.ru_stime), text


class Cell:
    """One workload and number of updates, run by each variant in turn."""

    def __init__(self, name: str, updates: int, folder: Path, python_path: str) -> None:
        self.name, self.updates, self.folder = name, updates, folder
        self.data = folder / f"{name}.npz"
        if not self.data.exists():
            np.savez(self.data, **make_tasks(WORKLOADS[name]))
        self.env = {**os.environ, "PYTHONPATH": python_path, "JAX_PLATFORMS": "cpu"}
        # bytecode is kept, as it is where a package is installed
        for variable in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
            self.env.pop(variable, None)
        self.runs: dict[str, list[Run]] = {}

    def run(self, variant: str) -> Run:
        job = variant.split()[0]
        env = dict(self.env)
        if variant == "jax cached":
            kept = self.folder / "jax"
            kept.mkdir(exist_ok=True)
            env["JAX_COMPILATION_CACHE_DIR"] = str(kept)
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        arguments = ["--child", job, self.name, str(self.updates), str(self.data)]
        run, text = run_process([str(Path(__file__).resolve()), *arguments], env)
        run.loss = float(text.split()[-1])
        return run

    def measure(self, variants: list[str], turns: int, once: set[str]) -> None:
        if "jax cached" in variants:
            self.run("jax cached")  # fills its cache
        for turn in range(turns):
            for variant in variants if turn % 2 == 0 else variants[::-1]:
                if variant not in once or turn == 0:
                    self.runs.setdefault(variant, []).append(self.run(variant))

    def median(self, variant: str, kind: str) -> float:
        return statistics.median(getattr(run, kind) for run in self.runs[variant])

    def ratio(self, variant: str, rivals: list[str], kind: str) -> tuple[float, str]:
        """Ratio to the better rival: the median of the turns' ratios, of medians if run once."""
        best = min(rivals, key=lambda rival: self.median(rival, kind))
        own, other = self.runs[variant], self.runs[best]
        if len(own) != len(other):
            return self.median(variant, kind) / self.median(best, kind), best
        pairs = zip(own, other, strict=True)
        return statistics.median(getattr(a, kind) / getattr(b, kind) for a, b in pairs), best

    def report(self) -> None:
        print(f"\n{self.name}, {self.updates:,} updates  (load {os.getloadavg()[0]:.1f})")
        print(f"{'':14s}{'wall s':>9s}{'CPU s':>9s}{'loss':>9s}  runs")
        for variant, runs in self.runs.items():
            wall, cpu, loss = (self.median(variant, kind) for kind in ("wall", "cpu", "loss"))
            print(f"{variant:14s}{wall:9.2f}{cpu:9.2f}{loss:9.3f}  {len(runs)}")
        plain = [name for name in ("jax", "learn2learn") if name in self.runs]
        for rivals in (plain, ["jax cached"] if "jax cached" in self.runs else []):
            if "ours" in self.runs and rivals:
                parts = []
                for kind in ("wall", "cpu"):
                    ratio, best = self.ratio("ours", rivals, kind)
                    parts.append(f"{kind} {ratio:.2f} x {best}")
                print(f"  ours to the better of {', '.join(rivals)}: {', '.join(parts)}")
        sys.stdout.flush()


def imports(turns: int, python_path: str) -> None:
    """Print what importing costs, as medians of interleaved processes."""
    statements = {
        "python": "pass",
        "numpy": "import numpy",
        "torch": "import torch",
        "torch, sklearn": "import torch, sklearn",
        "sklearn_maml": "import sklearn_maml",
        "jax, optax": "import jax, optax",
    }
    statements = {k: v for k, v in statements.items() if "jax" not in k or is_installed("jax")}
    env = {**os.environ, "PYTHONPATH": python_path}
    runs: dict[str, list[Run]] = {name: [] for name in statements}
    for turn in range(turns + 1):
        for name, statement in statements.items():
            run, _ = run_process(["-c", statement], env)
            if turn:  # the first reads the files
                runs[name].append(run)
    print(f"\nImports, {turns} turns")
    print(f"{'':16s}{'wall s':>9s}{'CPU s':>9s}")
    for name, own in runs.items():
        wall, cpu = (statistics.median(getattr(r, k) for r in own) for k in ("wall", "cpu"))
        print(f"{name:16s}{wall:9.2f}{cpu:9.2f}")
    pairs = list(zip(runs["sklearn_maml"], runs["torch, sklearn"], strict=True))
    wall, cpu = (
        statistics.median(getattr(a, k) - getattr(b, k) for a, b in pairs) for k in ("wall", "cpu")
    )
    print(
        f"  sklearn_maml adds {wall:.2f} s wall, {cpu:.2f} s CPU to torch and sklearn", flush=True
    )


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        job, name, updates, path = sys.argv[2:]
        data = np.load(path)
        print(JOBS[job](WORKLOADS[name], data["X"], data["y"], int(updates)))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", default=CELLS, help="workload:updates, separated by commas")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--variants", default="", help="only these, separated by commas")
    parser.add_argument("--slow", action="store_true", help="learn2learn in cells of minutes too")
    parser.add_argument("--imports", action="store_true", help="the cost of importing only")
    parser.add_argument("--json", type=Path, help="where to write every run")
    args = parser.parse_args()
    root = str(Path(__file__).resolve().parents[1])
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    if args.imports:
        imports(args.turns, python_path)
        return
    variants = ["ours"]
    for module, names in (("jax", ["jax", "jax cached"]), ("learn2learn", ["learn2learn"])):
        if is_installed(module) and (module != "jax" or is_installed("optax")):
            variants += names
        else:
            print(f"{module} is not installed: left out")
    if args.variants:
        variants = [v for v in variants if v in args.variants.split(",")]
    results = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        for text in args.cells.split(","):
            name, updates = text.split(":")
            cell = Cell(name, int(updates), Path(folder), python_path)
            is_slow = int(updates) >= SLOW[name]
            own = [v for v in variants if args.slow or not is_slow or v != "learn2learn"]
            if own != variants:
                print(f"\n{text}: without learn2learn, which takes minutes (--slow runs it once)")
            cell.measure(own, args.turns, {"learn2learn"} if is_slow else set())
            cell.report()
            results[text] = {v: [dataclasses.asdict(r) for r in rs] for v, rs in cell.runs.items()}
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
