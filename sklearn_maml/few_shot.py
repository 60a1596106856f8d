"""Where the FewShot estimators were before they moved to `sklearn_maml.estimators`."""

from sklearn_maml.estimators.containers import adapt
from sklearn_maml.estimators.few_shot import FewShotClassifier, FewShotRegressor

__all__ = ["FewShotClassifier", "FewShotRegressor", "adapt"]
