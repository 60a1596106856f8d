"""This library as one more implementation ("ours") in the harness that times rival libraries.

    PYTHONPATH=benchmarks python FOLDER/bench.py --extra peers_ours --impl ours,jax,l2l

FOLDER holds the harness (bench.py, bench_common.py). It compares every implementation's
meta-gradient with a float64 reference before it times the training steps. Ours is the step that
`fit` runs, `MetaNet.train_step`, and for inference the public `adapt` and `decision_function`.
"""

from __future__ import annotations

from typing import Any

import torch
from bench_common import register
from run import LibraryStep


@register("ours")
class Ours(LibraryStep):
    def __init__(self, workload: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        regression = workload.loss == "mse"
        batches = [workload.batch(i) for i in range(workload.n_batches)]
        if regression:
            batches = [(xs, ys[..., 0], xq, yq[..., 0]) for xs, ys, xq, yq in batches]
        super().__init__(
            workload.torch_model(),
            batches,
            alpha=workload.alpha,
            steps=workload.steps,
            classification=not regression,
            meta_gradient="second-order" if workload.order == 2 else "first-order",
        )

    def info(self) -> str:
        return f"rung={self.net.engine.rung}"
