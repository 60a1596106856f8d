"""The estimators, and the functions that adapt them."""

from sklearn_maml.estimators.classifier import MAMLClassifier
from sklearn_maml.estimators.few_shot import FewShotClassifier, FewShotRegressor, adapt
from sklearn_maml.estimators.regressor import MAMLRegressor

__all__ = ["FewShotClassifier", "FewShotRegressor", "MAMLClassifier", "MAMLRegressor", "adapt"]
