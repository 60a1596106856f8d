"""Where `compare_baselines` was before it moved to `sklearn_maml.evaluation`."""

from sklearn_maml.evaluation.comparison import compare_baselines, summarize_comparison

__all__ = ["compare_baselines", "summarize_comparison"]
