"""Whether meta-learning pays: an estimator and its baselines on the same held-out tasks."""

from __future__ import annotations

import math
import numbers
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike
from sklearn.base import clone, is_classifier
from sklearn.utils import check_random_state

from sklearn_maml._validation import did_you_mean, is_number
from sklearn_maml.data.frames import is_frame, split_task_column
from sklearn_maml.data.spellings import (
    collect_tasks,
    is_task_distribution,
)
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.estimators import MAMLClassifier, MAMLRegressor
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.evaluation.held_out import (
    MIN_HELD_OUT_TASKS,
    MIN_TRAINING_TASKS,
    SplitData,
    check_split,
    n_held_out,
    random_episodes,
    random_splits,
)
from sklearn_maml.evaluation.methods import families, make_methods, maml_inside, run
from sklearn_maml.evaluation.scoring import check_count

if TYPE_CHECKING:
    import pandas as pd

# tasks drawn from a task distribution
DRAWN_TASKS = 200


def compare_baselines(
    estimator: Any,
    X: Any,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    n_shots: int | Sequence[int] | None = None,
    test_size: float = 0.3,
    n_repeats: int = 1,
    max_queries: int = 150,
    disjoint_rows: bool = False,
    baselines: str | Sequence[str] | Mapping[str, Any] = "all",
    splits: Iterable[Any] | None = None,
    per_task: bool = False,
    random_state: Any = None,
    n_jobs: int | None = None,
    verbose: int = 1,
) -> pd.DataFrame:
    """Compare a meta-learner with what it has to be better than, on held-out tasks.

    Tasks are shuffled and some of them held out. The others train every method; of each held-out
    task all methods get the same support rows and predict the same query rows. Features, and
    targets in regression, are standardised with the statistics of the training tasks for all
    methods alike; a `MAMLRegressor` that does so itself (`normalize_y`), or whose `loss` is of
    targets as they are, gets them so.

    Parameters
    ----------
    estimator : estimator or None
        A `MAMLRegressor`, a `MAMLClassifier`, or a pipeline or search that ends in one. It is
        cloned, never changed. None is a `MAMLRegressor` where y holds numbers, else a
        `MAMLClassifier`.
    X, y, groups : tasks
        As in `MAMLRegressor.fit`; features must be numbers. The two parts of ``(X_support,
        y_support, X_query, y_query)`` tasks are put together. Of a task distribution 200 tasks are
        drawn. With `n_ways` and without `groups`, classes are held out in place of tasks.
    n_shots : int or sequence of int, default=None
        Support rows of each held-out task (of each class, in classification); 0 is without any.
        None is (0, 5, 10) in regression, (0, 1) in classification, and 1 with `n_ways`. Held-out
        tasks without a query row after so many are not scored there, with one warning that counts
        them; training takes all tasks.
    test_size : float or int, default=0.3
        Fraction, or number, of the tasks to hold out.
    n_repeats : int, default=1
        How many times to hold tasks out, each time other ones.
    max_queries : int, default=150
        Largest number of query rows of a task.
    disjoint_rows : bool, default=False
        Whether training tasks and held-out tasks also use disjoint rows of features: the distinct
        rows of X are split in halves at random. Where tasks are measured at the same inputs
        (settings, days), a method can otherwise do well by knowing these inputs only. Where no two
        rows of X are equal this leaves each task about half of its rows and changes nothing else.
    baselines : "all", sequence of str or dict, default="all"
        Names of the baselines, see Notes. In a dict, the values are estimators: a meta-learner is
        trained on the training tasks as `estimator` is, any other one is fitted to the support rows
        of each held-out task, and one in a tuple ``("pooled", estimator)`` to the rows of all
        training tasks; None stands for the baseline of that name.
    splits : iterable of (train, episodes), default=None
        What to train and score on in each repeat, in place of random splits: positions of the rows
        of the training tasks, and a dict from each number of shots to a list of ``(support,
        query)`` row positions, one pair for each held-out task. `n_shots`, `test_size`,
        `n_repeats`, `max_queries` and `disjoint_rows` are not used then.
    per_task : bool, default=False
        True returns the score of every method on every held-out task, for
        `sklearn_maml.evaluation.summarize_comparison` or tests of your own.
    random_state : int, RandomState instance or None, default=None
        Seeds the splits and the baselines; the estimator has its own.
    n_jobs : int, default=None
        Methods to run in parallel, with joblib. The scores do not depend on it, the times do.
    verbose : int, default=1
        1 writes a line to the standard error whenever methods are done, and which baselines are
        left out because they are not installed; 0 writes nothing.

    Returns
    -------
    table : pandas.DataFrame
        Indexed by `n_shots` and `method`, best first, with the columns

        - `rmse`: root mean squared error of a task in units of the standard deviation of the
          training targets (of each target), mean over tasks; or `accuracy`; NaN, and last, of a
          method that has predicted NaN for a task;
        - `std_error`: its standard error over tasks, of scores averaged over repeats;
        - `crps` and `coverage`: of methods with a standard deviation, the continuous ranked
          probability score [2]_, lower is better, and the part of the targets in 90 % intervals;
          or `log_loss` and `brier`, the squared error of the probabilities;
        - `difference`: the method's mean less that of the estimator;
        - `difference_se`: the standard error over tasks of that paired difference;
        - `estimator_wins`: fraction of tasks where the estimator is better, ties counting half;
        - `fit_seconds`, `predict_seconds`: wall time of training, and of learning and predicting
          all held-out tasks; means over repeats;
        - `best`: "best", or "tied" where the paired difference to the best is less than twice its
          standard error.

        The row "<estimator>, before adaptation" predicts from the initialisation. Where it is no
        worse than the estimator, nothing is learned from support rows.

    Raises
    ------
    ValueError
        If there are too few tasks or rows.
    ImportError
        If pandas is missing, or a package that a baseline asked for by its name needs.

    Warns
    -----
    SmallTaskWarning
        If held-out tasks have too few rows for some of `n_shots`.

    See Also
    --------
    task_scores : Scores of a fitted model before and after adaptation, task by task.

    Notes
    -----
    The standard errors tell how the means would vary with other held-out tasks, not with other
    training tasks. Choices that the baselines make (rates, steps, strengths) are made on 15 % of
    the training tasks or by cross-validation over them, never on held-out tasks.

    Baselines of regressors:

    - "pooled ridge", "pooled HistGradientBoosting": one model of the rows of all training tasks;
    - "pooled ridge + shrunk intercept", "pooled HGB + shrunk intercept": corrected by the mean
      residual of the support rows, shrunk by the variance of residuals within and between tasks;
    - "per-task ridge", "per-task GP", "per-task kNN": a model of the support rows alone;
    - "mixed model, intercept + slopes": linear, coefficients of tasks normally distributed around
      those of the population, by EM [1]_; "mixed model, splines": of cubic splines;
    - "target-encoded boosting": with the shrunk mean of the support targets, and their number, as
      features;
    - "pooled HGB + GP on residuals": a Gaussian process for each task whose kernel parameters are
      shared, by marginal likelihood over the training tasks;
    - "pretrained MLP + fine-tune": a network of all rows, then gradient steps on the support rows;
    - "GPBoost" (boosting with random intercepts) and "per-task TabPFN", if they are installed.

    Without support rows, per-task models give the mean of the training tasks. Of several targets,
    each is predicted by a model of its own.

    Baselines of classifiers: "pooled HistGradientBoosting", "pooled logistic", "per-task 1-NN",
    "per-task logistic", "hierarchical logistic" (coefficients of tasks drawn to the pooled ones),
    "GLMM, random intercepts", "target-encoded boosting" (with the shrunk part of each class),
    "pretrained MLP + fine-tune", and "per-task TabPFN" if it is installed. With `n_ways`, those of
    single tasks.

    As many rows of each class say nothing of how frequent the classes of a task are. Baselines are
    trained to expect such support rows; a `MAMLClassifier` expects rows as they come, unless it is
    given `n_shots`.

    References
    ----------
    .. [1] Laird, N. M. & Ware, J. H. (1982). Random-Effects Models for Longitudinal Data.
       Biometrics 38.
    .. [2] Gneiting, T. & Raftery, A. E. (2007). Strictly Proper Scoring Rules, Prediction, and
       Estimation. Journal of the American Statistical Association 102.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor, compare_baselines
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=40, random_state=0)
    >>> table = compare_baselines(
    ...     MAMLRegressor(max_iter=20, random_state=0), X, y, task,
    ...     n_shots=5, baselines=["pooled ridge", "per-task ridge"], random_state=0,
    ... )
    >>> sorted(table.loc[5].index)
    ['MAMLRegressor', 'MAMLRegressor, before adaptation', 'per-task ridge', 'pooled ridge']
    >>> list(table.columns)[:6]
    ['rmse', 'std_error', 'crps', 'coverage', 'difference', 'difference_se']
    """
    _pandas()  # before all the work
    rng = check_random_state(random_state)
    if is_task_distribution(X):
        X = X.sample(DRAWN_TASKS, random_state=rng.randint(2**31 - 1))
    estimator, maml = _meta_learner(estimator, y, X)
    classification = is_classifier(maml)
    tasks = collect_tasks(
        clone(maml),
        X,
        y,
        groups,
        task_column=maml.task_column,
        reset=True,
        classification=classification,
    )
    name = type(maml).__name__
    n_ways = getattr(maml, "n_ways", None)
    methods, missing = make_methods(baselines, classification, n_ways is not None, name)
    _check_tasks(tasks, n_ways)
    if splits is None:
        splits = _make_splits(
            tasks,
            n_ways,
            classification,
            n_shots=n_shots,
            test_size=test_size,
            n_repeats=n_repeats,
            max_queries=max_queries,
            disjoint_rows=disjoint_rows,
            rng=rng,
        )
    splits = list(splits)
    if not splits:
        raise ValueError("splits is empty: give at least one (train, episodes) pair.")
    names = None
    if is_frame(X):
        column = maml.task_column
        names = list((X if column is None else split_task_column(X, column)[0]).columns)
    groups_of_methods = [{name: estimator}, *families(methods)]

    def jobs() -> Iterator[Any]:
        # the rows of a repeat are copied when its turn comes
        for repeat, split in enumerate(splits):
            train, episodes = check_split(split, tasks)
            data = SplitData.make(tasks, train, episodes, classification, names, n_ways)
            seed = int(rng.randint(2**31 - 1))
            for some in groups_of_methods:
                yield delayed(run)(repeat, data, seed, some)

    scores = _collect(
        Parallel(n_jobs=n_jobs, return_as="generator")(jobs()),
        len(splits) * len(groups_of_methods),
        missing,
        verbose,
    )
    scores["task"] = (
        scores["task"] if tasks.spelling == "single" else tasks.ids[scores["task"].to_numpy()]
    )
    return scores if per_task else summarize_comparison(scores, name)


def _make_splits(
    tasks: TaskCollection,
    n_ways: int | None,
    classification: bool,
    *,
    n_shots: Any,
    test_size: Any,
    n_repeats: Any,
    max_queries: Any,
    disjoint_rows: Any,
    rng: np.random.RandomState,
) -> list[Any]:
    """Hold out tasks, or classes of a pool, at random."""
    if n_shots is None:
        n_shots = (0, 1) if classification else (0, 5, 10)
        n_shots = n_shots if n_ways is None else 1
    shots = _check_shots(n_shots)
    n_repeats = check_count("n_repeats", n_repeats)
    max_queries = check_count("max_queries", max_queries)
    if n_ways is not None:
        if 0 in shots:
            raise ValueError(
                "n_shots=0 leaves an episode without classes, which are local to it (n_ways). Give "
                "at least 1."
            )
        return random_episodes(tasks, n_ways, shots, test_size, n_repeats, max_queries, rng)
    return random_splits(
        tasks,
        shots,
        n_held_out(tasks.n_tasks, test_size),
        n_repeats,
        max_queries,
        bool(disjoint_rows),
        classification,
        rng,
    )


def _collect(done: Iterator[Any], n_jobs: int, missing: list[str], verbose: int) -> Any:
    """Frame of all scores; tells how far it is."""
    start, rows = time.perf_counter(), []
    if verbose and missing:
        sys.stderr.write(f"Not installed, and left out: {', '.join(missing)}.\n")
    for number, (names, found) in enumerate(done):
        rows += found
        if verbose:
            seconds = time.perf_counter() - start
            sys.stderr.write(f"{number + 1} of {n_jobs}, {seconds:.0f} s: {', '.join(names)}\n")
    return _pandas().DataFrame(rows)


def summarize_comparison(scores: Any, estimator: str) -> Any:
    """Make the table of `compare_baselines` from the scores of single tasks.

    Parameters
    ----------
    scores : pandas.DataFrame
        As `compare_baselines` returns it with ``per_task=True``; frames of several calls may be
        concatenated, as long as their repeats have numbers of their own.
    estimator : str
        Name of the method to compare the others with.

    Returns
    -------
    table : pandas.DataFrame
        As `compare_baselines` returns it.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn_maml.evaluation import summarize_comparison
    >>> scores = pd.DataFrame({
    ...     "repeat": 0, "n_shots": 5, "task": ["a", "b", "a", "b"],
    ...     "method": ["ours", "ours", "ridge", "ridge"], "rmse": [0.5, 0.7, 0.8, 1.2],
    ...     "fit_seconds": [9.0, 9.0, 0.1, 0.1],
    ... })
    >>> table = summarize_comparison(scores, "ours")
    >>> float(table.loc[(5, "ridge"), "difference"].round(3))
    0.4
    """
    pandas = _pandas()
    metric = "rmse" if "rmse" in scores else "accuracy"
    sign = -1 if metric == "accuracy" else 1
    known = scores["method"].unique().tolist()
    if estimator not in known:
        raise ValueError(
            f"There are no scores of {estimator!r}.{did_you_mean(estimator, known)} Got scores of "
            f"{known}."
        )
    parts = []
    for k, of_k in scores.groupby("n_shots"):
        # (n_tasks, n_methods)
        wide = of_k.pivot_table(index="task", columns="method", values=metric, dropna=False)
        # means of the other tasks would have it be better than it is
        failed = of_k[metric].isna().groupby(of_k["method"]).any()
        wide = wide.mask(np.broadcast_to(failed.reindex(wide.columns), wide.shape))
        n = len(wide)
        paired = wide.sub(wide[estimator], axis=0)
        part = pandas.DataFrame({metric: wide.mean()})
        part["std_error"] = wide.std(ddof=1) / math.sqrt(n)
        for other in ("crps", "coverage", "log_loss", "brier"):
            if other in of_k:  # of methods that have none, NaN
                by_task = of_k.groupby(["task", "method"])[other].mean()
                part[other] = by_task.groupby("method").mean()
        part["difference"] = paired.mean()
        part["difference_se"] = paired.std(ddof=1) / math.sqrt(n)
        wins = (np.sign(sign * paired) + 1) / 2
        part["estimator_wins"] = wins.mean()
        part.loc[estimator, "estimator_wins"] = np.nan
        once = of_k.drop_duplicates(["repeat", "method"])
        for seconds in ("fit_seconds", "predict_seconds"):
            if seconds in once:
                part[seconds] = once.groupby("method")[seconds].mean()
        best = (sign * part[metric]).idxmin()
        behind = wide.sub(wide[best], axis=0)
        error = behind.std(ddof=1) / math.sqrt(n)
        tied = behind.mean().abs() < 2 * error
        part["best"] = np.where(tied.reindex(part.index), "tied", "")
        part.loc[best, "best"] = "best"
        part = part.sort_values(metric, ascending=sign > 0, kind="stable")
        part.index = pandas.MultiIndex.from_product([[k], part.index], names=["n_shots", "method"])
        parts.append(part)
    return pandas.concat(parts)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "compare_baselines returns a pandas.DataFrame, and pandas is not installed. Install "
            "it with pip install 'sklearn-maml[compare]'."
        ) from error
    return pandas


def _meta_learner(estimator: Any, y: Any, X: Any) -> tuple[Any, BaseMAML]:
    """Return the estimator to clone and the MAML estimator inside."""
    if estimator is None:
        if y is None:
            first = X[0] if isinstance(X, (list, tuple)) and len(X) else (None, [])
            y = first[1] if len(first) > 1 else []
        estimator = MAMLRegressor() if _are_numbers(y) else MAMLClassifier()
    if isinstance(estimator, type):
        raise TypeError(
            f"estimator is the class {estimator.__name__}; expected an instance: "
            f"{estimator.__name__}()."
        )
    maml = maml_inside(estimator)
    if maml is None:
        raise TypeError(
            "estimator, the first argument, must be a MAMLRegressor, a MAMLClassifier, or a "
            f"pipeline or search that ends in one; got {type(estimator).__name__}. Other "
            "estimators can be among the baselines: baselines={'name': estimator}."
        )
    if is_classifier(maml) and maml.loss == "binary":
        raise ValueError(
            "compare_baselines knows no baselines for rows with any number of labels, which "
            "loss='binary' is for. Compare one label at a time, "
            "compare_baselines(MAMLClassifier(), X, y[:, j], groups), or score with "
            "task_scores(estimator, X, y, groups)."
        )
    return estimator, maml


def _are_numbers(y: Any) -> bool:
    """Whether targets are numbers, of databases and of nullable columns too."""
    y = np.asarray(y)
    if y.dtype.kind != "O":
        return y.dtype.kind in "iuf"
    return all(is_number(value) or isinstance(value, Decimal) for value in y.ravel().tolist())


def _check_tasks(tasks: TaskCollection, n_ways: int | None) -> None:
    if tasks.spelling == "single":
        if n_ways is not None:  # a pool of classes
            return
        raise ValueError(
            "compare_baselines got no task information. Pass groups (the task id of each row), a "
            "list of (X, y) tasks, or set task_column."
        )
    needed = MIN_TRAINING_TASKS + MIN_HELD_OUT_TASKS
    if tasks.n_tasks < needed:
        raise ValueError(
            f"compare_baselines needs at least {needed} tasks, to train on some and to hold others "
            f"out; got {tasks.n_tasks}."
        )


def _check_shots(n_shots: Any) -> tuple[int, ...]:
    given = [n_shots] if isinstance(n_shots, numbers.Number) else list(n_shots)
    if not given:
        raise ValueError("n_shots is empty: give at least one number of support rows.")
    return tuple(sorted({check_count("n_shots", k) for k in given}))
