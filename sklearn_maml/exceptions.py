"""Exceptions and warnings of sklearn_maml.

Every exception also inherits from the scikit-learn or built-in class a caller would already catch.
"""

from sklearn.exceptions import ConvergenceWarning, NotFittedError

__all__ = [
    "DeviceWarning",
    "DroppedLearnerWarning",
    "EngineFallbackWarning",
    "FileFormatError",
    "InterruptedFitWarning",
    "MemorizationWarning",
    "MetaTrainingError",
    "NonFiniteStepWarning",
    "NotAdaptedError",
    "OutlierWarning",
    "SeenTaskWarning",
    "SingleTaskWarning",
    "SmallTaskWarning",
    "TaskColumnWarning",
]


class NotAdaptedError(NotFittedError):
    """Raised when predictions are asked of a model that was not adapted to the task."""


class MetaTrainingError(ArithmeticError, ValueError):
    """Raised when most meta-steps were not finite, so that nothing was learned."""


class FileFormatError(ValueError):
    """Raised when a file is no model or checkpoint, or not the one that was written."""


class SingleTaskWarning(UserWarning):
    """Issued when rows that look like those of several tasks are treated as one task.

    In `fit` there is no task information at all; a score or `adapt` got more rows without task ids
    than any task of the fit has.
    """


class SmallTaskWarning(UserWarning):
    """Issued when tasks have too few rows to be split into support and query set as asked.

    They teach what they can: a single row is a query row without a support set.
    """


class SeenTaskWarning(UserWarning):
    """Issued when a score was computed on new rows of tasks seen in meta-training.

    Such a score measures new rows of known tasks, not performance on new tasks.
    """


class TaskColumnWarning(UserWarning):
    """Issued when a transformer in front seems to have changed the ids in a task column.

    None of them is known, and they are fractions where they were whole numbers before, say.
    """


class DeviceWarning(UserWarning):
    """Issued when a model is loaded on the CPU because there is no device like that of its fit."""


class MemorizationWarning(UserWarning):
    """Issued when held-out tasks gain nothing from adapting to their own support sets.

    One function then serves all tasks (Yin et al. 2020, Meta-Learning without Memorization), which
    a model without meta-learning would do as well.
    """


class DroppedLearnerWarning(UserWarning):
    """Issued when a continued fit drops a learner that had a share in predictions."""


class OutlierWarning(UserWarning):
    """Issued when a few targets are so far from all others that squared errors are about them."""


class NonFiniteStepWarning(ConvergenceWarning):
    """Issued once when a meta-step was skipped because its loss or gradient was not finite.

    `adapt` issues it when inner steps diverged, which are shortened or left out then.
    """


class InterruptedFitWarning(ConvergenceWarning):
    """Issued when `fit` was interrupted and kept the best parameters found so far."""


class EngineFallbackWarning(UserWarning):
    """Issued when a meta-batch cannot be run at once: by the module, or for want of memory.

    Tasks are then run one after another, or fewer at a time, with the same results.
    """
