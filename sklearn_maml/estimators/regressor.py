"""Meta-learning of numbers: `MAMLRegressor`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score

from sklearn_maml._types import Tasks, Weights
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.intervals import PredictingNumbers
from sklearn_maml.estimators.labelling import Suggesting
from sklearn_maml.targets.losses import resolve_loss
from sklearn_maml.targets.real import RealTargets


class MAMLRegressor(RegressorMixin, PredictingNumbers, Suggesting, BaseMAML):
    r"""Regressor that meta-learns, from related tasks, to adapt to a new task from a few rows.

    `fit` learns from a collection of tasks, `adapt` learns a new task from its support rows, and
    `predict` then predicts for that task. Model-agnostic meta-learning [1]_ learns the
    initialisation from which `steps` gradient steps of rate `alpha` on the support rows of a task
    give a small squared error, or other `loss`, on its query rows; by default a Gaussian head that
    is adapted in closed form is learned beside it, and held-out tasks choose, see `update_rule`.

    Parameters
    ----------
    module : torch.nn.Module class or instance, default=None
        Network. None builds a multilayer perceptron of `hidden_layer_sizes` and `activation`. A
        class is called with the ``module__*`` parameters, and with ``in_features`` and
        ``out_features`` if it takes parameters of these names and they are not given. An instance
        is copied; its weights are where meta-training starts. It maps (n_rows, n_features) to
        (n_rows, n_outputs).
    hidden_layer_sizes : int or sequence of int, default=(64, 64)
        Sizes of the hidden layers of the default network.
    activation : {"relu", "tanh", "gelu", "silu", "elu", "logistic", "identity"}, default="relu"
        Activation of the default network.
    loss : {"squared_error", "absolute_error", "huber", "quantile", "poisson", "gamma"} or Loss, \
            default="squared_error"
        What inner steps and meta-training lower. "absolute_error" makes predictions medians,
        "quantile" the quantile that `quantile` names; "huber" is linear in errors larger than
        ``loss__delta``. "poisson" is for counts (y >= 0) and "gamma" for positive numbers: half the
        deviance, of a network that gives logarithms of means. An object of a subclass of
        `sklearn_maml.targets.Loss` is taken, too: ``Huber(delta=0.5)``, or a loss of your own, with
        a domain of y and a link. "ridge-head" is for squared error alone.
    quantile : float, default=None
        Between 0 and 1: which quantile ``loss="quantile"`` is of; None for other losses.
    update_rule : str or UpdateRule, default="auto"
        How a task is learned. "auto" trains gradient steps ("sgd") and a Gaussian head side by
        side, and lets held-out tasks choose between them or a mixture (`learner_weights_`): steps
        get a share where they show a gain, and are given up early where they fall behind; those of
        Poisson and gamma losses clip the gradient of a task to a norm of 3. "gaussian-head" is the
        head alone: networks whose last layer has a Gaussian prior, learned across tasks, which is
        adapted in closed form and knows how far to trust a support set (ALPaCA [3]_). "sgd" is
        MAML as published [1]_ and nothing else. So are the other rules, which say how an inner step
        moves the parameters: with rates that are learned ("meta-sgd", "per-layer-per-step",
        "learned-alpha"), "momentum" or "adam". "ridge-head" solves for the last layer in place of
        taking steps, and needs ``adapted="head"``. See
        `sklearn_maml.update_rules`; ``update_rule__*`` are parameters of the rule. `alpha`,
        `steps`, `meta_gradient` and `adapted` are about gradient steps; the head takes `module`,
        too. With fewer than 4 tasks, without task information, with a `loss` of your own, and for
        modules that do not end in a linear layer or whose batch norm has no running averages (or is
        "transductive"), "auto" takes gradient steps alone.
    meta_gradient : str or MetaGradient, default="second-order"
        How the outer gradient comes about; ``meta_gradient__*`` are its parameters.
        "second-order" is exact through the inner steps, "first-order" takes the inner gradients
        as constants, "implicit" differentiates the solution of an inner problem with a proximal
        term (iMAML; the term acts in `adapt`, too), and "reptile" steps towards the parameters
        adapted to all rows of an episode. See `sklearn_maml.meta_gradients`.
    adapted : {"all", "head", "body"}, str or list of str, default="all"
        Parameters that adapt: all, those of the last layer (ANIL), all others (BOIL), or those
        whose names match shell-style patterns such as ``"2.*"``; the name of a context that the
        network takes beside its inputs (CAVIA, see `sklearn_maml.modules.ContextMLP`). The others
        are meta-learned only.
    alpha : float, default=0.03
        Inner rate: step size of adaptation. May be changed after `fit`.
    steps : int, default=10
        Inner steps. May be changed after `fit`.
    adapt_steps : int, default=None
        Inner steps in `adapt` and `score`, and in validation; None takes `steps`. With 0, whatever
        learns a task leaves the support set out: predictions are those before adaptation.
    beta : float, default=3e-3
        Outer rate: step size of meta-training, given to the optimiser.
    beta_decay : float, default=0.3
        Fraction of `max_iter`, at its end, over which beta falls linearly to 0; 0 keeps beta
        constant. A `skorch.callbacks.LRScheduler` in `callbacks` takes its place and begins anew
        with each fit; it moves once an epoch, of 50 updates, or with ``step_every="batch"``.
    max_grad_norm : float, default=1.0
        Scale meta-gradients of a larger 2-norm down to this one; None does not. A single large one,
        of a task whose inner steps diverge, can undo many updates.
    optimizer : {"adam", "adamw", "sgd"} or torch.optim.Optimizer class, default="adam"
        Outer optimiser; ``optimizer__*`` are its parameters.
    n_shots : int, default=None
        Support rows of a task in meta-training and in `score`. None varies the number from update
        to update, log-uniformly from 5 to 20 (at most half of the rows), so that one model serves
        small and large support sets. To search over it, score with ``task_scorer(..., n_shots=K)``:
        `score` splits by the value of each candidate.
    n_queries : int, default=10
        Query rows of a task in meta-training; None takes all that are left.
    meta_batch_size : int, default=25
        Tasks of a meta-update.
    max_iter : int, default=1000
        Meta-updates. A Gaussian head takes 6 in 10 of them, of a larger rate, or fewer where
        held-out tasks show that it only gets worse, of more than 100 features, and where it is all
        that is left, meta-training ends there.
    early_stopping : bool or "auto", default="auto"
        True holds out tasks, stops when their loss after adaptation has not improved for
        `n_iter_no_change` updates, and keeps the parameters that were best on them. "auto" does
        the same without stopping, where there are at least 10 tasks. False uses all tasks for
        meta-training and keeps the last parameters.
    validation_fraction : float, default=0.15
        Fraction of the tasks to hold out.
    n_iter_no_change : int, default=250
        Meta-updates without improvement before an early stop; held-out tasks are looked at every 50
        of them.
    normalize_y : bool, default=True
        Whether to standardise the targets with the mean and the standard deviation of all
        training rows: robust ones for absolute, Huber and quantile losses; those of "poisson" and
        "gamma" are divided by their mean; a `loss` of your own says what it allows. Predictions
        are in the units of y. If False, `alpha` has to suit these units: steps of the default rate
        diverge on targets of hundreds.
    center_y : bool, default=False
        Whether to subtract, in each task, the mean target of its support rows (weighted by
        `sample_weight`) from its targets, in meta-training as in `adapt`; predictions have it
        added back. For tasks that differ in level most of all: a fit then does not depend on the
        levels (the within transformation of panel data [2]_, with the mean of the support rows
        alone). With `normalize_y` the scale is that of deviations from the means of the tasks.
    task_column : str, int, other hashable or list of them, default=None
        Column of X that holds the task id: a column name or name of an index level of a data
        frame, or a position; a list if several together are the id. It then is in every X, and
        `groups`, where a tool passes them on, are for a splitter alone.
    unseen_tasks : {"error", "prior"}, default="error"
        What `predict` does for tasks that `adapt` has not seen, and before any `adapt`: "prior"
        predicts for the population of tasks, as after `adapt` to a task without rows. May be
        changed after `fit`.
    device : str or torch.device, default="auto"
        "auto" takes CUDA where there is one, but for small default models, which compiled kernels
        fit faster on the CPU.
    callbacks : list, default=None
        skorch callbacks, or ``(name, callback)`` pairs; ``callbacks__name__*`` are their
        parameters.
    warm_start : bool, default=False
        Whether another `fit` goes on from the last, which stands until held-out tasks do better.
    random_state : int, RandomState instance or None, default=None
        Seeds initialisation, episodes, and the splits of `score`.
    verbose : int, default=0
        1 prints a line for each epoch and, on a terminal, a progress bar.
    **net_params : dict
        Parameters with a prefix, which are ordinary ones to `get_params`, `set_params` and
        searches: ``module__*``, ``optimizer__*``, ``callbacks__*``, ``iterator_train__*``,
        ``iterator_valid__*``, ``loss__*``, ``update_rule__*``, ``meta_gradient__*``; and
        ``engine__*``, which say how batches are run:

        - ``engine__batch_norm`` ("inductive"): what batch-norm layers normalise query rows with, in
          meta-training, validation and predictions. "inductive" takes the statistics of the task's
          support set, so that predictions do not depend on which rows are predicted together;
          "transductive" those of the query rows themselves, all rows of the task in one call of
          `predict` together. May be changed after `fit`.
        - ``engine__precision`` ("full"): numbers of the network's matrix products. "full" are those
          of X; "tf32" lets CUDA round float32 factors to 10 bits; "bf16" computes layers in
          bfloat16 and keeps parameters, losses and inner steps. float64 is never rounded.
        - ``engine__max_tasks_in_memory`` (None): largest number of tasks to run at once, in
          meta-training, `adapt` and `predict`; larger batches run in chunks, with the same results
          to rounding. None makes chunks (with a warning) when memory has run out.
        - ``engine__checkpoint_steps`` (False): True has second-order meta-gradients keep only the
          parameters of each inner step, and compute its graph anew when they get to it: the same
          gradient for less memory and more time.

    Attributes
    ----------
    module_ : torch.nn.Module
        Network with the meta-learned initialisation; where a Gaussian head was trained alone, the
        head, whose outputs are population predictions.
    net_ : skorch.NeuralNet
        The net that was meta-trained.
    history_ : skorch.history.History
        Per epoch: `train_loss` (query loss after adaptation), `valid_loss` and
        `valid_loss_before` (of held-out tasks, after and before adaptation), `non_finite` (skipped
        meta-updates), `dur` (seconds). With a Gaussian head these losses are the head's, and
        `steps_valid_loss`, `steps_valid_loss_before` those of gradient steps beside it.
    n_iter_ : int
        Meta-updates made.
    n_outputs_ : int
        Number of targets.
    y_mean_, y_scale_ : ndarray of shape (`n_outputs_`,)
        Mean and scale of the targets, robust ones for robust losses. With `center_y` the means of
        the tasks stand in for `y_mean_`, and `y_scale_` is the standard deviation from them.
    learner_weights_ : dict of str to float
        Shares of predictions: of "gradient-steps" and of the "gaussian-head", whichever was
        trained.
    targets_ : sklearn_maml.targets.RealTargets
        What y means: how it is encoded for the loss, and outputs are decoded.
    n_features_in_ : int
        Number of features seen during `fit`, the task column included.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had names.
    n_tasks_ : int or None
        Number of tasks; None for a task distribution.
    tasks_ : ndarray of shape (`n_tasks_`,) or None
        Their ids, or positions where they have none.
    device_ : torch.device
        Where parameters live.

    See Also
    --------
    MAMLClassifier : The same for class labels.
    FewShotRegressor : Ordinary per-task estimator made from a fitted `MAMLRegressor`.
    adapt : Adapt a copy of a fitted model or pipeline.
    task_scorer : Any scikit-learn metric, after adaptation.

    Notes
    -----
    Meta-training minimises over the initialisation :math:`\theta`, for tasks :math:`j` with
    support loss :math:`S_j` and query loss :math:`Q_j`,

    .. math:: \frac{1}{n} \sum_j Q_j(\theta_j^{(s)}), \quad
        \theta_j^{(k+1)} = \theta_j^{(k)} - \alpha \nabla S_j(\theta_j^{(k)}),
        \quad \theta_j^{(0)} = \theta

    with Adam of rate `beta` (Finn et al. 2017, algorithm 1). `fit(X, y)` without any task
    information treats all rows as one task: it meta-trains on random splits of it and adapts to
    all of it, so that the estimator behaves as an ordinary one; as splits of the same rows differ
    little, it makes at most 100 updates, of at most 4 splits each.

    Batch-norm layers normalise support rows with the statistics of the support set, at the
    parameters of each inner step, and query rows as ``engine__batch_norm`` says: "transductive"
    predictions use the other query rows of their task, as the published scores of [1]_ do.

    References
    ----------
    .. [1] Finn, C., Abbeel, P. & Levine, S. (2017). Model-Agnostic Meta-Learning for Fast
       Adaptation of Deep Networks. ICML. Algorithms 1 and 2.
    .. [2] Wooldridge, J. M. (2010). Econometric Analysis of Cross Section and Panel Data. MIT
       Press. Section 10.5.
    .. [3] Harrison, J., Sharma, A. & Pavone, M. (2018). Meta-Learning Priors for Efficient Online
       Bayesian Regression. WAFR. Section 3.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=200, n_rows=20, random_state=0)
    >>> reg = MAMLRegressor(update_rule="sgd", alpha=0.01, steps=1, max_iter=200, random_state=0)
    >>> reg = reg.fit(X, y, groups=task)
    >>> X_new, y_new, _ = make_sinusoid_tasks(n_tasks=1, n_rows=20, random_state=1)
    >>> reg.adapt(X_new[:10], y_new[:10]).predict(X_new[10:]).shape
    (10,)
    """

    n_outputs_: int
    y_mean_: NDArray[Any]
    y_scale_: NDArray[Any]
    _targets_class = RealTargets
    _prefixes: ClassVar = {"loss": None}
    __stored_attributes__: ClassVar = RealTargets.learned

    __metadata_request__predict: ClassVar = {
        "groups": True,
        "return_std": True,
        "return_quantiles": True,
    }

    def __init__(
        self,
        module: Any = None,
        *,
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "relu",
        loss: Any = "squared_error",
        quantile: float | None = None,
        update_rule: Any = "auto",
        meta_gradient: Any = "second-order",
        adapted: Any = "all",
        alpha: float = 0.03,
        steps: int = 10,
        adapt_steps: int | None = None,
        beta: float = 3e-3,
        beta_decay: float = 0.3,
        max_grad_norm: float | None = 1.0,
        optimizer: Any = "adam",
        n_shots: int | None = None,
        n_queries: int | None = 10,
        meta_batch_size: int = 25,
        max_iter: int = 1000,
        early_stopping: Any = "auto",
        validation_fraction: float = 0.15,
        n_iter_no_change: int = 250,
        normalize_y: bool = True,
        center_y: bool = False,
        task_column: Hashable | None = None,
        unseen_tasks: str = "error",
        device: Any = "auto",
        callbacks: Any = None,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        **net_params: Any,
    ) -> None:
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.loss = loss
        self.quantile = quantile
        self.update_rule = update_rule
        self.meta_gradient = meta_gradient
        self.adapted = adapted
        self.alpha = alpha
        self.steps = steps
        self.adapt_steps = adapt_steps
        self.beta = beta
        self.beta_decay = beta_decay
        self.max_grad_norm = max_grad_norm
        self.optimizer = optimizer
        self.n_shots = n_shots
        self.n_queries = n_queries
        self.meta_batch_size = meta_batch_size
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.normalize_y = normalize_y
        self.center_y = center_y
        self.task_column = task_column
        self.unseen_tasks = unseen_tasks
        self.device = device
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.__dict__.update(net_params)

    def score(
        self,
        X: Tasks,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sample_weight: Weights = None,
    ) -> float:
        """Return the coefficient of determination after adaptation, query rows pooled.

        Each task is split into a support set of `n_shots` rows (10 or half of the smallest task
        if None) and the query rows it is scored on. After ``adapt(X_support, y_support)`` for one
        task, a call without task information scores the predictions of that task; before, it
        takes all rows for one new task.

        Parameters
        ----------
        X, y, groups : tasks
            As in `fit`.
        sample_weight : array-like of shape (n_rows,), str or dict, default=None
            Weights of the rows in the metric, spelt as in `fit`.

        Returns
        -------
        score : float
            R^2 of the pooled query rows.
        """
        return self._score(X, y, groups, sample_weight, r2_score)

    def _validate_params(self) -> None:
        super()._validate_params()
        if self.quantile is not None and self.loss != "quantile":
            raise ValueError(
                f"quantile={self.quantile!r} is for loss='quantile', but loss={self.loss!r}, which "
                "has no use for it. Set loss='quantile', or leave quantile out."
            )

    def _make_targets(self) -> RealTargets:
        options = self._prefixed("loss")
        if self.loss == "quantile":
            options = {"quantile": self.quantile, **options}
        loss = resolve_loss(self.loss, options)
        return RealTargets(loss, self.normalize_y, bool(self.center_y))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
