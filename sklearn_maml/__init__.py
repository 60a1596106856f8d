"""Meta-learning for scikit-learn: MAML estimators that adapt to new tasks from a few rows."""

from sklearn_maml._startup import collection_paused

with collection_paused():
    from sklearn_maml.estimators import (
        FewShotClassifier,
        FewShotRegressor,
        MAMLClassifier,
        MAMLRegressor,
        NumberedClasses,
        adapt,
        register_container,
        suggest_rows,
    )
    from sklearn_maml.evaluation import (
        adapt_predict,
        compare_baselines,
        task_cross_val_predict,
        task_scorer,
        task_scores,
    )
    from sklearn_maml.inspection import class_permutation_audit
    from sklearn_maml.persistence import load, save
    from sklearn_maml.training.checkpoint import Checkpoint
    from sklearn_maml.versions import show_versions

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "FewShotClassifier",
    "FewShotRegressor",
    "MAMLClassifier",
    "MAMLRegressor",
    "NumberedClasses",
    "adapt",
    "adapt_predict",
    "class_permutation_audit",
    "compare_baselines",
    "load",
    "register_container",
    "save",
    "show_versions",
    "suggest_rows",
    "task_cross_val_predict",
    "task_scorer",
    "task_scores",
]
