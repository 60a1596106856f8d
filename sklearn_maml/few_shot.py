"""Where the FewShot estimators were before they moved to `sklearn_maml.estimators`."""

from sklearn_maml.estimators.few_shot import FewShotClassifier, FewShotRegressor, adapt

__all__ = ["FewShotClassifier", "FewShotRegressor", "adapt"]
