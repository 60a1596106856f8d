"""What every kind of targets offers, and every loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from sklearn_maml.data.splitting import check_splittable, usable
from sklearn_maml.data.tasks import TaskCollection


class Loss(BaseEstimator, ABC):
    """Loss of the rows of a task, and what its targets and outputs mean.

    A loss of one's own is a subclass, an object of which is the parameter `loss` of a
    `MAMLRegressor`. Parameters of its constructor are searched as ``loss__*``.

    Attributes
    ----------
    name : str
        In messages and displays; that of the class unless it is given.
    standardises : bool
        Whether y may be standardised: `rows` then sees targets of mean 0 and variance 1 where
        `normalize_y` is set. By default targets are as they are.
    robust : bool
        Whether that is by the median and the median absolute deviation (times 1.4826, of a normal
        distribution the standard deviation), which a few gross errors do not move.
    scales : bool
        Whether y, of 0 or more, may be divided by its mean in `fit` where `normalize_y` is set. It
        is for losses with a logarithmic link, where that takes a constant from the outputs: those
        of data of thousands, or thousandths, then begin near 0, too.
    max_grad_norm : float or None
        Norm that gradient steps under ``update_rule="auto"`` clip the gradient of a task to, for a
        loss whose curvature has no bound. By default they do not clip.
    """

    name: ClassVar[str]
    standardises: ClassVar[bool] = False
    robust: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    max_grad_norm: ClassVar[float | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def rows(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, in differentiable operations of torch.

        Parameters
        ----------
        output, y : Tensor of shape (..., n_outputs)
            With any number of leading axes.

        Returns
        -------
        losses : Tensor of shape (...)
        """

    def check(self, y: np.ndarray) -> None:
        """Refuse targets (n_rows, n_outputs), in the units of y, that the loss is not for."""

    def inverse_link(self, output: Tensor) -> Tensor:
        """Return predictions for outputs (n_rows, n_outputs), in torch; by default the outputs."""
        return output

    def predict(self, output: np.ndarray) -> np.ndarray:
        """Return predictions for outputs (n_rows, n_outputs), by default by `inverse_link`.

        A loss that computes them in numpy overrides this one; `adapted_module`, which is of torch
        alone, then refuses it.
        """
        return self.inverse_link(torch.from_numpy(output)).numpy()


@dataclass(kw_only=True)
class Coding:
    """What `Targets.encode_support` keeps of support sets: what the outputs of tasks stand for."""

    # of labels that mean something inside a task only: the classes of all tasks, and the position
    # among them of each output, (n_tasks, n_ways), or -1
    labels: np.ndarray | None = None
    slots: np.ndarray | None = None
    # what was taken from the targets of each task, (n_tasks, n_outputs), in the units of y
    center: np.ndarray | None = None


class Targets(ABC):
    """What y means.

    Parameters
    ----------
    loss : Loss

    Attributes
    ----------
    are_classes : bool
    word : str
        What one output of the network is for.
    learned : tuple of str
        Attributes that `learn` sets, which are fitted attributes of the estimators, too.
    validation_queries : int
        Query rows of held-out tasks; of each class, if they are drawn by class.
    n_ways : int or None
        Classes of an episode, where labels mean something inside their task only.
    center_y : bool
        Whether the mean of the support targets of a task is taken from its targets.
    """

    are_classes: ClassVar[bool]
    word: ClassVar[str]
    learned: ClassVar[tuple[str, ...]]
    validation_queries: ClassVar[int]
    n_ways: int | None = None
    center_y: bool = False

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """Outputs of the network."""

    @abstractmethod
    def declare(self, classes: Any) -> None:
        """Learn what tasks to come have, from the first part of them on; labels, of classes."""

    @abstractmethod
    def learn(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """Learn from the targets of meta-training what the rest needs."""

    @abstractmethod
    def learn_on(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """Learn from tasks of a continued fit what earlier ones could not tell."""

    @abstractmethod
    def encode(self, tasks: TaskCollection) -> TaskCollection:
        """Targets as the losses take them, for episodes."""

    @abstractmethod
    def encode_support(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None
    ) -> tuple[np.ndarray, Coding]:
        """Targets of support sets as the losses take them, and how they are decoded."""

    @abstractmethod
    def decode(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """Predictions for outputs (n_rows, n_outputs) of rows of the tasks `codes`."""

    @abstractmethod
    def decoder(self, task: int, coding: Coding) -> nn.Module:
        """Make a torch module that maps outputs of rows of one task to predictions of them.

        Of classes, to probabilities.
        """

    @abstractmethod
    def episode_rows(
        self, tasks: TaskCollection, n_shots: int | None, n_queries: int | None
    ) -> int:
        """Rough number of rows of an episode."""

    def scored_shots(self, n_shots: int | None) -> dict[str, Any]:
        """Options of `EpisodeSampler` for the support rows of each task in `score`."""
        return {"n_shots": n_shots}

    def weights(self, y: np.ndarray, sample_weight: np.ndarray | None) -> np.ndarray | None:
        """Return the weights of rows with the targets `encode` gives; here those of the caller."""
        return sample_weight

    def attributes(self) -> dict[str, Any]:
        """Return what was learned."""
        return {name: getattr(self, name) for name in self.learned}

    def restore(self, attributes: dict[str, Any]) -> Self:
        """Take what was learned from `attributes`."""
        vars(self).update({n: attributes[n] for n in self.learned if n in attributes})
        return self

    def settings(self) -> dict[str, Any]:
        """Parameters that what was meta-learned depends on."""
        loss = (type(self.loss), str(sorted(self.loss.get_params().items())))
        return {
            "n_ways": self.n_ways,
            "center_y": self.center_y,
            "loss": loss,
            "class_weight": "None",
        }

    def sampling(self) -> dict[str, Any]:
        """Options of `EpisodeSampler` that are up to the targets."""
        return {
            "classification": self.are_classes,
            "n_ways": self.n_ways,
            "center_y": self.center_y,
        }

    def check_splittable(self, encoded: TaskCollection, n_shots: int | None) -> None:
        """Refuse tasks of which none can be split as asked."""
        check_splittable(encoded, n_shots, self.n_ways, self.are_classes)

    def usable(
        self, tasks: TaskCollection, n_shots: int | None, least: int = 0
    ) -> tuple[TaskCollection, str | None]:
        """Tasks that episodes can be made of, and words for those too small to be split."""
        return usable(tasks, n_shots, self.n_ways, self.are_classes, least)
