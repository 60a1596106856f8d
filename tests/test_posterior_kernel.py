"""Compiled posteriors and predictions of a Gaussian head are those of torch."""

import copy
import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_head_kernel import HEADS as OF_LOSSES
from test_head_kernel import NEWTON, make_batch, make_head
from torch import nn

from sklearn_maml import MAMLRegressor, native
from sklearn_maml.learners import conditioned, exact, sums
from sklearn_maml.learners.posteriors import Information, Scale
from sklearn_maml.native import posterior

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the package was installed without its kernels"
)

HEADS = {
    "one output": {},
    "two outputs": {"n_outputs": 2},
    "more columns": {"d": 10, "hidden": (20, 16), "waves": 8, "n_members": 3},
    "no waves": {"waves": 0, "activation": "tanh"},
    "no table": {"table": False, "waves": 0},
    "activation that keeps its input": {"activation": "gelu", "hidden": (8, 5)},
    "classes": {"classes": True, "n_outputs": 3},
    "classes of a task's own": {"classes": True, "same": True, "n_outputs": 3},
}
SIZES = {"none": 0, "few": 3, "some": 11, "more than a panel": 40, "more than columns": 70}


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def support_of(head, n_rows, n_tasks=4):
    """Rows, targets and roots of weights; the third task has no rows, the second only three."""
    generator = torch.Generator().manual_seed(n_rows)
    X = normal(generator, n_tasks, n_rows, head.body.weight0.shape[1])
    y = normal(generator, n_tasks, n_rows, head.n_outputs)
    if head.likelihood.are_classes:
        y = nn.functional.one_hot(y.argmax(-1), head.n_outputs).double()
    root = 0.5 + torch.rand(n_tasks, n_rows, generator=generator, dtype=torch.float64)
    root[1:2, 3:], root[2:3], root[3:, 2:3] = 0, 0, 0
    return X, y, root


def queries_of(head, n_tasks=4):
    """Rows, and the place of the task of each, in any order."""
    generator = torch.Generator().manual_seed(99)
    rows = normal(generator, 300, head.body.weight0.shape[1])
    return rows, torch.randint(n_tasks, (300,), generator=generator)


def both(head):
    """Compiled functions, and those of torch."""
    compiled = exact.exact(head)
    assert isinstance(compiled, exact.CompiledNumbers)
    return compiled, head.functions(compiled.params)


@pytest.mark.parametrize("n_rows", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", HEADS)
def test_posteriors_and_predictions_are_those_of_torch(kind, n_rows):
    head = make_head(**HEADS[kind])
    compiled, plain = both(head)
    with torch.no_grad():
        found, expected = (run.condition(*support_of(head, n_rows)) for run in (compiled, plain))
        for name in ("shift", "misfit", "moved", "n_moved", "log_det", "n_rows"):
            got, of_torch = getattr(found, name), getattr(expected, name)
            assert_allclose(got, of_torch, rtol=1e-9, atol=1e-11, err_msg=name)
        covariances = [run.covariance(g) for run, g in ((compiled, found), (plain, expected))]
        assert_allclose(*covariances, rtol=0, atol=1e-12)
        rows, places = queries_of(head)
        outputs = compiled.outputs(rows, found.shift, places)
        assert_allclose(outputs, plain.outputs(rows, expected.shift, places), rtol=1e-9, atol=1e-11)
        if head.likelihood.are_classes:
            return
        freedom = torch.full((head.n_outputs,), 4.0, dtype=torch.float64)
        for prior in (None, Scale(freedom, freedom / 4), Scale(freedom, 0 * freedom)):
            told = compiled.query_rows(rows, places.numpy(), found, prior)
            for got, of_torch in zip(
                told, plain.query_rows(rows, places.numpy(), expected, prior), strict=True
            ):
                assert_allclose(got, of_torch, rtol=1e-9, atol=1e-11)
        assert_array_equal(told[0], outputs)


@pytest.mark.parametrize("n_rows", [0, 3, 40, 70])
def test_predictions_by_sums_are_those_by_rows(n_rows):
    compiled, plain = both(make_head(**HEADS["more columns"]))
    support, (rows, places) = support_of(compiled.head, n_rows), queries_of(compiled.head)
    with torch.no_grad():
        # torch conditions on sums, and the kernels predict by what it finds
        of_sums = compiled.posterior(Information.over(*compiled.weighted(*support)))
        found = compiled.query_rows(rows, places.numpy(), of_sums)
        by_rows = plain.condition(*support)
        expected = plain.query_rows(rows, places.numpy(), by_rows)
        assert_allclose(compiled.covariance(of_sums), plain.covariance(by_rows), atol=1e-9)
    for got, of_rows in zip(found, expected, strict=True):
        assert_allclose(got, of_rows, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["more columns", "two outputs"])
def test_queries_of_one_task_at_a_time_are_those_of_torch(kind):
    compiled, plain = both(make_head(**HEADS[kind]))
    support = support_of(compiled.head, 11)
    rows = queries_of(compiled.head)[0][:12].view(4, 3, -1)
    with torch.no_grad():
        found, expected = (run.query(rows, run.condition(*support)) for run in (compiled, plain))
    for got, of_torch in zip(found, expected, strict=True):
        assert_allclose(got, of_torch, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n_rows", [11, 70])
def test_a_task_and_a_row_are_computed_by_themselves(n_rows):
    head = make_head(**HEADS["more columns"])
    compiled, _ = both(head)
    X, y, root = support_of(head, n_rows)
    rows, places = queries_of(head)
    together = compiled.condition(X, y, root)
    of_all = compiled.query_rows(rows, places.numpy(), together)
    for task in range(4):
        real = root[task] > 0
        alone = compiled.condition(*(part[task : task + 1, real] for part in (X, y, root)))
        for name in ("shift", "misfit", "moved", "n_moved", "log_det", "n_rows"):
            own = getattr(together, name)[:, task]
            assert_array_equal(getattr(alone, name)[:, 0], own, err_msg=name)
        for row in np.flatnonzero(places == task)[:3]:
            of_one = compiled.query_rows(rows[row : row + 1], np.zeros(1, int), alone)
            for got, among_others in zip(of_one, of_all, strict=True):
                assert_array_equal(got[:, 0], among_others[:, row])
            outputs = compiled.outputs(rows[row : row + 1], alone.shift, torch.zeros(1).long())
            assert_array_equal(outputs, of_one[0])


@pytest.mark.parametrize("large", [0, posterior.LARGE])
def test_results_do_not_depend_on_threads(monkeypatch, large):
    monkeypatch.setattr(posterior, "PARALLEL_WORK", 0)
    monkeypatch.setattr(posterior, "LARGE", large)  # numbers that numpy has memory for
    head = make_head(**HEADS["more columns"])
    kernel = exact.exact(head).kernel
    support, (rows, places) = support_of(head, 20, n_tasks=30), queries_of(head, 30)
    for threads in (1, 3):
        given = kernel.condition(*support, True, threads)
        parts = (given["shift"], given["half"], given["of_rows"])
        mean, variance = kernel.query(rows, places, *parts, threads)
        found = [given["shift"], given["half"], mean, variance]
        if threads == 1:
            alone = found
    for one, several in zip(alone, found, strict=True):
        assert_array_equal(one, several)


def test_rows_and_weights_may_be_of_single_precision():
    head = make_head()
    compiled, plain = both(head)
    X, y, root = support_of(head, 5)
    rows, places = queries_of(head)
    shift = plain.condition(X.float(), y, root).shift
    assert_allclose(compiled.condition(X.float(), y, root).shift, shift, rtol=1e-9, atol=1e-11)
    found, expected = (
        run.outputs(rows.float(), shift.float(), places) for run in (compiled, plain)
    )
    assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_rows_of_another_number_of_features_are_for_torch_to_refuse():
    compiled, _ = both(make_head(d=3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        compiled.outputs(torch.zeros(2, 5), torch.zeros(2, 1, 1, 1), torch.zeros(2).long())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_compute_the_same(copied):
    head = make_head()
    compiled, _ = both(head)
    support = support_of(head, 5)
    expected = compiled.condition(*support).shift
    again = copied(compiled)
    del compiled
    assert_array_equal(again.condition(*support).shift, expected)


def test_a_head_that_is_trained_further_gets_functions_of_its_new_parameters():
    head = make_head()
    before, support = exact.exact(head), support_of(head, 5)
    shift = before.condition(*support).shift
    with torch.no_grad():
        head.mean.data.add_(1)  # what no count of changes would tell
    after = exact.exact(head)
    assert not torch.equal(after.condition(*support).shift, shift)
    assert_array_equal(before.condition(*support).shift, shift)


# -- what is kept of adapted tasks ---------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), 10)
    X = rng.normal(size=(120, 2))
    y = X.sum(1) * rng.normal(size=12)[task] + 0.1 * rng.normal(size=120)
    model = MAMLRegressor(
        update_rule="gaussian-head", hidden_layer_sizes=(8,), max_iter=5, random_state=0
    )
    return model.fit(X, y, groups=task), X, y, task


def predictions(fitted):
    model, X, y, task = fitted
    own = copy.deepcopy(model).adapt(X, y, groups=task)
    return own.predict(X, groups=task, return_std=True)


@pytest.mark.parametrize("n_kept", [0, 5])
def test_posteriors_that_there_is_no_room_for_are_found_again(fitted, monkeypatch, n_kept):
    expected = predictions(fitted)
    monkeypatch.setattr(sums, "TASKS_AT_A_TIME", 5)
    room = 8 * exact.exact(fitted[0].module_).room(np.full(5, 10))
    monkeypatch.setattr(conditioned, "MOST_KEPT", room if n_kept else 0)
    kept = []
    of = sums.Kept.of
    monkeypatch.setattr(sums.Kept, "of", lambda n, found=(): kept.extend(found) or of(n, found))
    for got, of_kept in zip(predictions(fitted), expected, strict=True):
        assert_allclose(got, of_kept, rtol=1e-12)
    assert sum(len(tasks) for tasks, _ in kept) == n_kept


def test_std_of_a_row_conditions_on_the_rows_of_its_task_alone(fitted, monkeypatch):
    model, X, y, task = fitted
    monkeypatch.setattr(conditioned, "MOST_KEPT", 0)
    own = copy.deepcopy(model).adapt(X, y, groups=task)
    seen = []
    condition = exact.CompiledNumbers.condition

    def counting(self, X, *args, **options):
        seen.append(X.shape[:2].numel())
        return condition(self, X, *args, **options)

    monkeypatch.setattr(exact.CompiledNumbers, "condition", counting)
    own.predict(X[:1], groups=task[:1], return_std=True)
    assert seen == [10]


@pytest.mark.parametrize("room", ["enough", "none"])
def test_posteriors_that_were_asked_for_are_kept_while_there_is_room(fitted, monkeypatch, room):
    model, X, y, task = fitted
    expected = predictions(fitted)
    monkeypatch.setattr(conditioned, "MOST_KEPT", 0)
    monkeypatch.setattr(conditioned, "LEAST_TASKS_KEPT", 12)
    if room == "none":
        monkeypatch.setattr(conditioned, "MOST_KEPT_LATER", 0)
    own = copy.deepcopy(model).adapt(X, y, groups=task)
    n_asked = []
    condition = exact.CompiledNumbers.condition

    def counting(self, X, *args, **options):
        n_asked[-1] += len(X)
        return condition(self, X, *args, **options)

    monkeypatch.setattr(exact.CompiledNumbers, "condition", counting)
    for rows in (task < 11, task < 12, task < 12):  # the first ask for too few tasks to be kept
        n_asked.append(0)
        found = own.predict(X[rows], groups=task[rows], return_std=True)
        for got, of_kept in zip(found, expected, strict=True):
            assert_allclose(got, of_kept[rows], rtol=1e-12)
    assert n_asked == [11, 12, 0 if room == "enough" else 12]
    # what more rows of a task make of it is found anew
    n_asked.append(0)
    own.adapt(X[:3], y[:3] + 1, groups=task[:3], extend=True)
    n_asked.append(0)
    extended = own.predict(X, groups=task, return_std=True)
    assert n_asked[-1] == (1 if room == "enough" else 12)
    assert_allclose(extended[1][task > 0], expected[1][task > 0], rtol=1e-12)
    assert not np.allclose(extended[1][task == 0], expected[1][task == 0], rtol=1e-6)


# -- likelihoods that take Newton steps ----------------------------------------------------------


def labelled(head, n_rows):
    """Support rows with targets that the likelihood knows, as `support_of`."""
    X, _, root = support_of(head, n_rows)
    y = make_batch(head, n_rows, 1, n_tasks=4).support.y
    return X, nn.functional.one_hot(y, 2).double() if head.likelihood.are_classes else y, root


@pytest.mark.parametrize("n_rows", [0, 3, 11, 40])
@pytest.mark.parametrize("kind", NEWTON)
def test_modes_are_those_of_torch(kind, n_rows):
    head = make_head(**{**HEADS["more columns"], **OF_LOSSES[kind]})
    compiled = exact.exact(head)
    assert isinstance(compiled, exact.CompiledNewton)
    plain = head.functions(compiled.params)
    with torch.no_grad():
        found, expected = (run.condition(*labelled(head, n_rows)) for run in (compiled, plain))
        queries = queries_of(head)[0][:12].view(4, 3, -1)
        pairs = [(found.shift, expected.shift), (found.objective, expected.objective)]
        pairs += zip(compiled.query(queries, found), plain.query(queries, expected), strict=True)
        for got, of_torch in pairs:  # to parts of the largest: some targets are far off
            assert_allclose(got, of_torch, rtol=1e-9, atol=1e-9 * max(1, of_torch.abs().max()))
        assert_allclose(found.covariance(), expected.covariance(), rtol=0, atol=1e-9)
        rows, places = queries_of(head)
        outputs = [run.outputs(rows, found.shift, places) for run in (compiled, plain)]
        assert_allclose(*outputs, rtol=1e-9, atol=1e-11)


def test_a_mode_of_more_rows_than_columns_is_left_to_torch():
    head = make_head(**OF_LOSSES["counts"])
    compiled = exact.exact(head)
    support = labelled(head, head.n_columns + 1)
    with torch.no_grad():
        found, expected = (
            run.condition(*support) for run in (compiled, head.functions(compiled.params))
        )
    assert_array_equal(found.shift, expected.shift)


@pytest.mark.parametrize("kind", ["counts", "logit of the second of two classes"])
def test_the_mode_of_a_task_depends_on_no_other_and_on_no_thread(kind, monkeypatch):
    monkeypatch.setattr(posterior, "PARALLEL_WORK", 0)
    head = make_head(**OF_LOSSES[kind])
    kernel, (X, y, root) = exact.exact(head).kernel, labelled(head, 11)
    y = head.likelihood.seen(y)
    one, several = (kernel.condition_at_mode(X, y, root, n) for n in (1, 3))
    for task in range(4):
        real = root[task] > 0
        own = [part[task : task + 1, real] for part in (X, y, root)]
        alone = kernel.condition_at_mode(*own, 1)
        assert_array_equal(alone["shift"][:, 0], one["shift"][:, task])
    for name, values in one.items():
        assert_array_equal(values, several[name])
