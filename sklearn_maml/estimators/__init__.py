"""The estimators, and the functions that adapt them."""

import sklearn_maml.estimators.container_rules  # noqa: F401
from sklearn_maml.estimators.classifier import MAMLClassifier
from sklearn_maml.estimators.containers import adapt, register_container
from sklearn_maml.estimators.few_shot import FewShotClassifier, FewShotRegressor
from sklearn_maml.estimators.labelling import suggest_rows
from sklearn_maml.estimators.numbered import NumberedClasses
from sklearn_maml.estimators.regressor import MAMLRegressor

__all__ = [
    "FewShotClassifier",
    "FewShotRegressor",
    "MAMLClassifier",
    "MAMLRegressor",
    "NumberedClasses",
    "adapt",
    "register_container",
    "suggest_rows",
]
