"""What a meta-learned model is worth: scores by task, many tasks at a time, and baselines."""

from sklearn_maml.evaluation.comparison import compare_baselines, summarize_comparison
from sklearn_maml.evaluation.metrics import task_scorer, task_scores
from sklearn_maml.evaluation.out_of_fold import task_cross_val_predict
from sklearn_maml.evaluation.partition import adapt_predict

__all__ = [
    "adapt_predict",
    "compare_baselines",
    "summarize_comparison",
    "task_cross_val_predict",
    "task_scorer",
    "task_scores",
]
