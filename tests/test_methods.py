"""Every combination of methods either works or is refused in `fit` with its reason."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from skorch.callbacks import LRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.meta_gradients import FirstOrder, Implicit, Reptile, SecondOrder
from sklearn_maml.modules import ContextMLP
from sklearn_maml.update_rules import SGD, Adam

META_GRADIENTS = {
    "second-order": "second-order",
    "first-order": "first-order",
    "annealed": SecondOrder(first_order_updates=1),
    "multi-step": SecondOrder(multi_step_updates=2),
    "first-order, multi-step": FirstOrder(multi_step_updates=2),
    "implicit": "implicit",
    "implicit, neumann": Implicit(lam=20.0, solver="neumann"),
    "reptile": "reptile",
    "reptile, minibatches": Reptile(batch_size=3),
    "reptile, adam": Reptile(step_size=None),
}
LEARNING = ("meta-sgd", "per-layer-per-step", "learned-alpha")
CLOSED = ("ridge-head", "logistic-head")
RULES = {
    "sgd": "sgd",
    "clipped": SGD(max_grad_norm=0.1),
    "momentum": "momentum",
    "adam": "adam",
    **{name: name for name in (*LEARNING, *CLOSED)},
}
ADAPTED = {"all": "all", "head": "head", "body": "body", "pattern": ["0.*", "2.bias"]}
ESTIMATORS = {
    "regressor": (MAMLRegressor, {}),
    "regressor, centred": (MAMLRegressor, {"center_y": True}),
    "classifier": (MAMLClassifier, {"n_ways": 2, "n_shots": 2}),
    "classifier, shared head": (MAMLClassifier, {"n_ways": 2, "n_shots": 2, "head": "shared"}),
    "classifier, zero head": (MAMLClassifier, {"n_ways": 2, "n_shots": 2, "head": "zero"}),
}


def reasons(gradient, rule, adapted, estimator, checkpoint_steps):
    """Patterns of the messages with which a combination may be refused; none if it works."""
    found = []
    if rule in CLOSED:
        if gradient.startswith(("implicit", "reptile")):
            found.append(r"takes no gradient steps, which meta_gradient=.* is about")
        if adapted != "head":
            found.append(r"solves for the (last )?linear layer.*Set adapted='head'")
        if "head" in estimator:
            found.append(r"head='(shared|zero)' is where inner steps start from.*takes none")
    if rule == "logistic-head" and estimator.startswith("regressor"):
        found.append(r"is for classes")
    if rule in LEARNING and gradient.startswith("implicit"):
        found.append(r"'implicit' cannot train an update rule that learns")
    if rule in LEARNING and gradient.startswith("reptile"):
        found.append(r"'reptile' cannot train an update rule that learns")
    if gradient.startswith("reptile") and adapted != "all":
        found.append(r"needs adapted='all'")
    if "head" in estimator and adapted in ("body", "pattern"):
        found.append(r"head='(shared|zero)'.* does not adapt")
    if "multi-step" in gradient and checkpoint_steps:
        found.append(r"multi_step_updates=2 cannot be combined with engine__checkpoint_steps=True")
    return found


def make_tasks(classification, n_tasks=6, n_rows=8):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_tasks, n_rows, 3))
    if classification:  # which class is the larger one differs between tasks
        y = np.tile(np.arange(n_rows) % 2, (n_tasks, 1))
        sign = np.arange(n_tasks)[:, None] % 2 * 2 - 1
        return X + (2 * sign * (2 * y - 1))[..., None], y
    return X, X @ rng.normal(size=3) + rng.normal(size=(n_tasks, 1))


def outputs(model, X):
    return model.predict_proba(X) if isinstance(model, MAMLClassifier) else model.predict(X)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradient", META_GRADIENTS)
def test_every_combination_works_or_is_refused_with_its_reason(gradient, rule):
    n_fitted = n_refused = 0
    grid = itertools.product(ADAPTED, ESTIMATORS, (False, True))
    for adapted, estimator, checkpoint_steps in grid:
        where = f"{gradient}, {rule}, {adapted}, {estimator}, checkpoint_steps={checkpoint_steps}"
        kind, options = ESTIMATORS[estimator]
        X, y = make_tasks(kind is MAMLClassifier)
        model = kind(
            hidden_layer_sizes=(4,),
            activation="tanh",
            meta_gradient=META_GRADIENTS[gradient],
            update_rule=RULES[rule],
            adapted=ADAPTED[adapted],
            engine__checkpoint_steps=checkpoint_steps,
            steps=2,
            max_iter=2,
            early_stopping=False,
            random_state=0,
            **options,
        )
        expected = reasons(gradient, rule, adapted, estimator, checkpoint_steps)
        if expected:
            n_refused += 1
            with pytest.raises(ValueError, match="(?s)" + "|".join(expected)):
                model.fit(X, y)
            assert not hasattr(model, "module_"), where
            continue
        n_fitted += 1
        model.fit(X, y)
        model.adapt(X[0, :4], y[0, :4])
        after = outputs(model, X[0])
        assert np.isfinite(after).all(), where
        before = outputs(model.set_params(adapt_steps=0).adapt(X[0, :4], y[0, :4]), X[0])
        assert not np.allclose(before, after, rtol=1e-6, atol=0), where
        start = kind(**{**model.get_params(), "beta": 1e-300, "max_iter": 1, "adapt_steps": None})
        if gradient.startswith("reptile") and gradient != "reptile, adam":
            start.set_params(meta_gradient=Reptile(step_size=1e-300))
        # the same random start, not trained: everything that can be trained has moved
        untrained = start.fit(X, y)._learner.state_dict()
        for name, value in model._learner.state_dict().items():
            head = name.startswith("module.2")
            if head and "shared head" in estimator:
                continue  # equal for all classes, it drops out of the softmax: rounding alone
            still = head and (rule in CLOSED or "zero head" in estimator)
            # the first-order gradient takes the solution as a constant, and with it its penalty
            still |= name == "rule.lam" and gradient.startswith("first-order")
            assert torch.equal(value, untrained[name]) == still, f"{where}: {name}"
    assert n_fitted + n_refused == 40
    assert n_refused < 40 or rule in (*LEARNING, *CLOSED), "nothing that works is left"


METHODS = Path(__file__).parents[1] / "docs/methods.md"
LINES = re.findall(r"^\| (.+?) \| `(.+)` \|$", METHODS.read_text(), re.M)
NAMES = {
    "Adam": Adam,
    "ContextMLP": ContextMLP,
    "CosineAnnealingLR": CosineAnnealingLR,
    "Implicit": Implicit,
    "LRScheduler": LRScheduler,
    "SecondOrder": SecondOrder,
}


def test_the_table_of_methods_names_those_of_the_field():
    names = " ".join(name for name, _ in LINES)
    methods = "MAML FOMAML Reptile iMAML ANIL BOIL Meta-SGD MAML++ R2-D2 CAVIA UNICORN-MAML"
    assert not [method for method in methods.split() if f"{method} (" not in names]


@pytest.mark.parametrize(("name", "parameters"), LINES, ids=[name for name, _ in LINES])
def test_each_line_of_the_table_of_methods_learns(name, parameters):
    options = eval(f"dict({parameters})", NAMES)
    only = {"clf": [MAMLClassifier], "reg": [MAMLRegressor]}
    kinds = only.get(name.rpartition(", ")[2], [MAMLRegressor, MAMLClassifier])
    for kind in kinds:
        X, y = make_tasks(kind is MAMLClassifier, n_tasks=30, n_rows=12)
        ways = {"n_ways": 2, "n_shots": 2} if kind is MAMLClassifier else {}
        settings = {
            "update_rule": "sgd",
            "steps": 5,
            "max_iter": 100,
            "random_state": 0,
            **ways,
            **options,
        }
        model = kind(**settings).fit(X[:20], y[:20])
        if settings["update_rule"] in (
            "gaussian-head",
            "auto",
        ):  # starts with much of what is learned
            last = model.history_[-1]
            assert last["valid_loss"] < last["valid_loss_before"]
        else:
            losses = model.history_[:, "train_loss"]
            assert losses[-1] < losses[0]
        adapted = model.score(X[20:], y[20:])
        before = model.set_params(adapt_steps=0).score(X[20:], y[20:])
        assert adapted > before


class Conv(nn.Sequential):
    """A small convolutional network with batch norm."""

    def __init__(self, out_features):
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, out_features),
        )


@pytest.mark.parametrize("plain", [True, False], ids=["Sequential", "subclass"])
@pytest.mark.parametrize("batch_norm", ["inductive", "transductive"])
@pytest.mark.parametrize("gradient", META_GRADIENTS)
def test_every_gradient_and_rule_trains_convolutions_with_batch_norm(gradient, batch_norm, plain):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(48, 1, 4, 4))
    y = np.repeat(np.arange(6), 8)
    X += y[:, None, None, None]
    for rule, adapted in itertools.product(RULES, ("all", "head")):
        module = Conv(2)
        model = MAMLClassifier(
            module=nn.Sequential(*module) if plain else module,
            n_ways=2,
            n_shots=2,
            n_queries=2,
            meta_gradient=META_GRADIENTS[gradient],
            update_rule=RULES[rule],
            adapted=adapted,
            engine__batch_norm=batch_norm,
            steps=2,
            max_iter=2,
            meta_batch_size=3,
            early_stopping=False,
            random_state=0,
        )
        where = f"{gradient}, {rule}, {adapted}"
        expected = reasons(gradient, rule, adapted, "classifier", False)
        if expected:
            with pytest.raises(ValueError, match="(?s)" + "|".join(expected)):
                model.fit(X, y)
            continue
        model.fit(X, y).adapt(X[4:12], y[4:12])
        assert np.isfinite(model.predict_proba(X[:16])).all(), where
