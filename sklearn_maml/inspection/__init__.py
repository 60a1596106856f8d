"""Looking into meta-learned models: what adapting does to scores, fits and class orders.

Displays follow scikit-learn's convention: `from_estimator` computes, the constructor stores, and
`plot` draws. They need matplotlib; nothing else of the library does.
"""

from sklearn_maml.inspection.adaptation_curve import AdaptationCurveDisplay
from sklearn_maml.inspection.few_shot_fit import FewShotFitDisplay
from sklearn_maml.inspection.meta_training import MetaTrainingDisplay
from sklearn_maml.inspection.permutation_audit import class_permutation_audit
from sklearn_maml.inspection.task_scores import TaskScoresDisplay

__all__ = [
    "AdaptationCurveDisplay",
    "FewShotFitDisplay",
    "MetaTrainingDisplay",
    "TaskScoresDisplay",
    "class_permutation_audit",
]
