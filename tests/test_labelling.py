"""Which rows to label next: exactness, tasks side by side, and going on from what is known."""

import copy

import numpy as np
import pytest
import sklearn
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import (
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    load,
    save,
    suggest_rows,
)
from sklearn_maml.learners import telling
from sklearn_maml.learners.base import Several, Support
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.conditioned import Calibration, Conditioned, row_marks
from sklearn_maml.learners.gaussian import ClassHead, GaussianHead
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.likelihoods import (
    Classes,
    Counts,
    HeavyTails,
    Labels,
    Normal,
    Positive,
)
from sklearn_maml.targets import (
    AbsoluteError,
    BinaryCrossEntropy,
    CrossEntropy,
    Gamma,
    Poisson,
    SquaredError,
)

RNG = np.random.RandomState


def random_head(n_outputs=1, seed=0, n_members=2):
    rng, generator = RNG(seed), torch.Generator().manual_seed(seed)
    body = MLPBody(n_members, [3, 6], nn.ReLU(), generator)
    starts = [
        (
            rng.randn(4, n_outputs),
            np.tril(rng.randn(4, 4)),
            1 + rng.rand(n_outputs),
            0.1 + rng.rand(n_outputs),
        )
        for _ in range(n_members)
    ]
    return GaussianHead(
        body, starts, rng.randn(3), 1 + rng.rand(3), likelihood=Normal(SquaredError())
    ).double()


def calibration(n_outputs=1, **options):
    edge = np.full(n_outputs, 1e6)
    return Calibration(-edge, edge, **options)


def conditioned(head, sizes, seed=1, weighted=False, **options):
    """Tasks with these numbers of support rows."""
    rng = RNG(seed)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    y = rng.randn(len(codes), head.n_outputs)
    weight = rng.rand(len(codes)) if weighted else None
    support = Support(rng.randn(len(codes), 3), y, codes, len(sizes), weight)
    return Conditioned.on(head, calibration(head.n_outputs, **options), support)


def members_of(head):
    """Heads of one member each."""
    for j in range(head.n_members):
        one = random_head(head.n_outputs, n_members=1)
        with torch.no_grad():
            for name, p in head.named_parameters():
                one.get_parameter(name).copy_(p[j : j + 1])
        one.center, one.scale = head.center, head.scale
        yield one


def summed_variance(heads, trust, options, X, pool):
    """Sum of what `std` says of a pool given rows X, the members' disagreement apart."""
    y, codes = np.zeros((len(X), heads[0].n_outputs)), np.zeros(len(X), int)
    support, bounds = Support(X, y, codes, 1, None), calibration(heads[0].n_outputs, **options)
    tasks = [Conditioned.on(one, bounds, support) for one in heads]
    codes = np.zeros(len(pool), int)
    parts = zip(tasks, trust, strict=True)
    return sum((of * one.std(pool, codes)[1] ** 2).sum() for one, of in parts)


def brute_force(head, options, tasks, pool, n):
    """Label each row in turn, and look at the variance that is left."""
    known, trust = tasks.support.X, tasks.trust[:, 0]
    heads, chosen = list(members_of(head)), []
    for _ in range(n):
        left = np.full(len(pool), np.inf)
        for c in set(range(len(pool))) - set(chosen):
            given = np.concatenate([known, pool[[*chosen, c]]])
            left[c] = summed_variance(heads, trust, options, given, pool)
        chosen.append(int(left.argmin()))
    return chosen


@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("n_pool", [6, 14])  # fewer and more rows than the 10 columns
@pytest.mark.parametrize("n_known", [0, 2, 12])
def test_greedy_choice_is_that_of_trying_every_row(n_pool, n_known, n_outputs):
    head, rng = random_head(n_outputs), RNG(3)
    pool = rng.randn(n_pool, 3)
    seen = np.sort(row_marks(pool[: n_pool // 2]))
    # another confidence in rows that training had, and in each output
    options = {
        "factor": 1 + rng.rand(n_outputs),
        "factor_unseen": 2 + rng.rand(n_outputs),
        "seen": seen,
    }
    tasks = conditioned(head, [n_known], **options)
    got = tasks.telling_rows(pool, np.zeros(n_pool, int), np.zeros(1, int), 3)
    assert got.tolist() == [brute_force(head, options, tasks, pool, 3)]


@pytest.mark.parametrize("n_pool", [6, 14])
def test_weights_of_labelled_rows_and_scales_of_tasks_count(n_pool):
    head, rng, freedom = random_head(2), RNG(3), np.array([0.5, 1.0])
    tasks = conditioned(head, [5], weighted=True, freedom=freedom)
    X, y, weight = tasks.support.X, tasks.support.y, tasks.support.weight
    pool, gains = rng.randn(n_pool, 3), np.zeros(n_pool)
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    weight = 5 * weight / weight.sum()
    (prior, A), (_, S) = run.columns(torch.from_numpy(X)), run.columns(torch.from_numpy(pool))
    prior, A, S = prior.numpy(), A.numpy(), S.numpy()
    for j in range(2):
        for o in range(2):
            a, noise = run.amplitude()[j, 0, o].item(), run.noise()[j, o].item()
            C = np.linalg.inv(np.eye(10) + (A[j].T * weight) @ A[j] / noise)
            r = y[:, o] / a - prior[j, :, o]
            of_rows = A[j] @ A[j].T + np.diag(noise / weight)
            scale = (freedom[o] + r @ np.linalg.solve(of_rows, r)) / (freedom[o] + 5)
            K = S[j] @ C @ S[j].T
            gains += tasks.trust[j, 0, o] * a**2 * scale * (K**2).sum(0) / (np.diag(K) + noise)
    got = tasks.telling_rows(pool, np.zeros(n_pool, int), np.zeros(1, int), 1)
    assert got == gains.argmax()


@pytest.mark.parametrize("of_rows", [False, True])
def test_variances_and_sums_follow_labels_exactly(monkeypatch, of_rows):
    monkeypatch.setattr(telling, "ROWS_AT_A_TIME", 4)
    rng = RNG(0)
    shape = n_members, n_tasks, n_noises, n_rows, n_columns = 2, 3, 2, 11, 6
    S = torch.from_numpy(rng.randn(n_members, n_tasks, n_rows, n_columns))
    root = torch.from_numpy(rng.randn(n_members, n_tasks, n_noises, n_columns, n_columns))
    C = root @ root.mT
    weight = torch.from_numpy(rng.rand(*shape[:4]))
    place = np.arange(n_tasks * n_rows).reshape(n_tasks, n_rows)

    def columns(rows):
        return S.flatten(1, 2)[:, rows, :1], S.flatten(1, 2)[:, rows]

    noise = torch.from_numpy(0.1 + rng.rand(*shape[:4] if of_rows else (n_members, 1, n_noises, 1)))
    both = []
    for kept in (True, False):
        monkeypatch.setattr(telling, "MOST_ENTRIES", 10**6 if kept else 0)
        models = [
            kind(telling.Columns(columns, place, n_columns), C, noise, weight)
            for kind in (telling.Dense, telling.LowRank)
        ]
        for k in range(4):
            chosen = np.array([k, 2 * k, 10 - k])
            for model in models:
                model.label(chosen)
        both += models
    K = S.unsqueeze(2) @ C @ S.unsqueeze(2).mT
    for k in range(4):
        for t, c in enumerate([k, 2 * k, 10 - k]):
            for j in range(n_members):
                for o in range(n_noises):
                    one = K[j, t, o]
                    of_row = noise.expand(*shape[:4])[j, t, o, c]
                    K[j, t, o] = one - torch.outer(one[c], one[c]) / (one[c, c] + of_row)
    for model in both:
        torch.testing.assert_close(model.variance, K.diagonal(dim1=-2, dim2=-1))
        explained = (K.square() * weight.unsqueeze(-2)).sum(-1)
        torch.testing.assert_close(model.explained, explained)


@pytest.mark.parametrize("most", [2**22, 2000])
def test_tasks_together_are_as_one_by_one(monkeypatch, most):
    monkeypatch.setattr("sklearn_maml.learners.conditioned.MOST_ENTRIES", most)
    head, rng = random_head(2), RNG(5)
    tasks = conditioned(head, [0, 3, 1, 14], freedom=np.array([4.0, 4.0]))
    of_pool = np.array([2, 0, 3, 0, 1])  # two new tasks share the prior
    sizes = [6, 12, 9, 30, 4]
    pools = rng.permutation(np.repeat(np.arange(5), sizes))
    rows = rng.randn(len(pools), 3)
    together = tasks.telling_rows(rows, pools, of_pool, 4)
    for k, task in enumerate(of_pool):
        own = np.flatnonzero(pools == k)
        alone = tasks.telling_rows(rows[own], np.zeros(len(own), int), np.array([task]), 4)
        assert (together[k] == own[alone[0]]).all()


def test_tasks_of_two_calls_are_found_in_either():
    head, rng = random_head(), RNG(5)
    first, second = conditioned(head, [2, 4]), conditioned(head, [3], seed=2)
    pools = rng.permutation(np.repeat(np.arange(3), 8))
    rows = rng.randn(24, 3)
    got = Several(first, second).telling_rows(rows, pools, np.array([2, 0, 1]), 3)
    own = pools == 0
    alone = second.telling_rows(rows[own], np.zeros(8, int), np.zeros(1, int), 3)
    assert (got[0] == np.flatnonzero(own)[alone[0]]).all()
    alone = first.telling_rows(rows[~own], pools[~own] - 1, np.array([0, 1]), 3)
    assert (got[1:] == np.flatnonzero(~own)[alone]).all()


def test_what_was_labelled_is_not_proposed_again_where_labels_are_exact():
    head, pool = random_head(), RNG(5).randn(8, 3)
    with torch.no_grad():
        head.log_noise.fill_(-5.0)
    prior, codes, one = conditioned(head, [0]), np.zeros(8, int), np.zeros(1, int)
    (rows,) = prior.telling_rows(pool, codes, one, 8)
    support = Support(pool[rows[:4]], RNG(6).randn(4, 1), codes[:4], 1, None)
    known = Conditioned.on(head, calibration(), support)
    known.trust = prior.trust  # members count the same, which labels would change
    assert known.telling_rows(pool, codes, one, 4).tolist() == [rows[4:].tolist()]


# -- estimators ----------------------------------------------------------------------------------


def slopes(n_tasks=30, n_rows=12, seed=0):
    """Lines through the origin, of all slopes: far out they tell most."""
    rng = RNG(seed)
    task = np.repeat(np.arange(n_tasks), n_rows)
    X = rng.uniform(-1, 1, (len(task), 1))
    y = rng.randn(n_tasks)[task] * X[:, 0] + 0.05 * rng.randn(len(task))
    return X, y, task


def regressor(**options):
    options = {"update_rule": "gaussian-head", "hidden_layer_sizes": (8,), **options}
    return MAMLRegressor(max_iter=5, random_state=0, **options)


@pytest.fixture(scope="module")
def fitted():
    X, y, task = slopes()
    return regressor().fit(X, y, groups=task)


@pytest.fixture
def reg(fitted):
    return copy.copy(fitted)


GRID = np.linspace(-1, 1, 9)[:, None]


NEWTON = {
    "poisson": Counts(Poisson()),
    "gamma": Positive(Gamma()),
    "absolute_error": HeavyTails(AbsoluteError()),
    "binary": Labels(BinaryCrossEntropy()),
}


@pytest.mark.parametrize("loss", NEWTON)
@pytest.mark.parametrize("n_pool", [6, 14])
@pytest.mark.parametrize("n_known", [0, 4, 14])
def test_rows_of_other_losses_are_those_of_the_expected_loss(loss, n_pool, n_known):
    """By labels as they are expected: noise and cost of each row, by its predicted output."""
    rng, likelihood = RNG(4), NEWTON[loss]
    body = MLPBody(2, [3, 6], nn.ReLU(), torch.Generator().manual_seed(0))
    start = [(0.3 * rng.randn(4, 1), np.tril(rng.randn(4, 4)), np.ones(1), np.full(1, 0.3))] * 2
    head = LaplaceHead(body, start, np.zeros(3), np.ones(3), likelihood=likelihood).double()
    y = np.abs(rng.randn(n_known, 1)) + 0.1
    y = np.round(y) % 2 if loss == "binary" else y
    X, pool = rng.randn(n_known, 3), rng.randn(n_pool, 3)
    support = Support(X, y, np.zeros(n_known, int), 1, None)
    got = Conditioned.on(head, calibration(), support).telling_rows(
        pool, np.zeros(n_pool, int), np.zeros(1, int), 3
    )
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    given = run.condition(torch.from_numpy(X[None]), torch.from_numpy(y[None]))
    prior, S = run.columns(torch.from_numpy(pool))
    output = (prior + S @ given.shift[:, 0]).unsqueeze(1)
    information, cost = likelihood.expected(output, run.shape())
    information, cost = information.numpy().reshape(2, -1), cost.numpy().reshape(2, -1)
    root = given.covariance_root()[:, 0, 0] @ S.mT
    K, chosen = (root.mT @ root).numpy(), []
    for _ in range(3):
        gains = np.zeros(n_pool)
        for j in range(2):
            gains += (cost[j] * K[j] ** 2).sum(1) / (np.diag(K[j]) + 1 / information[j])
        gains[chosen] = -np.inf
        c = int(gains.argmax())
        chosen.append(c)
        for j in range(2):
            K[j] = K[j] - np.outer(K[j, c], K[j, c]) / (K[j, c, c] + 1 / information[j, c])
    assert got.tolist() == [chosen]


def test_lines_through_the_origin_are_measured_far_out(reg):
    assert set(reg.suggest_rows(GRID, 2)) == {0, 8}
    assert reg.suggest_rows(np.array([[0.1], [-0.7], [0.4], [0.0]]), 1) == [1]


def test_choice_does_not_depend_on_the_order_of_the_pool(reg):
    order = RNG(0).permutation(30)
    pool = RNG(1).uniform(-1, 1, (30, 1))
    rows = reg.suggest_rows(pool, 6)
    assert (order[reg.suggest_rows(pool[order], 6)] == rows).all()
    assert (reg.suggest_rows(pool, 6) == rows).all()


def test_of_rows_that_are_alike_the_first_is_taken(reg):
    rows = reg.suggest_rows(np.repeat(GRID, 5, axis=0), 6)
    for end in set(rows // 5):
        own = rows[rows // 5 == end]
        assert own.tolist() == list(range(5 * end, 5 * end + len(own)))
    assert (reg.suggest_rows(np.ones((4, 1)), 4) == [0, 1, 2, 3]).all()


def test_adapted_tasks_go_on_and_others_start_anew(reg):
    X, y, task = slopes(n_tasks=3, n_rows=20, seed=1)
    anew = reg.suggest_rows(X, 4, groups=task)
    assert (task[anew] == np.repeat([0, 1, 2], 4)).all()
    labelled = np.flatnonzero((task < 2) & (np.arange(60) % 20 < 5 + 3 * task))
    reg.adapt(X[labelled], y[labelled], groups=task[labelled])
    got = reg.suggest_rows(X, 4, groups=task).reshape(3, 4)
    assert (got[2] == anew.reshape(3, 4)[2]).all()
    for k in range(2):
        own = labelled[task[labelled] == k]
        alone = adapt(reg, X[own], y[own]).suggest_rows(X[task == k], 4) + 20 * k
        assert (got[k] == alone).all()
        assert (got[k] != anew.reshape(3, 4)[k]).any()


def test_rows_that_were_added_count(reg):
    X, y, task = slopes(n_tasks=2, n_rows=120, seed=1)
    first = np.arange(240) % 120 < 3
    second = ~first & (np.arange(240) < 220)
    reg.adapt(X[first], y[first], groups=task[first])
    reg.adapt(X[second], y[second], groups=task[second], extend=True)
    anew = adapt(reg, X[:220], y[:220], groups=task[:220])
    pool = np.tile(RNG(0).uniform(-1, 1, (9, 1)), (2, 1))
    rows = reg.suggest_rows(pool, 5, groups=np.repeat([1, 0], 9))
    assert (rows == anew.suggest_rows(pool, 5, groups=np.repeat([1, 0], 9))).all()


def test_pools_of_lists_and_stacks_have_places_of_their_own(reg):
    stack = RNG(0).uniform(-1, 1, (3, 7, 1))
    of_stack = reg.suggest_rows(stack, 2)
    assert of_stack.shape == (3, 2)
    of_list = reg.suggest_rows([*stack[:2], np.r_[stack[2], stack[0]]], 2)
    assert (of_list[:2] == of_stack[:2]).all()
    flat = reg.suggest_rows(stack.reshape(-1, 1), 2, groups=np.repeat(["b", "a", "c"], 7))
    assert (flat.reshape(3, 2) == of_stack + np.array([[0], [7], [14]])).all()


def test_task_column_and_routing_tell_tasks_as_in_predict(fitted):
    X, y, task = slopes()
    with_task = np.c_[task, X]
    by_column = regressor(task_column=0).fit(with_task, y)
    pool = np.c_[np.repeat([77, 78], 9), np.tile(GRID, (2, 1))]
    rows = by_column.suggest_rows(pool, 2)
    assert (rows == fitted.suggest_rows(pool[:, 1:], 2, groups=pool[:, 0])).all()
    # groups are for splitters then
    assert (by_column.suggest_rows(pool, 2, groups=np.zeros(18)) == rows).all()
    with sklearn.config_context(enable_metadata_routing=True):
        assert (by_column.suggest_rows(pool, 2) == rows).all()


def test_several_outputs_and_a_share_of_steps():
    X, y, task = slopes()
    Y = np.c_[100 * y, y[::-1]]
    two = regressor().fit(X, Y, groups=task)
    assert set(two.suggest_rows(GRID, 2, groups=np.zeros(9))) == {0, 8}
    both = regressor(update_rule="auto", steps=1).fit(X, y, groups=task)
    both.learner_weights_ = {"gaussian-head": 0.5, "gradient-steps": 0.5}
    alone = both.suggest_rows(GRID, 3, groups=np.zeros(9))
    both.adapt(X[:3], y[:3])
    assert set(alone[:2]) == {0, 8}
    assert len(both.suggest_rows(GRID, 3)) == 3


def test_a_file_suggests_what_the_model_does(fitted, tmp_path):
    reg = adapt(fitted, GRID[:2], [0.1, 0.2])
    save(tmp_path / "model", reg)
    assert (load(tmp_path / "model").suggest_rows(GRID, 4) == reg.suggest_rows(GRID, 4)).all()


# -- models made of one --------------------------------------------------------------------------


def test_models_suggest_what_the_one_inside_does():
    X, y, task = slopes()
    pool = 3 + 10 * GRID
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), regressor())
        pipe.fit(3 + 10 * X, y, groups=task)
        wrapped = TransformedTargetRegressor(
            make_pipeline(StandardScaler(), regressor()), transformer=StandardScaler()
        ).fit(3 + 10 * X, y, groups=task)
    rows = pipe[-1].suggest_rows(pipe[0].transform(pool), 3)
    assert (suggest_rows(pipe, pool, 3) == rows).all()
    assert set(rows[:2]) == {0, 8}
    assert (suggest_rows(FrozenEstimator(pipe), pool, 3) == rows).all()
    assert (suggest_rows(FewShotRegressor(pipe), pool, 3) == rows).all()
    assert (suggest_rows(wrapped, pool, 3) == rows).all()
    adapted = adapt(pipe, pool[:6], np.zeros(6))
    rows = adapted[-1].suggest_rows(pipe[0].transform(pool), 3)
    assert (suggest_rows(adapted, pool, 3) == rows).all()
    assert rows[0] == 8
    learner = FewShotRegressor(pipe).fit(pool[:6], np.zeros(6))
    assert (suggest_rows(learner, pool, 3) == rows).all()


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_what_is_no_number_of_rows_is_refused(reg, n):
    with pytest.raises(ValueError, match="n must be a positive integer"):
        reg.suggest_rows(GRID, n)


def test_pools_that_are_too_small_are_refused(reg):
    with pytest.raises(ValueError, match="1 of 1 pools have fewer, the smallest 9"):
        reg.suggest_rows(GRID, 10)
    with pytest.raises(ValueError, match="1 of 2 pools have fewer, the smallest 2"):
        reg.suggest_rows(GRID, 3, groups=[0] * 7 + [1] * 2)
    with pytest.raises(ValueError, match="1 of 2 pools have fewer, the smallest 0"):
        reg.suggest_rows([GRID, GRID[:0]], 3)
    with pytest.raises(ValueError, match="0 sample"):
        reg.suggest_rows(GRID[:0], 3)
    with pytest.raises(ValueError, match="groups"):
        reg.suggest_rows(GRID, 3, groups=[0, 1])


def test_several_adapted_tasks_need_groups(reg):
    reg.adapt(GRID[:4], [0.1, 0.2, 0.3, 0.4], groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="to suggest_rows"):
        reg.suggest_rows(GRID, 3)
    with pytest.raises(ValueError, match="suggest_rows got 3 query sets"):
        reg.suggest_rows([GRID, GRID, GRID], 3)


def test_learners_that_know_no_variance_are_refused_with_a_way_out():
    X, y, task = slopes()
    steps = regressor(update_rule="sgd", steps=1).fit(X, y, groups=task)
    with pytest.raises(ValueError, match=r"suggest_rows needs .* Fit with update_rule='gaussian"):
        steps.suggest_rows(GRID, 3, groups=np.zeros(9))
    clf = MAMLClassifier(update_rule="sgd", max_iter=1, hidden_layer_sizes=(4,), steps=1)
    clf.fit(X, y > 0, groups=task)
    with pytest.raises(ValueError, match="suggest_rows needs a learner"):
        suggest_rows(clf, GRID, 3)
    with pytest.raises(TypeError, match="no meta-learned model"):
        suggest_rows(StandardScaler().fit(X), GRID, 3)


def test_classes_of_new_tasks_are_asked_for_where_they_differ():
    """Thresholds differ by less than 1: what is far from there has the same class always."""
    rng = RNG(0)
    X, task = rng.uniform(-3, 3, (1200, 1)), np.repeat(np.arange(60), 20)
    y = X[:, 0] + rng.uniform(-0.5, 0.5, 60)[task] > 0
    clf = MAMLClassifier(update_rule="gaussian-head", max_iter=200, hidden_layer_sizes=(8,))
    clf.set_params(random_state=0).fit(X, y, groups=task)
    pool = np.linspace(-3, 3, 25)[:, None]
    assert abs(pool[clf.suggest_rows(pool, 1)[0], 0]) < 0.8
    # a label tells where to ask next
    known = adapt(clf, [[0.2]], [False])
    rows = suggest_rows(known, pool, 3)
    assert len(set(rows)) == 3
    assert known.predict_proba(pool)[rows[0]].max() < 0.9


def test_doubt_about_classes_counts_where_none_is_certain():
    rng, generator = RNG(0), torch.Generator().manual_seed(0)
    body = MLPBody(2, [3, 6], nn.ReLU(), generator)
    start = [(rng.randn(4, 3), np.tril(rng.randn(4, 4)), np.ones(1), np.full(1, 0.3))] * 2
    options = {"likelihood": Classes(CrossEntropy())}
    head = ClassHead(body, start, np.zeros(3), np.ones(3), **options).double()
    X, pool, one = rng.randn(5, 3), rng.randn(9, 3), np.zeros(1, int)
    support = Support(X, np.arange(5) % 3, np.zeros(5, int), 1, None)
    (got,) = Conditioned.on(head, calibration(3), support).telling_rows(
        pool, np.zeros(9, int), one, 1
    )
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    given = run.condition(torch.from_numpy(X[None]), torch.eye(3).double()[np.arange(5) % 3][None])
    prior, S = run.columns(torch.from_numpy(pool))
    p, K = (prior + S @ given.shift[:, 0]).softmax(-1), S @ run.covariance(given)[:, 0, 0] @ S.mT
    cost = 1 - p.square().sum(-1)
    of_rows = K.diagonal(dim1=-2, dim2=-1) + run.noise()
    assert got[0] == ((K.square() * cost.unsqueeze(1)).sum(-1) / of_rows).sum(0).argmax()


def test_tasks_whose_labels_are_their_own_can_be_asked_for_before_any_is_known():
    X, y, task = slopes(12)
    y = 2 * task + (X[:, 0] > 0)
    options = {"update_rule": "gaussian-head", "max_iter": 3, "hidden_layer_sizes": (4,)}
    clf = MAMLClassifier(n_ways=2, n_shots=2, n_queries=2, random_state=0, **options)
    clf.fit(X, y, groups=task)
    rows = clf.suggest_rows(GRID, 4)
    assert len(set(rows)) == 4
    assert min(GRID[rows, 0]) < -0.5
    assert max(GRID[rows, 0]) > 0.5
    adapted = adapt(clf, GRID[rows], np.where(GRID[rows, 0] > 0, "b", "a"))
    assert set(adapted.predict(GRID)) == {"a", "b"}
    assert adapted.suggest_rows(GRID, 2).shape == (2,)
    with pytest.raises(ValueError, match="no classes to predict"):
        clf.set_params(unseen_tasks="prior").predict(GRID)


def test_counts_are_asked_for_where_they_are_many():
    """The rate of a task is a factor of all rates: large ones tell most of it."""
    rng = RNG(0)
    X, task = rng.uniform(-2, 2, (600, 1)), np.repeat(np.arange(40), 15)
    y = rng.poisson(np.exp(X[:, 0] + rng.randn(40)[task])).astype(float)
    reg = MAMLRegressor(loss="poisson", update_rule="gaussian-head", max_iter=20, random_state=0)
    reg.set_params(hidden_layer_sizes=(8,)).fit(X, y, groups=task)
    first = reg.suggest_rows(GRID, 3)[0]
    assert GRID[first, 0] >= 0.5


def test_pools_of_several_tasks_go_through_pipelines():
    rng = RNG(0)
    X, task = 5 + 3 * rng.randn(120, 3), np.repeat(np.arange(12), 10)
    reg = MAMLRegressor(max_iter=5, hidden_layer_sizes=(4,), random_state=0)
    scale = StandardScaler().fit(X)
    reg.fit(scale.transform(X), X.sum(1) * (1 + task % 3), groups=task)
    pipe = make_pipeline(scale, reg)
    pools = [X[:10], X[10:18]]
    expected = reg.suggest_rows([scale.transform(pool) for pool in pools], 3)
    np.testing.assert_array_equal(suggest_rows(pipe, pools, 3), expected)
    stack = X[:20].reshape(2, 10, 3)
    expected = reg.suggest_rows(np.stack([scale.transform(pool) for pool in stack]), 3)
    np.testing.assert_array_equal(suggest_rows(pipe, stack, 3), expected)
