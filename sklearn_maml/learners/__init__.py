"""How a task is learned: by gradient steps, by a Gaussian head in closed form, or both."""

from sklearn_maml.learners.learner import Learner, Problem

__all__ = ["Learner", "Problem"]
