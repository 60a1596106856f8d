"""MAML in JAX, ``jit(vmap(value_and_grad))`` and optax's Adam, for `benchmarks/gpu.py`.

Parameters keep torch's names and layouts, so that weights and gradients can be compared.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

# torch needs memory of the same card
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import optax
from gpu_steps import Context, StepResult, Workload, measure, reference, workloads
from jax import lax

Params = dict[str, jax.Array]
Convolution = Callable[[jax.Array, jax.Array], jax.Array]
ADAM_DECAY = 0.9  # of the first moment, as in torch


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    names = sorted({name.split(".")[0] for name in params}, key=int)
    for name in names[:-1]:
        x = jax.nn.relu(linear(params, name, x))
    return linear(params, names[-1], x)


def convolution(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Stride 2, padding 1, by XLA's own operation."""
    layout = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, weight, (2, 2), [(1, 1), (1, 1)], dimension_numbers=layout)


def product_of_patches(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as a matrix product, which is faster for many small batches of weights."""
    patches = lax.conv_general_dilated_patches(x, weight.shape[2:], (2, 2), [(1, 1), (1, 1)])
    return jnp.einsum("nkhw,ok->nohw", patches, weight.reshape(len(weight), -1))


def conv4(params: Params, x: jax.Array, convolve: Convolution) -> jax.Array:
    for layer in range(0, 12, 3):
        x = convolve(x, params[f"{layer}.weight"]) + params[f"{layer}.bias"][:, None, None]
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        scale, shift = (params[f"{layer + 1}.{part}"] for part in ("weight", "bias"))
        x = (x - mean) * lax.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
        x = jax.nn.relu(x)
    return linear(params, "14", x.mean((2, 3)))


class JaxStep:
    """A meta-step of a workload, jitted with Adam's update."""

    def __init__(self, workload: Workload, forward: Callable[[Params, jax.Array], jax.Array]):
        self.forward, self.alpha, self.steps = forward, workload.alpha, workload.steps
        self.raw = workload.batches
        # those that step; W4 gets its arrays from the host, as the library does
        self.batches = [tuple(map(jnp.asarray, batch)) for batch in self.raw]
        module = workload.make_module()
        self.params = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
        self.optimizer = optax.adam(1e-3, b1=ADAM_DECAY)
        self.state = self.optimizer.init(self.params)
        self._step = jax.jit(self._update)
        self._predict = jax.jit(jax.vmap(self._adapt_predict, in_axes=(None, 0, 0, 0)))

    def _loss(self, params: Params, X: jax.Array, y: jax.Array) -> jax.Array:
        output = self.forward(params, X)
        if jnp.issubdtype(y.dtype, jnp.floating):
            return jnp.square(output[..., 0] - y).mean()
        return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()

    def _adapt(self, params: Params, X: jax.Array, y: jax.Array) -> Params:
        for _ in range(self.steps):
            grads = jax.grad(self._loss)(params, X, y)
            params = jax.tree.map(lambda p, g: p - self.alpha * g, params, grads)
        return params

    def _query_loss(self, params: Params, *task: jax.Array) -> jax.Array:
        return self._loss(self._adapt(params, *task[:2]), *task[2:])

    def _mean_gradient(self, params: Params, batch: Any) -> tuple[jax.Array, Params]:
        of_each = jax.vmap(jax.value_and_grad(self._query_loss), in_axes=(None, 0, 0, 0, 0))
        losses, grads = of_each(params, *batch)
        return losses.mean(), jax.tree.map(lambda g: g.mean(0), grads)

    def _update(self, params: Params, state: Any, batch: Any) -> tuple[Params, Any, jax.Array]:
        loss, grads = self._mean_gradient(params, batch)
        updates, state = self.optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    def _adapt_predict(self, params: Params, X: Any, y: Any, X_new: Any) -> jax.Array:
        return self.forward(self._adapt(params, X, y), X_new)

    def meta_grad(self, i: int) -> tuple[float, dict[str, np.ndarray]]:
        """Mean query loss and its gradient, without an update.

        The gradient that the timed function took, from what Adam keeps of its first one: to
        compile another function takes as long as to compile that one.
        """
        fresh = self.optimizer.init(self.params)
        _, state, loss = self._step(self.params, fresh, self.batches[i % len(self.batches)])
        share = 1 - ADAM_DECAY
        return float(loss), {name: np.asarray(m) / share for name, m in state[0].mu.items()}

    def step(self, i: int) -> float:
        """Make one meta-update; the loss is waited for, as in `fit`."""
        batch = self.batches[i % len(self.batches)]
        self.params, self.state, loss = self._step(self.params, self.state, batch)
        return float(loss)

    def adapt_predict(self, i: int) -> np.ndarray:
        """Outputs (tasks, rows, outputs) of adapted tasks."""
        X, y, X_new, _ = self.raw[i % len(self.raw)]
        return np.asarray(self._predict(self.params, X, y, X_new))

    def peak_bytes(self) -> int | None:
        found = jax.local_devices()[0].memory_stats()
        return None if not found else found.get("peak_bytes_in_use")


def jax_stage(context: Context) -> None:
    """JAX on the same device; networks of convolutions in both ways."""
    platform = jax.local_devices()[0].platform
    if (platform != "cpu") != context.device.startswith("cuda"):
        raise RuntimeError(f"jax {jax.__version__} runs on {platform!r}, not on {context.device!r}")
    # networks of convolutions last: they take longest to compile
    for workload in sorted(workloads(context.dry_run), key=lambda w: w.convolves):
        expected = reference(workload, context.device)
        ways: dict[str, Any] = {"": mlp}
        if workload.convolves:
            ways = {
                # the other way takes a minute to compile
                "convolutions": functools.partial(conv4, convolve=convolution),
                "products of patches": functools.partial(conv4, convolve=product_of_patches),
            }
        for variant, forward in ways.items():
            # products of float32 are rounded to TF32 otherwise
            with jax.default_matmul_precision("highest"):
                make = functools.partial(JaxStep, workload, forward)
                measure(context, workload, StepResult(workload.name, "JAX", variant), make,
                        expected)  # fmt: skip
