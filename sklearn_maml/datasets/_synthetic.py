"""Sinusoids, the regression tasks of Finn, Abbeel and Levine (2017), section 5.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from sklearn_maml._validation import is_integer, is_number

FloatArray = NDArray[np.float64]
RandomState = int | np.random.RandomState | None


def _check_count(name: str, value: Any) -> int:
    if is_integer(value) and value >= 1:
        return int(value)
    raise ValueError(
        f"{name} must be an integer of at least 1, got {value!r}. Pass {name}=1 or more."
    )


def _check_range(name: str, value: Any) -> tuple[float, float]:
    numbers = isinstance(value, (Sequence, np.ndarray)) and len(value) == 2
    if numbers and all(is_number(v) and math.isfinite(v) for v in value):
        low, high = float(value[0]), float(value[1])
        if low <= high:
            return low, high
    raise ValueError(
        f"{name} must be a pair (low, high) of finite numbers with low <= high, got {value!r}. "
        f"For a fixed value v, pass {name}=(v, v)."
    )


def _check_noise(value: Any) -> float:
    if is_number(value) and math.isfinite(value) and value >= 0:
        return float(value)
    raise ValueError(
        f"noise must be a finite number of at least 0, got {value!r}. It is the standard "
        "deviation of what is added to y; pass noise=0.0 for exact sinusoids."
    )


class SinusoidTasks:
    r"""Endless distribution of sinusoid regression tasks.

    Each task draws an amplitude :math:`A` and a phase :math:`\varphi`, uniformly from
    their ranges, and its rows are

    .. math:: y = A \sin(x - \varphi) + \varepsilon, \qquad
              \varepsilon \sim \mathcal{N}(0, \mathrm{noise}^2),

    with :math:`x` uniform on `x_range`. The defaults are those of section 5.1 of [1]_. No
    single function fits all tasks, so a learner can only do well by adapting.

    Parameters
    ----------
    n_rows : int, default=20
        Rows per task, support and query together.
    amplitude : tuple of float, default=(0.1, 5.0)
        Lowest and highest amplitude.
    phase : tuple of float, default=(0.0, pi)
        Lowest and highest phase.
    x_range : tuple of float, default=(-5.0, 5.0)
        Lowest and highest input.
    noise : float, default=0.0
        Standard deviation of the Gaussian noise added to `y`.

    See Also
    --------
    make_sinusoid_tasks : The same tasks as rows and task ids.

    References
    ----------
    .. [1] Finn, C., Abbeel, P., and Levine, S. (2017). Model-agnostic meta-learning for
       fast adaptation of deep networks. ICML. https://arxiv.org/abs/1703.03400

    Examples
    --------
    >>> from sklearn_maml.datasets import SinusoidTasks
    >>> tasks = SinusoidTasks(n_rows=10)
    >>> sampled = tasks.sample(3, random_state=0)
    >>> [(X.shape, y.shape) for X, y in sampled]
    [((10, 1), (10,)), ((10, 1), (10,)), ((10, 1), (10,))]
    """

    def __init__(
        self,
        n_rows: int = 20,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.0,
    ) -> None:
        # Checked here and not in `sample`, which runs once per meta-update.
        self.n_rows = _check_count("n_rows", n_rows)
        self.amplitude = _check_range("amplitude", amplitude)
        self.phase = _check_range("phase", phase)
        self.x_range = _check_range("x_range", x_range)
        self.noise = _check_noise(noise)

    def __repr__(self) -> str:
        """Show every setting, so that a logged distribution can be rebuilt."""
        return (
            f"SinusoidTasks(n_rows={self.n_rows}, amplitude={self.amplitude}, "
            f"phase={self.phase}, x_range={self.x_range}, noise={self.noise})"
        )

    def sample(
        self, n_tasks: int, random_state: RandomState = None
    ) -> list[tuple[FloatArray, FloatArray]]:
        """Draw fresh tasks.

        Parameters
        ----------
        n_tasks : int
            Number of tasks.
        random_state : int, RandomState instance or None, default=None
            An int gives the same tasks at every call, a RandomState instance moves on.

        Returns
        -------
        list of tuple
            One pair `(X, y)` per task, with shapes `(n_rows, 1)` and `(n_rows,)`.
        """
        n_tasks = _check_count("n_tasks", n_tasks)
        rng = check_random_state(random_state)
        amplitude = rng.uniform(*self.amplitude, size=(n_tasks, 1))
        phase = rng.uniform(*self.phase, size=(n_tasks, 1))
        x = rng.uniform(*self.x_range, size=(n_tasks, self.n_rows))
        y = x - phase
        y = np.sin(y, out=y)  # in place: many tasks are drawn at once, and fresh memory costs more
        y *= amplitude
        if self.noise:
            y += rng.normal(scale=self.noise, size=y.shape)
        return list(zip(x[..., np.newaxis], y, strict=True))


def make_sinusoid_tasks(
    n_tasks: int = 100,
    n_rows: int = 20,
    *,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    x_range: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
    random_state: RandomState = None,
) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
    """Make sinusoid regression tasks as rows with task ids.

    Every task is a sinusoid of its own amplitude and phase, see `SinusoidTasks`.

    Parameters
    ----------
    n_tasks : int, default=100
        Number of tasks.
    n_rows : int, default=20
        Rows per task.
    amplitude : tuple of float, default=(0.1, 5.0)
        Lowest and highest amplitude.
    phase : tuple of float, default=(0.0, pi)
        Lowest and highest phase.
    x_range : tuple of float, default=(-5.0, 5.0)
        Lowest and highest input.
    noise : float, default=0.0
        Standard deviation of the Gaussian noise added to `y`.
    random_state : int, RandomState instance or None, default=None
        Pass an int for the same tasks at every call.

    Returns
    -------
    X : ndarray of shape (n_tasks * n_rows, 1)
        The inputs, task after task.
    y : ndarray of shape (n_tasks * n_rows,)
        The targets.
    groups : ndarray of shape (n_tasks * n_rows,)
        The task of each row, 0 to `n_tasks - 1`.

    See Also
    --------
    SinusoidTasks : The distribution itself, for fresh tasks at every meta-update.

    Examples
    --------
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, groups = make_sinusoid_tasks(n_tasks=4, n_rows=10, random_state=0)
    >>> X.shape, y.shape
    ((40, 1), (40,))
    >>> groups[[0, 9, 10, 39]].tolist()
    [0, 0, 1, 3]
    """
    tasks = SinusoidTasks(n_rows, amplitude=amplitude, phase=phase, x_range=x_range, noise=noise)
    drawn = tasks.sample(n_tasks, random_state)
    X, y = map(np.concatenate, zip(*drawn, strict=True))
    return X, y, np.repeat(np.arange(len(drawn), dtype=np.int64), tasks.n_rows)
