"""Fits in several processes: the public name of `sklearn_maml.training.distributed`."""

from sklearn_maml.training.distributed import single_process

__all__ = ["single_process"]
