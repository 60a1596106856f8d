"""MAML of a multilayer perceptron in JAX, ``value_and_grad(mean(vmap))``, and optax's Adam.

Its parameters are a list of a weight (inputs, outputs) and a bias for each layer.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class JaxMAML(NamedTuple):
    """Functions of a workload.

    Attributes
    ----------
    grad : callable
        Maps parameters and a batch to the loss and its gradient; not compiled yet.
    update : callable
        Compiled: maps parameters, state and a batch to the next ones and the loss.
    init : callable
        Maps parameters to the first state.
    """

    grad: Any
    update: Any
    init: Any


def jax_maml(alpha: float, steps: int, *, second_order: bool = True) -> JaxMAML:
    """Return the meta-step of integer or real targets."""

    def loss(params: Any, X: Any, y: Any) -> Any:
        for weight, bias in params[:-1]:
            X = jax.nn.relu(X @ weight + bias)
        output = X @ params[-1][0] + params[-1][1]
        if y.dtype.kind == "i":
            return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()
        return jnp.mean((output[..., 0] - y) ** 2)

    def task_loss(params: Any, X: Any, y: Any, X_query: Any, y_query: Any) -> Any:
        for _ in range(steps):
            grads = jax.grad(loss)(params, X, y)
            if not second_order:
                grads = jax.lax.stop_gradient(grads)
            params = jax.tree.map(lambda p, g: p - alpha * g, params, grads)
        return loss(params, X_query, y_query)

    def meta_loss(params: Any, batch: Any) -> Any:
        return jax.vmap(functools.partial(task_loss, params))(*batch).mean()

    grad, optimizer = jax.value_and_grad(meta_loss), optax.adam(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, batch: Any) -> Any:
        value, grads = grad(params, batch)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state, value

    return JaxMAML(grad, update, optimizer.init)
