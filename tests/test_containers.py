"""`adapt`, the FewShot estimators and scores of models that hold MAML estimators."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import sklearn
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RANSACRegressor, Ridge
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    GroupKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
)
from sklearn.multiclass import (
    OneVsOneClassifier,
    OneVsRestClassifier,
    OutputCodeClassifier,
)
from sklearn.multioutput import (
    ClassifierChain,
    MultiOutputClassifier,
    MultiOutputRegressor,
    RegressorChain,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import sklearn_maml
from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    NumberedClasses,
    adapt,
    adapt_predict,
    register_container,
    task_scorer,
    task_scores,
)

TASK = 3  # position of the task column
SMALL = {
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 2,
    "hidden_layer_sizes": (8,),
    "max_iter": 5,
    "random_state": 0,
    "task_column": TASK,
}


def rows(seed=0, n_tasks=10, n_rows=12, first=0):
    """Rows with their task id as the last column, and targets that differ by task."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, 3))
    task = np.repeat(np.arange(n_tasks), n_rows)
    slope = rng.normal(size=(n_tasks, 3))
    return np.c_[X, first + task], (X * slope[task]).sum(1)


def no_score(*_):
    return 0.0


NAMES = ("run", "sit", "walk")


def labels_of(y, names=NAMES):
    """Labels by thirds (or halves) of the targets: shared by the tasks."""
    edges = np.quantile(y, np.linspace(0, 1, len(names) + 1)[1:-1])
    return np.array(names)[np.searchsorted(edges, y)]


X, Y = rows()
NEW_X, NEW_Y = rows(1, 1, 20, first=77)
SUPPORT, OTHER = slice(0, 10), slice(10, 20)


@pytest.fixture(scope="module")
def reg():
    return MAMLRegressor(**SMALL).fit(X, Y)


@pytest.fixture(scope="module")
def clf():
    return MAMLClassifier(**SMALL).fit(X, labels_of(Y))


@pytest.fixture(scope="module")
def yes_no():
    return MAMLClassifier(**SMALL).fit(X, labels_of(Y, ("no", "yes")))


@pytest.fixture(scope="module")
def local():
    return MAMLClassifier(**SMALL, n_ways=3, n_shots=1, n_queries=2).fit(X, np.tile(NAMES, 40))


def adapted_to(model, y, part=SUPPORT):
    return copy.copy(model).adapt(NEW_X[part], np.asarray(y)[part])


# -- regressors ----------------------------------------------------------------------------------


def transformed(reg):
    model = TransformedTargetRegressor(reg, func=np.arcsinh, inverse_func=np.sinh).fit(X, Y)
    one = adapted_to(model.regressor_, np.arcsinh(NEW_Y))
    return model, np.sinh(one.predict(NEW_X))


def transformed_and_scaled(reg):
    # two targets for one: the transformer sees columns
    model = TransformedTargetRegressor(reg, transformer=StandardScaler()).fit(X, Y)
    scaler = model.transformer_
    one = adapted_to(model.regressor_, scaler.transform(NEW_Y[:, None])[:, 0])
    return model, scaler.inverse_transform(one.predict(NEW_X)[:, None])[:, 0]


def voting(reg):
    members = [
        ("a", reg),
        ("none", "drop"),
        ("b", clone(reg).set_params(alpha=0.3)),
        ("r", Ridge()),
    ]
    model = VotingRegressor(members, weights=[3, 5, 1, 1]).fit(X, Y)
    a, b, ridge = model.estimators_
    parts = [adapted_to(m, NEW_Y).predict(NEW_X) for m in (a, b)] + [ridge.predict(NEW_X)]
    return model, np.average(parts, axis=0, weights=[3, 1, 1])


def bagging(reg):
    # every member sees other columns; the task column is not among those that are drawn
    plain = clone(reg).set_params(task_column=None, max_iter=3)
    model = BaggingRegressor(plain, n_estimators=2, max_features=2, random_state=0)
    with pytest.warns(sklearn_maml.exceptions.SingleTaskWarning):
        model.fit(X, Y)
    parts = [
        copy.copy(member).adapt(NEW_X[SUPPORT][:, which], NEW_Y[SUPPORT]).predict(NEW_X[:, which])
        for member, which in zip(model.estimators_, model.estimators_features_, strict=True)
    ]
    return model, np.mean(parts, axis=0)


def several_outputs(reg):
    model = MultiOutputRegressor(reg).fit(X, np.c_[Y, Y**2])
    a, b = model.estimators_
    parts = [adapted_to(a, NEW_Y).predict(NEW_X), adapted_to(b, NEW_Y**2).predict(NEW_X)]
    return model, np.stack(parts, axis=1)


def stacking(reg):
    members = [("maml", adapted_to(reg, NEW_Y, OTHER)), ("ridge", Ridge().fit(X, Y))]
    final = Ridge()
    # a task for which it learns how far to trust each
    model = StackingRegressor(members, final_estimator=final, cv="prefit").fit(
        NEW_X[OTHER], NEW_Y[OTHER]
    )
    columns = [adapted_to(reg, NEW_Y).predict(NEW_X), members[1][1].predict(NEW_X)]
    return model, model.final_estimator_.predict(np.stack(columns, axis=1))


def stacking_of_few_shot(reg):
    model = StackingRegressor([("one", FewShotRegressor(reg))], final_estimator=Ridge(), cv=2)
    model.fit(NEW_X[OTHER], NEW_Y[OTHER])
    column = adapted_to(reg, NEW_Y).predict(NEW_X)
    return model, model.final_estimator_.predict(column[:, None])


def nested(reg):
    scale = make_column_transformer((StandardScaler(), [0, 1, 2]), ("passthrough", [TASK]))
    inside = VotingRegressor([("a", reg), ("b", FrozenEstimator(reg))])
    model = make_pipeline("passthrough", make_pipeline(scale, inside)).fit(X, Y)
    new = model[-1][0].transform(NEW_X)
    parts = [
        copy.copy(member).adapt(new[SUPPORT], NEW_Y[SUPPORT]).predict(new)
        for member in (model[-1][-1].estimators_[0], reg)
    ]
    return model, np.mean(parts, axis=0)


def searched(reg):
    search = GridSearchCV(
        TransformedTargetRegressor(reg, func=np.arcsinh, inverse_func=np.sinh),
        {"regressor__alpha": [0.05]},
        cv=GroupKFold(2),
        scoring=no_score,
    )
    search.fit(X, Y, groups=X[:, TASK])
    one = adapted_to(search.best_estimator_.regressor_, np.arcsinh(NEW_Y))
    return search, np.sinh(one.predict(NEW_X))


def chain(reg):
    """Targets of the outputs before are features: in `fit` and `adapt` those that are known."""
    model = RegressorChain(reg, order=[1, 0]).fit(X, np.c_[Y, Y**2])
    square, last = model.estimators_
    first = adapted_to(square, NEW_Y**2).predict(NEW_X)
    given = np.c_[NEW_X, NEW_Y**2][SUPPORT]
    second = copy.copy(last).adapt(given, NEW_Y[SUPPORT]).predict(np.c_[NEW_X, first])
    return model, np.c_[second, first]


def boosting(reg):
    prior = clone(reg).set_params(unseen_tasks="prior")  # it predicts before anybody adapts
    model = AdaBoostRegressor(prior, n_estimators=3, random_state=0).fit(X, Y)
    predicted = np.stack([adapted_to(m, NEW_Y).predict(NEW_X) for m in model.estimators_], 1)
    order = predicted.argsort(1)
    weight = model.estimator_weights_[order].cumsum(1)
    median = (weight >= 0.5 * weight[:, -1:]).argmax(1)
    rows = np.arange(len(NEW_X))
    return model, predicted[rows, order[rows, median]]


def importance_of(model):
    return np.array([3.0, 1.0, 2.0, 4.0])[: model.n_features_in_]


def elimination(reg):
    last = clone(reg).set_params(task_column=-1)
    model = RFE(last, n_features_to_select=3, importance_getter=importance_of).fit(X, Y)
    kept = NEW_X[:, [0, 2, 3]]
    one = copy.copy(model.estimator_).adapt(kept[SUPPORT], NEW_Y[SUPPORT])
    return model, one.predict(kept)


REGRESSORS = [
    chain,
    boosting,
    elimination,
    transformed,
    transformed_and_scaled,
    voting,
    bagging,
    several_outputs,
    stacking,
    stacking_of_few_shot,
    nested,
    searched,
]


def targets_for(make, y):
    return np.c_[y, y**2] if make in (several_outputs, chain) else y


@pytest.mark.parametrize("make", REGRESSORS, ids=lambda make: make.__name__)
def test_every_maml_estimator_in_a_model_adapts(make, reg):
    model, expected = make(reg)
    before = pickle.dumps(model)
    y = targets_for(make, NEW_Y)
    adapted = adapt(model, NEW_X[SUPPORT], y[SUPPORT])
    assert_allclose(adapted.predict(NEW_X), expected, rtol=1e-6, atol=1e-9)
    assert pickle.dumps(model) == before
    # ... to another task anew, from what was meta-learned
    other = adapt(adapted, NEW_X[OTHER], y[OTHER])
    assert np.abs(other.predict(NEW_X) - expected).max() > 1e-4
    assert_array_equal(other.predict(NEW_X), adapt(model, NEW_X[OTHER], y[OTHER]).predict(NEW_X))


@pytest.mark.parametrize("make", REGRESSORS, ids=lambda make: make.__name__)
def test_such_a_model_is_the_prior_of_a_few_shot_estimator(make, reg):
    model, expected = make(reg)
    y = targets_for(make, NEW_Y)
    learner = clone(FewShotRegressor(model)).fit(NEW_X[SUPPORT], y[SUPPORT])
    assert learner.n_features_in_ == 4
    assert_allclose(learner.predict(NEW_X), expected, rtol=1e-6, atol=1e-9)
    faster = FewShotRegressor(model, alpha=0.2, steps=5).fit(NEW_X[SUPPORT], y[SUPPORT])
    assert np.abs(faster.predict(NEW_X) - expected).max() > 1e-4
    with pytest.raises(TypeError, match=r"must hold a MAMLClassifier; got a MAMLRegressor"):
        FewShotClassifier(model).fit(NEW_X[SUPPORT], labels_of(NEW_Y)[SUPPORT])


def test_weights_and_tasks_reach_every_maml_estimator(reg):
    model = VotingRegressor([("a", reg), ("b", clone(reg).set_params(random_state=1))]).fit(X, Y)
    few, y_few = rows(5, 3, 6, first=50)
    weight = np.linspace(0.1, 1, len(few))
    adapted = adapt(model, few, y_few, sample_weight=weight)
    parts = [copy.copy(m).adapt(few, y_few, sample_weight=weight) for m in model.estimators_]
    expected = np.mean([part.predict(few) for part in parts], axis=0)
    assert_allclose(adapted.predict(few), expected, rtol=1e-6)
    assert np.abs(adapt(model, few, y_few).predict(few) - expected).max() > 1e-6


def test_a_list_of_tasks_passes_through_transformers_of_rows_and_targets(reg):
    plain = clone(reg).set_params(task_column=None)
    tasks = [(X[X[:, TASK] == j][:, :3], Y[X[:, TASK] == j]) for j in range(5)]
    maml = plain.fit(tasks)
    target = TransformedTargetRegressor(maml, func=np.arcsinh, inverse_func=np.sinh)
    target.transformer_ = FunctionTransformer(np.arcsinh, np.sinh).fit(Y[:, None])
    target.regressor_ = maml
    scale = StandardScaler().fit(X[:, :3])
    model = Pipeline([("scale", scale), ("target", target)])
    adapted = adapt(model, tasks)[-1].regressor_
    expected = copy.copy(maml).adapt([(scale.transform(a), np.arcsinh(b)) for a, b in tasks])
    query = [scale.transform(a) for a, _ in tasks]
    for ours, theirs in zip(adapted.predict(query), expected.predict(query), strict=True):
        assert_array_equal(ours, theirs)


# -- classifiers ---------------------------------------------------------------------------------

LABELS = labels_of(NEW_Y)
BINARY = labels_of(NEW_Y, ("no", "yes"))


def codes(labels):
    return np.unique(labels, return_inverse=True)[1]


def test_members_of_an_ensemble_get_the_numbers_that_they_know(clf):
    y = labels_of(Y)
    model = VotingClassifier([("a", clf), ("d", DummyClassifier())], voting="soft").fit(X, y)
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT])
    member, dummy = model.estimators_
    parts = [adapted_to(member, codes(LABELS)), dummy]
    expected = np.mean([part.predict_proba(NEW_X) for part in parts], axis=0)
    assert_allclose(adapted.predict_proba(NEW_X), expected, rtol=1e-6)
    assert set(adapted.predict(NEW_X)) <= set(LABELS)
    assert adapted.named_estimators_["a"] is adapted.estimators_[0]
    with pytest.raises(ValueError, match=r"not seen in fit: \['swim'\]"):
        adapt(model, NEW_X[:2], ["run", "swim"])

    bag = BaggingClassifier(clf, n_estimators=2, random_state=0).fit(X, y)
    adapted = adapt(bag, NEW_X[SUPPORT], LABELS[SUPPORT])
    expected = np.mean(
        [adapted_to(m, codes(LABELS)).predict_proba(NEW_X) for m in bag.estimators_], axis=0
    )
    assert_allclose(adapted.predict_proba(NEW_X), expected, rtol=1e-6)


def test_members_that_know_labels_get_labels(clf):
    members = [("a", adapted_to(clf, LABELS, OTHER)), ("d", DummyClassifier().fit(X, labels_of(Y)))]
    model = StackingClassifier(members, final_estimator=LogisticRegression(), cv="prefit")
    model.fit(NEW_X, LABELS)
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT])
    columns = [adapted_to(clf, LABELS), members[1][1]]
    expected = model.final_estimator_.predict_proba(
        np.concatenate([part.predict_proba(NEW_X) for part in columns], axis=1)
    )
    assert_allclose(adapted.predict_proba(NEW_X), expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_a_calibration_stays_when_the_model_in_it_adapts(clf, method):
    frozen = FrozenEstimator(adapted_to(clf, LABELS, OTHER))
    model = CalibratedClassifierCV(frozen, method=method).fit(NEW_X, LABELS)
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT])
    by_hand = copy.deepcopy(model)
    for part in by_hand.calibrated_classifiers_:
        part.estimator = adapted_to(clf, LABELS)
    assert_array_equal(adapted.predict_proba(NEW_X), by_hand.predict_proba(NEW_X))
    plain = adapted_to(clf, LABELS).predict_proba(NEW_X)
    assert np.abs(adapted.predict_proba(NEW_X) - plain).max() > 1e-3


def test_a_threshold_stays_when_the_model_in_it_adapts(yes_no):
    one = adapted_to(yes_no, BINARY, OTHER)
    fixed = FixedThresholdClassifier(FrozenEstimator(one), threshold=0.9, pos_label="yes")
    tuned = TunedThresholdClassifierCV(one, cv="prefit", refit=False).fit(NEW_X, BINARY)
    expected = adapted_to(yes_no, BINARY).predict_proba(NEW_X)[:, 1]
    for model, threshold in ((fixed.fit(NEW_X, BINARY), 0.9), (tuned, tuned.best_threshold_)):
        adapted = adapt(model, NEW_X[SUPPORT], BINARY[SUPPORT])
        assert_array_equal(adapted.predict(NEW_X), np.where(expected >= threshold, "yes", "no"))
    assert set(fixed.predict(NEW_X)) == {"no"}  # of which 0.5 would say something else


def test_one_model_of_each_class_or_output_adapts_to_its_own_column(yes_no):
    y = labels_of(Y)
    shared = clone(yes_no)
    model = OneVsRestClassifier(shared).fit(X, y)
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT])
    columns = [
        adapted_to(member, (label == LABELS).astype(int)).predict_proba(NEW_X)[:, 1]
        for label, member in zip(model.classes_, model.estimators_, strict=True)
    ]
    p = np.stack(columns, axis=1)
    assert_allclose(adapted.predict_proba(NEW_X), p / p.sum(1, keepdims=True), rtol=1e-6)
    with pytest.raises(ValueError, match="not seen in fit"):
        adapt(model, NEW_X[:2], ["run", "swim"])

    several = MultiOutputClassifier(shared).fit(X, np.c_[y, labels_of(Y, ("no", "yes"))])
    adapted = adapt(several, NEW_X[SUPPORT], np.c_[LABELS, BINARY][SUPPORT])
    for j, target in enumerate((LABELS, BINARY)):
        one = adapted_to(several.estimators_[j], target)
        assert_array_equal(adapted.predict(NEW_X)[:, j], one.predict(NEW_X))
    with pytest.raises(ValueError, match="must have the 2 outputs"):
        adapt(several, NEW_X[SUPPORT], LABELS[SUPPORT])


def test_models_of_pairs_and_codes_are_those_of_scikit_learn(clf, yes_no):
    """Adapted from one prior to a support set, they are what scikit-learn fits on it."""
    for kind, low in ((OneVsOneClassifier, 0), (OutputCodeClassifier, -1)):
        few = FewShotClassifier(clone(yes_no).fit(X, np.where(Y > 0, 1, low)))
        model = kind(few).set_params(**{} if low == 0 else {"random_state": 0})
        fitted = clone(model).fit(NEW_X[SUPPORT], LABELS[SUPPORT])
        other = clone(model).fit(NEW_X[OTHER], LABELS[OTHER])
        adapted = adapt(other, NEW_X[SUPPORT], LABELS[SUPPORT])
        assert_array_equal(adapted.predict(NEW_X), fitted.predict(NEW_X))
        assert (adapted.predict(NEW_X) != other.predict(NEW_X)).any()
        for one, same in zip(adapted.estimators_, fitted.estimators_, strict=True):
            assert_allclose(one.predict_proba(NEW_X), same.predict_proba(NEW_X), rtol=1e-6)
        with pytest.raises(ValueError, match="not seen in fit"):
            adapt(fitted, NEW_X[:2], ["run", "swim"])


def test_the_members_of_pairs_adapt_to_their_rows_with_ids_and_weights(yes_no):
    """A pair without rows predicts for the population."""
    # the ids are a feature here, of 77 at most: steps of .1 would explode
    plain = clone(yes_no).set_params(task_column=None, alpha=1e-3)
    with sklearn.config_context(enable_metadata_routing=True):
        asks = plain.set_fit_request(sample_weight=True)
        model = OneVsOneClassifier(asks).fit(X, labels_of(Y), groups=X[:, TASK])
    weight = np.linspace(0.5, 2, 10)
    one_task = {"groups": np.full(10, 7), "sample_weight": weight}
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT], **one_task)
    rows = np.flatnonzero(LABELS[SUPPORT] != "walk")
    of_pair = copy.copy(model.estimators_[0]).adapt(
        NEW_X[rows], (LABELS[rows] == "sit").astype(int), sample_weight=weight[rows]
    )
    assert_allclose(adapted.estimators_[0].predict_proba(NEW_X), of_pair.predict_proba(NEW_X))
    by_list = adapt(model, [(NEW_X[SUPPORT], LABELS[SUPPORT])])
    unweighted = copy.copy(model.estimators_[0]).adapt(NEW_X[rows], (LABELS[rows] == "sit") * 1)
    assert_allclose(by_list.estimators_[0].predict_proba(NEW_X), unweighted.predict_proba(NEW_X))
    with pytest.raises(ValueError, match="give rows and groups in place of the list"):
        adapt(model, [(NEW_X[SUPPORT], LABELS[SUPPORT])], sample_weight=[weight])
    walks = LABELS == "walk"
    alone = adapt(model, NEW_X[walks], LABELS[walks])
    none = copy.copy(model.estimators_[0]).adapt(NEW_X[:0], LABELS[:0])
    assert_allclose(alone.estimators_[0].predict_proba(NEW_X), none.predict_proba(NEW_X))


def test_the_weights_of_boosted_classifiers_stay(clf):
    prior = clone(clf).set_params(unseen_tasks="prior", max_iter=40)
    model = AdaBoostClassifier(prior, n_estimators=2, random_state=0).fit(X, labels_of(X[:, 0]))
    adapted = adapt(model, NEW_X[SUPPORT], LABELS[SUPPORT])
    votes = sum(
        weight * (adapted_to(member, LABELS).predict(NEW_X)[:, None] == model.classes_)
        for weight, member in zip(model.estimator_weights_, model.estimators_, strict=False)
    )
    assert_array_equal(adapted.predict(NEW_X), model.classes_[votes.argmax(1)])
    assert (adapted.predict(NEW_X) != model.predict(NEW_X)).any()


def test_a_chain_of_classifiers_adapts_in_its_order(yes_no):
    both = np.c_[Y > 0, X[:, 0] > 0].astype(int)
    model = ClassifierChain(clone(yes_no), order=[1, 0]).fit(X, both)
    new = np.c_[NEW_Y > 0, NEW_X[:, 0] > 0].astype(int)
    adapted = adapt(model, NEW_X[SUPPORT], new[SUPPORT])
    first = adapted_to(model.estimators_[0], new[:, 1]).predict(NEW_X)
    given = np.c_[NEW_X, new[:, 1]][SUPPORT]
    last = copy.copy(model.estimators_[1]).adapt(given, new[SUPPORT, 0])
    assert_array_equal(adapted.predict(NEW_X), np.c_[last.predict(np.c_[NEW_X, first]), first])
    by_list = adapt(model, [(NEW_X[SUPPORT], new[SUPPORT])])
    (given,) = by_list.estimators_[1].predict_proba([np.c_[NEW_X, first]])
    assert_allclose(given, last.predict_proba(np.c_[NEW_X, first]))
    with pytest.raises(ValueError, match="must have the 2 outputs"):
        adapt(model, NEW_X[SUPPORT], new[SUPPORT, 0])


def test_ensembles_of_models_with_local_labels_take_other_labels(local):
    y, new = np.tile(NAMES, 40), labels_of(NEW_Y, ("Ada", "Bea", "Cleo"))
    for model in (
        VotingClassifier([("a", local), ("b", clone(local).set_params(alpha=0.3))], voting="soft"),
        VotingClassifier([("a", local)]),
        BaggingClassifier(local, n_estimators=2, bootstrap=False, random_state=0),
    ):
        model.fit(X, y)
        adapted = adapt(model, NEW_X[SUPPORT], new[SUPPORT])
        assert_array_equal(adapted.classes_, np.unique(new[SUPPORT]))
        parts = [adapted_to(m, codes(new)).predict_proba(NEW_X) for m in model.estimators_]
        expected = adapted.classes_[np.mean(parts, axis=0).argmax(1)]
        assert_array_equal(adapted.predict(NEW_X), expected)
        assert_array_equal(model.classes_, np.unique(y))
    mixed = VotingClassifier([("a", local), ("d", DummyClassifier())]).fit(X, y)
    with pytest.raises(TypeError, match="cannot be adapted as a whole"):
        adapt(mixed, NEW_X[SUPPORT], new[SUPPORT])


# -- what cannot be adapted as a whole -----------------------------------------------------------


def with_wrapper(reg):
    return Clipped(reg).fit(X, Y)


class Clipped(RegressorMixin, BaseEstimator):
    """A container that the library does not know."""

    def __init__(self, estimator, least=0.0):
        self.estimator = estimator
        self.least = least

    def fit(self, X, y):
        self.estimator_ = clone(self.estimator).fit(X, y)
        return self

    def predict(self, X):
        return np.maximum(self.estimator_.predict(X), self.least)


REFUSED = {
    "unknown": (with_wrapper, "register_container"),
    "unknown in a pipeline": (
        lambda reg: make_pipeline(FunctionTransformer(), Clipped(reg)).fit(X, Y),
        "register_container",
    ),
    "outliers of the fit": (
        lambda reg: RANSACRegressor(FewShotRegressor(reg), min_samples=5, random_state=0).fit(
            NEW_X, NEW_Y
        ),
        "register_container",
    ),
    "chain of predictions": (
        lambda reg: RegressorChain(FewShotRegressor(steps=2), cv=2).fit(NEW_X, np.c_[NEW_Y, NEW_Y]),
        "cv=None, which takes the targets themselves",
    ),
    "a selection alone": (
        lambda reg: SelectFromModel(reg, importance_getter=lambda m: np.ones(4)).fit(X, Y),
        "There is no meta-learned model in SelectFromModel|no meta-learned",
    ),
    "search without refit": (
        lambda reg: GridSearchCV(reg, {"alpha": [0.1]}, cv=2, refit=False, scoring=no_score).fit(
            X, Y
        ),
        "has no best_estimator_: with refit=False",
    ),
    "meta-learned final estimator": (
        lambda reg: StackingRegressor(
            [("r", Ridge().fit(X, Y))], final_estimator=FewShotRegressor(steps=2), cv="prefit"
        ).fit(X, Y),
        "final_estimator",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "call",
    [
        lambda model: adapt(model, NEW_X[SUPPORT], NEW_Y[SUPPORT]),
        lambda model: FewShotRegressor(model).fit(NEW_X[SUPPORT], NEW_Y[SUPPORT]),
        lambda model: task_scores(model, X, Y),
        lambda model: task_scorer("r2")(model, X, Y),
        lambda model: adapt_predict(model, X, Y, X),
    ],
    ids=["adapt", "few-shot", "scores", "scorer", "partitions"],
)
def test_what_cannot_be_adapted_as_a_whole_is_a_type_error(name, call, reg):
    make, message = REFUSED[name]
    model = make(reg)
    with pytest.raises(TypeError, match=f"{message}|does not predict what that one predicts"):
        call(model)


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")  # of the glitch
def test_a_container_around_a_few_shot_estimator_is_fitted_to_the_rows_of_a_task(reg):
    """The way out of what adapt refuses."""
    y = NEW_Y.copy()
    y[3] += 1000
    robust = RANSACRegressor(FewShotRegressor(reg), min_samples=6, random_state=0).fit(NEW_X, y)
    assert not robust.inlier_mask_[3]
    error, of_all = (
        np.abs(np.delete(m.predict(NEW_X) - NEW_Y, 3)).mean()
        for m in (robust, FewShotRegressor(reg).fit(NEW_X, y))
    )
    assert error < 0.1 * of_all


def test_the_fit_before_a_search_is_not_mistaken_for_what_it_found(reg):
    search = GridSearchCV(reg, {"alpha": [0.1]}, cv=2, refit=False, scoring=no_score)
    with pytest.raises(NotFittedError):
        adapt(search, NEW_X[SUPPORT], NEW_Y[SUPPORT])
    with pytest.raises(TypeError, match="refit=False"):
        adapt(search.fit(X, Y), NEW_X[SUPPORT], NEW_Y[SUPPORT])


@pytest.mark.parametrize(
    "model",
    [
        TransformedTargetRegressor(MAMLRegressor()),
        VotingRegressor([("a", MAMLRegressor())]),
        make_pipeline(StandardScaler(), BaggingRegressor(MAMLRegressor())),
        FrozenEstimator(MAMLRegressor()),
        CalibratedClassifierCV(MAMLClassifier()),
        FewShotRegressor(MAMLRegressor()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_that_are_not_fitted_say_so(model):
    with pytest.raises(NotFittedError):
        adapt(model, NEW_X[SUPPORT], BINARY[SUPPORT])


@pytest.mark.parametrize(
    "model",
    [Ridge(), make_pipeline(StandardScaler(), Ridge()), VotingRegressor([("r", Ridge())]), None, 3],
    ids=lambda model: type(model).__name__,
)
def test_models_without_a_meta_learned_one_are_refused(model):
    for call in (adapt, task_scores):
        with pytest.raises(TypeError, match="no meta-learned model"):
            call(model, NEW_X, NEW_Y)
    if model is not None:
        with pytest.raises(TypeError, match="no meta-learned model"):
            FewShotRegressor(model).fit(NEW_X, NEW_Y)


def test_scores_of_a_few_shot_estimator_take_its_rates(reg):
    faster = copy.copy(reg).set_params(alpha=0.4, adapt_steps=4)
    scores = task_scores(FewShotRegressor(reg, alpha=0.4, steps=4), X, Y)
    assert_array_equal(scores.after, task_scores(faster, X, Y).after)
    assert np.abs(scores.after - task_scores(reg, X, Y).after).max() > 1e-4


def test_a_container_of_ones_own_adapts_once_it_is_registered(reg, monkeypatch):
    monkeypatch.setattr("sklearn_maml.estimators.containers._RULES", {})
    model = make_pipeline(FunctionTransformer(), with_wrapper(reg))

    @register_container(Clipped)
    def adapt_clipped(clipped, X, y, adapt):
        adapted = copy.copy(clipped)
        adapted.estimator_ = adapt(clipped.estimator_, X, y)
        return adapted

    expected = np.maximum(adapted_to(model[-1].estimator_, NEW_Y).predict(NEW_X), 0)
    adapted = adapt(model, NEW_X[SUPPORT], NEW_Y[SUPPORT])
    assert_array_equal(adapted.predict(NEW_X), expected)

    class More(Clipped):
        pass

    assert isinstance(adapt(More(reg).fit(X, Y), NEW_X[SUPPORT], NEW_Y[SUPPORT]), More)
    with pytest.raises(TypeError, match="must be the class"):
        register_container(model, adapt_clipped)


# -- labels that a tool has numbered -------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "method"),
    [
        (lambda one: VotingClassifier([("a", one)], voting="soft"), "predict_proba"),
        (lambda one: StackingClassifier([("a", one)], cv=2), "predict_proba"),
        (lambda one: BaggingClassifier(one, n_estimators=2, random_state=0), "predict_proba"),
        (lambda one: one, "cross_val_predict"),
    ],
    ids=["voting", "stacking", "bagging", "cross_val_predict"],
)
def test_tools_that_number_the_labels_work_with_a_prior_of_strings(tool, method, clf):
    x = np.tile(NEW_X, (3, 1))
    y = np.tile(LABELS, 3)
    model = tool(FewShotClassifier(clf))
    # ... as with a prior that was fitted on the numbers
    numbered = MAMLClassifier(**SMALL).fit(X, codes(labels_of(Y)))
    same = tool(FewShotClassifier(numbered))
    if method == "cross_val_predict":
        p, q = (cross_val_predict(m, x, y, cv=3, method="predict_proba") for m in (model, same))
    else:
        p, q = (getattr(m.fit(x, y), method)(x) for m in (model, same))
    assert_array_equal(p, q)
    assert len(np.unique(p)) > 1


def test_numbers_of_all_classes_are_positions_in_the_sorted_classes(clf):
    by_number = FewShotClassifier(clf).fit(NEW_X[SUPPORT], codes(LABELS)[SUPPORT])
    by_label = FewShotClassifier(clf).fit(NEW_X[SUPPORT], LABELS[SUPPORT])
    assert_array_equal(by_number.classes_, [0, 1, 2])
    assert_array_equal(by_label.classes_[by_number.predict(NEW_X)], by_label.predict(NEW_X))
    for name in ("predict_proba", "predict_log_proba", "decision_function"):
        assert_array_equal(getattr(by_number, name)(NEW_X), getattr(by_label, name)(NEW_X))
    assert by_number.score(NEW_X, codes(LABELS)) == by_label.score(NEW_X, LABELS)
    # adapt takes numbers for the same, as an ensemble gives them
    again = adapt(by_number, NEW_X[OTHER], codes(LABELS)[OTHER])
    assert_array_equal(
        by_label.classes_[again.predict(NEW_X)],
        adapt(clf, NEW_X[OTHER], LABELS[OTHER]).predict(NEW_X),
    )


def test_numbers_that_may_be_of_any_classes_are_refused_with_the_way_out(clf):
    two = LABELS != "run"
    y = codes(LABELS[two])
    with pytest.raises(ValueError, match=r"NumberedClasses\(prior, classes=\[...\]\)"):
        FewShotClassifier(clf).fit(NEW_X[two], y)
    with pytest.raises(ValueError, match="OneVsRestClassifier and OneVsOneClassifier"):
        OneVsRestClassifier(FewShotClassifier(clf)).fit(NEW_X, LABELS)
    with pytest.raises(ValueError, match="OneVsRestClassifier and OneVsOneClassifier"):
        OneVsOneClassifier(FewShotClassifier(clf)).fit(NEW_X, LABELS)
    # numbers that are not those of a prior of numbers, either
    numbers = MAMLClassifier(**SMALL).fit(X, codes(labels_of(Y)) + 5)
    with pytest.raises(ValueError, match="classes="):
        FewShotClassifier(numbers).fit(NEW_X, codes(LABELS))
    with pytest.raises(ValueError, match="not seen in fit"):
        FewShotClassifier(clf).fit(NEW_X, codes(LABELS) + 5)


def test_classes_say_which_labels_the_numbers_are(clf):
    two = LABELS != "run"
    x, y = NEW_X[two], LABELS[two]
    learner = FewShotClassifier(NumberedClasses(clf, ["walk", "sit"])).fit(x, codes(y))
    by_label = FewShotClassifier(clf).fit(x, y)
    p = by_label.predict_proba(NEW_X)[:, 1:]
    assert_allclose(learner.predict_proba(NEW_X), p / p.sum(1, keepdims=True), rtol=1e-6)
    assert_allclose(np.exp(learner.predict_log_proba(NEW_X)), learner.predict_proba(NEW_X))
    assert_array_equal(learner.predict(NEW_X), p.argmax(1))
    scores = by_label.decision_function(NEW_X)
    assert_allclose(learner.decision_function(NEW_X), scores[:, 2] - scores[:, 1])
    vote = VotingClassifier([("a", learner)], voting="soft").fit(x, y)
    assert set(vote.predict(x)) == {"sit", "walk"}
    numbers = MAMLClassifier(**SMALL).fit(X, codes(labels_of(Y)) + 5)
    learner = FewShotClassifier(NumberedClasses(numbers, [5, 6, 7])).fit(NEW_X, codes(LABELS))
    assert_array_equal(
        learner.predict(NEW_X) + 5,
        FewShotClassifier(numbers).fit(NEW_X, codes(LABELS) + 5).predict(NEW_X),
    )
    with pytest.raises(ValueError, match=r"does not know: \['swim'\]"):
        FewShotClassifier(NumberedClasses(clf, ["run", "swim"])).fit(x, codes(y))
    with pytest.raises(ValueError, match="must have the numbers 0 to 1"):
        FewShotClassifier(NumberedClasses(clf, ["sit", "walk"])).fit(x, y)


def test_a_prior_of_local_labels_takes_numbers_as_labels(local):
    learner = FewShotClassifier(local).fit(NEW_X, codes(LABELS))
    assert_array_equal(learner.classes_, [0, 1, 2])
    assert isinstance(learner.model_, MAMLClassifier)


def test_what_numbers_stand_for_is_saved(clf, tmp_path):
    learner = FewShotClassifier(clf).fit(NEW_X[SUPPORT], codes(LABELS)[SUPPORT])
    learner.save(tmp_path / "model")
    same = sklearn_maml.load(tmp_path / "model")
    assert_array_equal(same.predict(NEW_X), learner.predict(NEW_X))
