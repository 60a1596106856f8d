"""Stages of `benchmarks/gpu.py` that time meta-steps: the library, a plain loop, precisions.

Every implementation's meta-gradient is compared with one in float64 first; a wrong one is reported
and not timed. One that is planted shows in every run that the comparison can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from papers import conv4
from run import WORKLOADS, Batch, LibraryStep, PlainLoop, make_batch, make_mlp, relative_error
from skorch.callbacks import Callback
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.engine.tracing import graphs
from sklearn_maml.engine.tracing.recording import first_line

# Largest relative error of a meta-gradient that is timed. On an H200 float32 had 1e-7 to 3e-6, and
# 5e-4 now and then for conv4, in JAX too, whose rectified units are on either side of 0 by rounding
# (5e-7 with softplus); TF32 2e-2, and the planted one 0.2.
ALLOWED = {"full": 1e-3, "tf32": 0.05, "bf16": 0.5}
# a fit in which the steps are recorded, as in long fits
FIT_UPDATES = 50_000
N_BATCHES = 4


@dataclasses.dataclass
class Context:
    """What a stage is run with."""

    device: str
    dry_run: bool
    ends_at: float  # of time.monotonic()
    emit: Callable[[Any], None]  # writes a result down at once

    @property
    def left(self) -> float:
        return self.ends_at - time.monotonic()

    def synchronise(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


@dataclasses.dataclass
class StepResult:
    """A meta-step (or, for W4, adapting to tasks and predicting) of one implementation."""

    workload: str
    implementation: str  # "library", "JAX", "plain loop", "planted"
    variant: str = ""
    precision: str = "full"
    status: str = "failed"  # or "timed", "wrong gradient", "right, not timed"
    reason: str = ""
    ran_as: str = ""  # rung of the engine
    gradient_error: float | None = None  # of outputs, for W4
    allowed_error: float = ALLOWED["full"]
    ms: float | None = None  # median of a step on batches that lie on the device
    quartiles_ms: list[float] = dataclasses.field(default_factory=list)
    fit_ms: float | None = None  # median of an update of a fit by the public calls
    setup_seconds: float | None = None  # until the first steps were done: recording, compiling
    peak_mb: float | None = None
    synchronisations: int | None = None
    synchronised_at: list[str] = dataclasses.field(default_factory=list)
    kind: str = "step"


# -- workloads -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tasks, a network and how it learns from them."""

    name: str
    make_module: Callable[[], nn.Module]
    make_batch: Callable[[int], Batch]
    steps: int
    alpha: float
    classification: bool
    adapts_only: bool = False

    @functools.cached_property
    def batches(self) -> list[Batch]:
        return [self.make_batch(seed) for seed in range(1 if self.adapts_only else N_BATCHES)]

    @property
    def convolves(self) -> bool:
        return any(isinstance(m, nn.Conv2d) for m in self.make_module().modules())

    def loop(self, device: str, **settings: Any) -> PlainLoop:
        settings.setdefault("second_order", not self.adapts_only)
        module = self.make_module()
        return PlainLoop(module, self.batches, self.alpha, self.steps, device=device, **settings)

    def library(self, device: str, **settings: Any) -> LibraryStep:
        return LibraryStep(
            self.make_module(),
            self.batches,
            alpha=self.alpha,
            steps=self.steps,
            classification=self.classification,
            device=device,
            **self.estimator_settings,
            **settings,
        )

    @property
    def estimator_settings(self) -> dict[str, Any]:
        # MAML and nothing else, with the batch norm of the plain loop
        return {"update_rule": "sgd", "engine__batch_norm": "transductive"}


def mlp_workload(name: str, n_tasks: int | None = None, label: str | None = None) -> Workload:
    sizes, _, _, _, steps, alpha, classification = WORKLOADS[name]
    return Workload(
        label or name,
        functools.partial(make_mlp, sizes),
        functools.partial(make_batch, name, n_tasks=n_tasks),
        steps,
        alpha,
        classification,
        adapts_only=label is not None,
    )


def images_of(n_tasks: int, ways: int, queries: int, seed: int) -> Batch:
    """One image of each class to adapt to, some more to predict; noise around a centre."""
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(ways), 1 + queries)[None].repeat(n_tasks, 0)
    centres = rng.normal(size=(n_tasks, ways, 1, 28, 28))
    X = centres[np.arange(n_tasks)[:, None], y]
    X = (X + 0.5 * rng.normal(size=X.shape)).astype(np.float32)
    return X[:, :ways], y[:, :ways], X[:, ways:], y[:, ways:]


def conv4_of(filters: int) -> nn.Module:
    torch.manual_seed(0)
    return conv4(5, filters, averages=False)


def workloads(small: bool) -> list[Workload]:
    """W1, W1_s5, W2, W3 (conv4) and W4, the most telling ones first; `small` for a dry run."""
    n_images = (2, 5, 1) if small else (32, 5, 15)
    images = Workload(
        "W3",
        functools.partial(conv4_of, 4 if small else 64),
        functools.partial(images_of, *n_images),
        steps=1,
        alpha=0.1,
        classification=True,
    )
    few = 3 if small else None
    loads = [
        mlp_workload("W1", few),
        images,
        mlp_workload("W2", few),
        mlp_workload("W1_s5", few),
        mlp_workload("W2", 6 if small else 1000, label="W4"),
    ]
    if small:
        loads = [dataclasses.replace(w, steps=min(w.steps, 2)) for w in loads]
    return loads


def reference(workload: Workload, device: str) -> dict[str, np.ndarray]:
    """Meta-gradient in float64, of a plain loop; for W4 the outputs of adapted tasks.

    On the CPU, so that the card has no part in it; networks of convolutions take too long there.
    """
    loop = workload.loop(device if workload.convolves else "cpu", dtype=torch.float64)
    return _answer(loop, workload)


def _answer(step: Any, workload: Workload) -> dict[str, np.ndarray]:
    if workload.adapts_only:
        return {"outputs": step.adapt_predict(0)}
    grads: dict[str, np.ndarray] = step.meta_grad(0)[1]
    return grads


# -- measuring -------------------------------------------------------------------------------------


def measure(
    context: Context,
    workload: Workload,
    result: StepResult,
    make: Callable[[], Any],
    expected: dict[str, np.ndarray],
    *,
    seconds: float = 0.6,
    n_first: int = 5,
    fit: Callable[[], float] | None = None,
) -> None:
    """Check an implementation's numbers, time it if they are right, and write the result down.

    What is checked is the last of `n_first` answers, within which recorded steps are recorded.
    `fit` gives the milliseconds of an update of a whole fit.
    """
    on_cuda = context.device.startswith("cuda")
    step: Any = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            start = time.perf_counter()
            step = make()
            for _ in range(n_first):
                got = _answer(step, workload)
            context.synchronise()
            result.setup_seconds = time.perf_counter() - start
            result.ran_as = ran_as(step)
            result.gradient_error = relative_error(got, expected)
            if not result.gradient_error <= result.allowed_error:  # NaN is not
                result.status = "wrong gradient"
            elif context.left < 2 * result.setup_seconds / n_first:
                result.status, result.reason = "right, not timed", "the time was up"
            else:
                if on_cuda:
                    torch.cuda.reset_peak_memory_stats()
                run = step.adapt_predict if workload.adapts_only else step.step
                times = timed(context, run, 0.01 if context.dry_run else seconds)
                result.ms = statistics.median(times)
                result.quartiles_ms = np.percentile(times, [25, 75]).tolist()
                result.status = "timed"
                result.peak_mb = peak_megabytes(step, on_cuda)
                if on_cuda and hasattr(step, "train"):
                    result.synchronised_at = synchronisations(step.train)
                    result.synchronisations = len(result.synchronised_at)
                # the plain loop takes too long for hundreds of updates
                if fit is not None and not result.ran_as.startswith("loop"):
                    context.emit(result)
                    result.fit_ms = fit()
        except Exception as error:  # whatever it is, the others are to be measured
            result.reason = f"{type(error).__name__}: {first_line(error)}"
        finally:
            if hasattr(step, "close"):
                step.close()
            del step
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()
    if not result.reason:
        said = [str(w.message) for w in caught if "Fallback" in w.category.__name__]
        result.reason = "; ".join(dict.fromkeys(said))
    context.emit(result)


def timed(context: Context, run: Callable[[int], Any], seconds: float) -> list[float]:
    """Milliseconds of a call, in each of several rounds between synchronised clocks."""
    for _ in range(2):  # the first sets things up
        context.synchronise()
        start = time.perf_counter()
        run(0)
        context.synchronise()
        one = time.perf_counter() - start
        if one > 2:
            return [1e3 * one]
    rounds = 3 if context.dry_run or one > seconds else 9
    n = max(1, int(seconds / rounds / one))
    for i in range(n):  # warms up, and for long enough that the card's clock rises
        run(i)
    times = []
    for _ in range(rounds):
        context.synchronise()
        start = time.perf_counter()
        for i in range(n):
            run(i)
        context.synchronise()
        times.append(1e3 * (time.perf_counter() - start) / n)
    return times


def synchronisations(run: Callable[[int], Any]) -> list[str]:
    """Lines of the program that make the host wait for the card in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    ]


def peak_megabytes(step: Any, on_cuda: bool) -> float | None:
    if hasattr(step, "peak_bytes"):  # not torch's memory
        found: int | None = step.peak_bytes()
        return None if found is None else found / 1e6
    return torch.cuda.max_memory_allocated() / 1e6 if on_cuda else None


def ran_as(step: Any) -> str:
    """Rung of the engine behind a library step, and what became of the recorded graph."""
    engine = getattr(getattr(step, "net", None), "engine", None)
    if engine is None:
        return ""
    graphs = getattr(engine.tracer, "_graphs", {}).values()
    kinds = {
        {"Graph": "recorded", "CudaGraph": "CUDA graph"}.get(type(g).__name__, "built")
        for g in graphs
    }
    if engine.tracer.reason is not None:
        kinds.add(f"not recorded: {engine.tracer.reason}")
    return ", ".join([engine.rung, *sorted(kinds)])


class Clock(Callback):
    """Time of an update in each epoch of a fit, by synchronised clocks; ends the fit after a while.

    The first epoch, in which steps are recorded, does not count into the seconds. If `strict`, it
    does, and no epoch is begun for which there is no time.
    Raising KeyboardInterrupt is how a skorch callback ends a fit.
    """

    def __init__(
        self, seconds: float, synchronise: Callable[[], None], strict: bool = False
    ) -> None:
        self.seconds, self.synchronise, self.strict = seconds, synchronise, strict

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.was_up = False

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self.synchronise()
        self.began, self.update = time.perf_counter(), net.update_

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        self.synchronise()
        now = time.perf_counter()
        self.times.append((now - self.began) / (net.update_ - self.update))
        if len(self.times) == 1 and not self.strict:
            self.start = now
        next_one = now - self.began if self.strict else 0.0
        self.was_up = now - self.start + next_one > self.seconds
        if self.was_up:
            raise KeyboardInterrupt

    @property
    def typical(self) -> float:
        """Median over the second half: what a fit does first is not typical of it."""
        return statistics.median(self.times[len(self.times) // 2 :])


def fit_milliseconds(
    context: Context, workload: Workload, seconds: float, **settings: Any
) -> float:
    """Time of an update of a fit by the public calls, with all that `fit` does around the step."""
    clock = Clock(seconds, context.synchronise)
    cls: Any = MAMLClassifier if workload.classification else MAMLRegressor
    if not workload.classification:
        settings["normalize_y"] = False
    estimator = cls(
        module=workload.make_module(),
        alpha=workload.alpha,
        beta=1e-3,
        steps=workload.steps,
        meta_batch_size=len(workload.batches[0][0]),
        max_iter=5 if context.dry_run else FIT_UPDATES,
        early_stopping=False,
        device=context.device,
        callbacks=[clock],
        random_state=0,
        **workload.estimator_settings,
        **settings,
    )
    estimator.fit([task for batch in workload.batches for task in zip(*batch, strict=True)])
    return 1e3 * clock.typical


@contextlib.contextmanager
def launched_by(launch: Callable[..., Any]) -> Iterator[None]:
    """Let `launch` say how a recorded graph is run, in the place of CUDA graphs.

    There is no public way to that. `StepResult.ran_as` says what came of it.
    """
    original = graphs._launched_at_once
    graphs._launched_at_once = launch
    try:
        yield
    finally:
        graphs._launched_at_once = original


def by_inductor(backend: str) -> Callable[..., Any]:
    """Build recorded graphs with torch's compiler, replayed as CUDA graphs."""
    options = {"triton.cudagraphs": True} if backend == "inductor" else None

    def launch(graph: Any, inputs: Any) -> Callable[..., list[torch.Tensor]]:
        forward = getattr(graph, "_forward", graph)
        built = torch.compile(forward, backend=backend, options=options, dynamic=False)

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad():
                return [t.clone() for t in built(*[t.contiguous() for t in tensors])]

        return run

    return launch


# -- stages ----------------------------------------------------------------------------------------

# how the library can be made to run a step; "as fit runs it" is what users get in long fits
VARIANTS: dict[str, dict[str, Any]] = {
    "as fit runs it": {},
    "eager": {"updates_left": 0},
    "CUDA graph": {"rung": "traced"},
    "recorded": {"rung": "traced"},
    "eager vmap": {"rung": "vmap", "updates_left": 0},
}


def steps_stage(context: Context) -> None:
    """The library in all variants, then the plain loop and what must be found to be wrong."""
    known: dict[str, dict[str, np.ndarray]] = {}
    loads = workloads(context.dry_run)
    for workload in loads:
        expected = known[workload.name] = reference(workload, context.device)
        for variant, settings in VARIANTS.items():
            if workload.adapts_only and variant != "as fit runs it":
                continue
            make = functools.partial(workload.library, context.device, **settings)
            fit = functools.partial(fit_milliseconds, context, workload, 1.5)
            fits = variant == "as fit runs it" and not workload.adapts_only
            plain = launched_by(lambda graph, inputs: graph)
            with plain if variant == "recorded" else contextlib.nullcontext():
                result = StepResult(workload.name, "library", variant)
                measure(context, workload, result, make, expected, fit=fit if fits else None)
    torch.backends.cudnn.allow_tf32 = False  # in the loop, too
    # takes the first-order gradient for the second-order one
    planted = functools.partial(loads[0].loop, context.device, second_order=False)
    result = StepResult(loads[0].name, "planted", "first order")
    measure(context, loads[0], result, planted, known[loads[0].name])
    for workload in loads:
        loop = functools.partial(workload.loop, context.device)
        result = StepResult(workload.name, "plain loop")
        measure(context, workload, result, loop, known[workload.name], seconds=0.3, n_first=1)


def precision_stage(context: Context) -> None:
    """conv4 in TF32 and bfloat16."""
    workload = workloads(context.dry_run)[1]
    expected = reference(workload, context.device)
    for precision, allowed in ALLOWED.items():
        result = StepResult(
            workload.name, "library", "as fit runs it", precision, allowed_error=allowed
        )
        how = {"engine__precision": precision}
        make = functools.partial(workload.library, context.device, **how)
        fit = functools.partial(fit_milliseconds, context, workload, 1.5, **how)
        measure(context, workload, result, make, expected, fit=fit)


def inductor_stage(context: Context) -> None:
    """Recorded graphs, built by torch's compiler, which the library never does."""
    loads = [w for w in workloads(context.dry_run) if not w.adapts_only]
    for workload in loads[:1] if context.dry_run else loads:
        expected = reference(workload, context.device)
        # a dry run goes the same way without a compiler
        with launched_by(by_inductor("eager" if context.dry_run else "inductor")):
            make = functools.partial(workload.library, context.device, rung="traced")
            measure(context, workload, StepResult(workload.name, "library", "inductor"), make,
                    expected)  # fmt: skip
