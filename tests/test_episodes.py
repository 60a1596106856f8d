"""Episodes: what is drawn is disjoint, complete, uniform, repeatable, and leaks no labels."""

from __future__ import annotations

import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from sklearn_maml import MAMLRegressor
from sklearn_maml.data.episodes import Rows, gather, pad_rows
from sklearn_maml.data.sampling import (
    MOST_VALIDATED,
    SUPPORT_RANGE,
    VALIDATION_EPISODES,
    EpisodeSampler,
    draw_fixed,
    evenly,
)
from sklearn_maml.data.splitting import check_splittable, hold_out, part_of, usable
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.training import sources
from sklearn_maml.training.schedule import UPDATES_PER_EPOCH
from sklearn_maml.training.stream import BatchLoader, FixedEpisodes, TaskStream, use_batch

# --- helpers: the first feature of a row is its position, so that episodes can be traced back


def make_tasks(sizes, *, shuffle=True, seed=0):
    """Regression tasks; the target of a row is ten times its position."""
    codes = np.repeat(np.arange(len(sizes)), sizes)
    if shuffle:
        codes = np.random.default_rng(seed).permutation(codes)
    position = np.arange(len(codes), dtype=float)
    X = np.stack([position, codes], axis=1)
    return TaskCollection(X, 10 * position[:, None], codes, np.arange(len(sizes)), None, "groups")


def make_classes(counts, *, seed=0):
    """Classification tasks from the numbers of rows of each class in each task."""
    codes, y = [], []
    for task, classes in enumerate(counts):
        for label, n in enumerate(classes):
            codes += [task] * n
            y += [label] * n
    order = np.random.default_rng(seed).permutation(len(y))
    codes, y = np.array(codes)[order], np.array(y, dtype=np.int64)[order]
    X = np.stack([np.arange(len(y), dtype=float), codes], axis=1)
    return TaskCollection(X, y, codes, np.arange(len(counts)), None, "groups")


@pytest.mark.parametrize("kind", ["numbers", "classes", "given sets"])
def test_tasks_whose_rows_come_task_after_task_are_those_of_mixed_rows(kind):
    rng = np.random.default_rng(0)
    sizes = np.array([5, 0, 300, 7, 4])
    codes = np.repeat(np.arange(5), sizes)
    mixed = rng.permutation(codes)
    place = np.empty(len(codes), dtype=int)
    place[np.argsort(mixed, kind="stable")] = np.arange(len(codes))
    X, y = rng.normal(size=(len(codes), 2)), np.arange(len(codes)) % 3
    classes = kind == "classes"
    y = y if classes else y[:, None] + 0.5
    in_query = np.arange(len(codes)) % 2 == 1 if kind == "given sets" else None
    of_mixed = None if in_query is None else in_query[place]
    grouped = TaskCollection(X, y, codes, np.arange(5), in_query, "groups")
    other = TaskCollection(X[place], y[place], mixed, np.arange(5), of_mixed, "groups")
    assert grouped.order is None
    assert other.order is not None
    assert grouped.fingerprints() == other.fingerprints()
    pairs = [(grouped, other), (grouped.select(np.array([2, 0])), other.select(np.array([2, 0])))]
    pairs.append(tuple(tasks.take_rows(tasks.leveled()) for tasks in (grouped, other)))
    for one, two in pairs:
        assert one.n_tasks == two.n_tasks
        for j in range(one.n_tasks):
            assert np.array_equal(one.X[one.rows(j)], two.X[two.rows(j)])
            assert np.array_equal(one.y[one.rows(j)], two.y[two.rows(j)])
    assert len(grouped.leveled()) < len(codes)
    batches = [
        EpisodeSampler(tasks, classification=classes, n_queries=3).sample(
            np.array([0, 2, 3]), np.random.default_rng(1)
        )
        for tasks in (grouped, other)
    ]
    for name in ("support", "query"):
        one, two = (getattr(batch, name) for batch in batches)
        assert torch.equal(one.X, two.X)
        assert torch.equal(one.y, two.y)


def positions(rows, j):
    return rows.task(j).X[:, 0].numpy().astype(int)


def assert_uniform(counts, draws, *, significance=1e-4):
    """Coarse chi-square test of equal probabilities."""
    expected = draws / len(counts)
    assert expected >= 5
    statistic = ((np.asarray(counts) - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(significance, len(counts) - 1)


# --- padding


def test_padding_keeps_every_row_in_its_task_and_weighs_tasks_by_mean():
    X = np.arange(12.0).reshape(6, 2)
    y = np.arange(6.0)[:, None]
    rows = pad_rows(X, y, np.array([5, 0, 1, 2]), np.array([1, 3]))
    assert rows.X.shape == (2, 3, 2)
    assert len(rows) == 2
    assert rows.lengths.tolist() == [1, 3]
    assert rows.task(0).X.tolist() == [[10, 11]]
    assert rows.task(1).y.flatten().tolist() == [0, 1, 2]
    np.testing.assert_allclose(rows.weight, [[1, 0, 0], [1 / 3] * 3])
    assert rows.real(rows.y).flatten().tolist() == [5, 0, 1, 2]


def test_equal_tasks_are_not_padded():
    X, y = np.arange(8.0).reshape(4, 2), np.arange(4)
    rows = pad_rows(X, y, np.array([3, 1, 0, 2]), np.array([2, 2]))
    assert rows.weight is None
    assert rows.lengths is None
    assert rows.y.tolist() == [[3, 1], [0, 2]]
    assert rows.real(rows.y).tolist() == [3, 1, 0, 2]


def test_row_weights_sum_to_one_in_each_task():
    X, y = np.zeros((5, 1)), np.zeros((5, 1))
    weights = np.array([1.0, 3.0, 2.0, 2.0, 4.0])
    ragged = pad_rows(X, y, np.arange(5), np.array([2, 3]), weights)
    np.testing.assert_allclose(ragged.weight, [[0.25, 0.75, 0], [0.25, 0.25, 0.5]])
    even = pad_rows(X, y, np.arange(4), np.array([2, 2]), weights[:4])
    np.testing.assert_allclose(even.weight, [[0.25, 0.75], [0.5, 0.5]])
    assert even.lengths is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padding_keeps_the_dtype(dtype):
    rows = pad_rows(
        np.zeros((3, 1), dtype), np.zeros((3, 1), dtype), np.arange(3), np.array([1, 2])
    )
    expected = torch.float32 if dtype is np.float32 else torch.float64
    assert rows.X.dtype == rows.y.dtype == rows.weight.dtype == expected


def test_taking_tasks_pads_them_to_their_own_longest():
    X, y = np.arange(9.0)[:, None], np.arange(9.0)[:, None]
    rows = pad_rows(X, y, np.arange(9), np.array([2, 4, 2, 1]))
    pair = rows.take(np.array([2, 0]))
    assert pair.lengths is None
    assert pair.X[..., 0].tolist() == [[6, 7], [0, 1]]
    assert pair.weight.sum(1).tolist() == [1, 1]
    uneven = rows.take(np.array([3, 0]))
    assert uneven.lengths.tolist() == [1, 2]
    assert uneven.real(uneven.X).flatten().tolist() == [8, 0, 1]
    even = Rows(rows.X[:, :1], rows.y[:, :1]).take(np.array([1, 1]))
    assert even.X.flatten().tolist() == [2, 2]


def test_first_rows_of_each_task():
    X, y = np.arange(9.0)[:, None], np.arange(9.0)[:, None]
    rows = pad_rows(X, y, np.arange(9), np.array([2, 4, 3]))
    three = rows.first(3)
    assert three.lengths.tolist() == [2, 3, 3]
    assert three.real(three.X).flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert three.weight[0, 2] == 0
    none = rows.first(0)
    assert none.X.shape == (3, 1, 1)
    assert none.lengths.tolist() == none.weight.flatten().tolist() == [0, 0, 0]
    assert Rows(rows.X, rows.y).first(1).weight is None


# --- regression episodes


def test_support_and_query_are_disjoint_rows_of_the_task():
    tasks = make_tasks([8, 5, 11, 8])
    sampler = EpisodeSampler(tasks, classification=False, n_shots=3)
    rng = np.random.default_rng(0)
    which = np.array([2, 0, 0, 1, 3])
    for _ in range(20):
        batch = sampler.sample(which, rng)
        assert len(batch) == 5
        for j, task in enumerate(which):
            support, query = positions(batch.support, j), positions(batch.query, j)
            assert len(support) == 3
            # without n_queries the query set is all the rest
            together = np.concatenate([support, query])
            assert sorted(together) == sorted(tasks.rows(task))
            for part, rows in ((batch.support, support), (batch.query, query)):
                assert part.task(j).y[:, 0].tolist() == (10.0 * rows).tolist()
                assert (part.task(j).X[:, 1] == task).all()


@pytest.mark.parametrize(("n_shots", "n_queries"), [(1, 1), (2, 3), (4, 1), (3, 100)])
def test_episodes_have_the_sizes_asked_for(n_shots, n_queries):
    tasks = make_tasks([6, 9, 7])
    sampler = EpisodeSampler(tasks, classification=False, n_shots=n_shots, n_queries=n_queries)
    split = sampler.split(np.array([0, 1, 2, 1]), np.random.default_rng(0))
    sizes = np.array([6, 9, 7, 9])
    assert split.n_support.tolist() == [n_shots] * 4
    assert split.n_query.tolist() == np.minimum(sizes - n_shots, n_queries).tolist()
    assert len(split.support) == split.n_support.sum()
    assert len(split.query) == split.n_query.sum()


def test_every_row_is_drawn_equally_often_in_both_roles():
    tasks = make_tasks([6, 10])
    sampler = EpisodeSampler(tasks, classification=False, n_shots=2, n_queries=3)
    split = sampler.split(np.repeat([0, 1], 600), np.random.default_rng(0))
    support, query = (
        np.bincount(split.support, minlength=16),
        np.bincount(split.query, minlength=16),
    )
    for task in (0, 1):
        rows = tasks.rows(task)
        assert_uniform(support[rows], 2 * 600)
        assert_uniform(query[rows], 3 * 600)
    # negative control: the test sees a row that is left out
    uneven = support[tasks.rows(1)].copy()
    uneven[0] = 0
    with pytest.raises(AssertionError):
        assert_uniform(uneven, 2 * 600)


def test_pairs_of_rows_are_drawn_equally_often():
    tasks = make_tasks([5])
    sampler = EpisodeSampler(tasks, classification=False, n_shots=2, n_queries=1)
    split = sampler.split(np.zeros(1000, dtype=int), np.random.default_rng(0))
    pairs = np.sort(split.support.reshape(-1, 2), axis=1)
    assert_uniform(np.unique(5 * pairs[:, 0] + pairs[:, 1], return_counts=True)[1], 1000)
    assert len(np.unique(5 * pairs[:, 0] + pairs[:, 1])) == 10


def test_episodes_are_a_function_of_the_seed():
    tasks = make_tasks([7, 9, 5])
    sampler = EpisodeSampler(tasks, classification=False)
    which = np.array([0, 1, 2])

    def draw(seed):
        batch = sampler.sample(which, np.random.default_rng(seed))
        return [positions(s, j).tolist() for s in (batch.support, batch.query) for j in range(3)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_without_n_shots_regression_draws_sizes_log_uniformly_for_each_batch():
    tasks = make_tasks([60, 60])
    sampler = EpisodeSampler(tasks, classification=False)
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(2000):
        split = sampler.split(np.array([0, 1]), rng)
        assert split.n_support[0] == split.n_support[1]  # one size for a batch
        assert (split.n_support + split.n_query == 60).all()
        sizes.append(int(split.n_support[0]))
    low, high = SUPPORT_RANGE
    assert min(sizes) == low
    assert max(sizes) == high
    # log-uniform: a size k has probability log((k + 1) / k) / log((high + 1) / low)
    counts = np.bincount(sizes, minlength=high + 1)[low:]
    k = np.arange(low, high + 1)
    expected = 2000 * np.log((k + 1) / k) / np.log((high + 1) / low)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(k) - 1)


def test_without_n_shots_small_tasks_keep_half_of_their_rows_for_the_queries():
    tasks = make_tasks([2, 3, 4, 9, 60])
    sampler = EpisodeSampler(tasks, classification=False)
    rng = np.random.default_rng(0)
    seen = [sampler.split(np.arange(5), rng).n_support for _ in range(300)]
    low, high = SUPPORT_RANGE
    half = np.array([1, 1, 2, 4, 30])
    assert np.max(seen, axis=0).tolist() == np.minimum(half, high).tolist()
    assert np.min(seen, axis=0).tolist() == np.minimum(half, low).tolist()


# --- classification with shared labels


def test_shared_labels_are_used_as_they_are_and_stratified():
    counts = [[6, 4, 5], [5, 0, 7], [3, 3, 0]]
    tasks = make_classes(counts)
    sampler = EpisodeSampler(tasks, classification=True, n_shots=2)
    batch = sampler.sample(np.array([0, 1, 2, 0]), np.random.default_rng(0))
    for j, task in enumerate([0, 1, 2, 0]):
        support, query = batch.support.task(j), batch.query.task(j)
        for part, rows in (
            (support, positions(batch.support, j)),
            (query, positions(batch.query, j)),
        ):
            assert part.y.tolist() == tasks.y[rows].tolist()
            assert (part.X[:, 1] == task).all()
        expected = [2 if n else 0 for n in counts[task]]
        assert np.bincount(support.y, minlength=3).tolist() == expected
        rest = [max(n - 2, 0) for n in counts[task]]
        assert np.bincount(query.y, minlength=3).tolist() == rest
        assert not set(positions(batch.support, j)) & set(positions(batch.query, j))


def test_n_queries_counts_rows_of_each_class():
    tasks = make_classes([[6, 4, 9], [5, 3, 7]])
    sampler = EpisodeSampler(tasks, classification=True, n_shots=2, n_queries=3)
    batch = sampler.sample(np.array([0, 1]), np.random.default_rng(0))
    assert np.bincount(batch.query.task(0).y).tolist() == [3, 2, 3]
    assert np.bincount(batch.query.task(1).y).tolist() == [3, 1, 3]


def test_without_n_shots_classification_takes_half_of_each_class():
    tasks = make_classes([[6, 5, 2], [4, 0, 8]])
    sampler = EpisodeSampler(tasks, classification=True)
    batch = sampler.sample(np.array([0, 1]), np.random.default_rng(0))
    assert np.bincount(batch.support.task(0).y, minlength=3).tolist() == [3, 2, 1]
    assert np.bincount(batch.query.task(0).y, minlength=3).tolist() == [3, 3, 1]
    assert np.bincount(batch.support.task(1).y, minlength=3).tolist() == [2, 0, 4]


def test_a_class_of_a_single_row_goes_to_either_set():
    tasks = make_classes([[4, 1], [1, 4]])
    sampler = EpisodeSampler(tasks, classification=True)
    rng = np.random.default_rng(0)
    in_support = []
    for _ in range(100):
        split = sampler.split(np.array([0, 1]), rng)
        assert (split.n_support > 0).all()
        assert (split.n_query > 0).all()
        assert (split.n_support + split.n_query == 5).all()
        single = tasks.rows(0)[tasks.y[tasks.rows(0)] == 1]
        in_support.append(bool(np.isin(single, split.support)[0]))
    assert 20 < sum(in_support) < 80


def test_neither_set_is_empty_when_every_class_has_a_single_row():
    tasks = make_classes([[1, 1, 1], [1, 1, 0], [2, 0, 0]])
    sampler = EpisodeSampler(tasks, classification=True)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        split = sampler.split(np.array([0, 1, 2]), rng)
        assert (split.n_support >= 1).all()
        assert (split.n_query >= 1).all()
        assert (split.n_support + split.n_query == [3, 2, 2]).all()
        assert len(np.unique(np.concatenate([split.support, split.query]))) == 7
        seen.add(int(split.n_support[0]))
    assert seen == {1, 2}


# --- N-way episodes

POOL = [[5] * 8]  # one task with 8 classes of 5 rows


def way_episode(batch, tasks, j):
    """Output, class and row of the support and the query rows of an episode."""
    parts = []
    for part in (batch.support, batch.query):
        rows = positions(part, j)
        parts.append((part.task(j).y.numpy(), tasks.y[rows], rows))
    return parts


def test_way_episodes_have_the_ways_shots_and_queries_asked_for():
    tasks = make_classes(POOL)
    sampler = EpisodeSampler(tasks, classification=True, n_ways=5, n_shots=2, n_queries=3)
    batch = sampler.sample(np.zeros(30, dtype=int), np.random.default_rng(0))
    assert batch.support.X.shape == (30, 10, 2)
    assert batch.query.X.shape == (30, 15, 2)
    for j in range(30):
        (out_s, class_s, rows_s), (out_q, class_q, rows_q) = way_episode(batch, tasks, j)
        assert np.bincount(out_s).tolist() == [2] * 5
        assert np.bincount(out_q).tolist() == [3] * 5
        assert len(np.unique(class_s)) == 5
        assert not set(rows_s) & set(rows_q)
        # the same assignment in both sets, one output for each class
        pairs = set(zip(class_s, out_s, strict=True)) | set(zip(class_q, out_q, strict=True))
        assert len(pairs) == 5


def test_the_assignment_of_classes_to_outputs_is_uniform_and_leaks_nothing():
    tasks = make_classes([[4] * 4])
    sampler = EpisodeSampler(tasks, classification=True, n_ways=3, n_shots=1, n_queries=1)
    n = 3000
    batch = sampler.sample(np.zeros(n, dtype=int), np.random.default_rng(0))
    table = np.zeros((4, 3))
    first = np.zeros(3)
    permutations = {}
    for j in range(n):
        (out_s, class_s, _), _ = way_episode(batch, tasks, j)
        table[class_s, out_s] += 1
        first[out_s[0]] += 1
        key = tuple(out_s[np.argsort(class_s)])
        permutations[key] = permutations.get(key, 0) + 1
    assert_uniform(table.sum(1), 3 * n)  # every class as often as any
    for row in table:  # and at every output as often as at any
        assert_uniform(row, row.sum())
    # all 6 orders of the chosen classes are equally likely
    assert len(permutations) == 6
    assert_uniform(list(permutations.values()), n)
    # the place of a row in the episode says nothing about its output either
    assert_uniform(first, n)


def test_classes_are_drawn_from_the_task_of_the_episode():
    tasks = make_classes([[4, 4, 4, 0, 0, 0], [0, 0, 0, 4, 4, 4]])
    sampler = EpisodeSampler(tasks, classification=True, n_ways=2, n_shots=1, n_queries=1)
    which = np.array([0, 1] * 20)
    batch = sampler.sample(which, np.random.default_rng(0))
    for j, task in enumerate(which):
        for _, classes, _ in way_episode(batch, tasks, j):
            assert (classes // 3 == task).all()


def test_tasks_with_fewer_classes_than_ways_use_what_they_have():
    tasks = make_classes([[4, 4, 4, 4], [4, 4, 0, 0]])
    sampler = EpisodeSampler(tasks, classification=True, n_ways=3, n_shots=1, n_queries=2)
    n = 900
    batch = sampler.sample(np.tile([0, 1], n), np.random.default_rng(0))
    used = np.zeros(3)
    for j in range(2 * n):
        (out_s, _, _), (out_q, _, _) = way_episode(batch, tasks, j)
        assert len(np.unique(out_s)) == len(out_s) == (3 if j % 2 == 0 else 2)
        assert set(out_s) == set(out_q)
        if j % 2:
            used[out_s] += 1
    assert_uniform(used, 2 * n)  # every output is trained, also by tasks with few classes


def test_ragged_classes_in_way_episodes():
    tasks = make_classes([[2, 7, 3, 9], [5, 2, 2, 2]])
    sampler = EpisodeSampler(tasks, classification=True, n_ways=3, n_shots=1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        batch = sampler.sample(np.array([0, 1, 1]), rng)
        for j, task in enumerate([0, 1, 1]):
            (out_s, class_s, rows_s), (out_q, class_q, rows_q) = way_episode(batch, tasks, j)
            assert sorted(out_s) == [0, 1, 2]
            chosen = np.isin(tasks.y, class_s) & (tasks.codes == task)
            assert sorted([*rows_s, *rows_q]) == np.flatnonzero(chosen).tolist()
            assert (
                dict(zip(class_q, out_q, strict=True)).items()
                <= dict(zip(class_s, out_s, strict=True)).items()
            )


# --- fixed episodes


def fixed_tasks(labels=None):
    """Two tasks of four parts: rows 0-1 | 2-4 and rows 5-7 | 8."""
    in_query = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
    X = np.arange(9.0)[:, None]
    y = 10 * X if labels is None else np.array(labels, dtype=np.int64)
    codes = np.array([0] * 5 + [1] * 4)
    return TaskCollection(X, y, codes, np.arange(2), in_query, "list")


def test_fixed_episodes_are_kept_as_given():
    tasks = fixed_tasks()
    for seed in range(3):
        sampler = EpisodeSampler(tasks, classification=False, n_shots=1, n_queries=1)
        batch = sampler.sample(np.array([1, 0]), np.random.default_rng(seed))
        assert positions(batch.support, 0).tolist() == [5, 6, 7]
        assert positions(batch.query, 0).tolist() == [8]
        assert positions(batch.support, 1).tolist() == [0, 1]
        assert positions(batch.query, 1).tolist() == [2, 3, 4]
        assert batch.query.real(batch.query.y).flatten().tolist() == [80, 20, 30, 40]


def test_fixed_episodes_keep_their_rows_while_outputs_are_permuted():
    tasks = fixed_tasks([0, 1, 0, 1, 1, 2, 3, 4, 3])
    sampler = EpisodeSampler(tasks, classification=True, n_ways=3)
    assignments = set()
    for seed in range(60):
        batch = sampler.sample(np.array([0, 1]), np.random.default_rng(seed))
        assert positions(batch.support, 0).tolist() == [0, 1]
        assert positions(batch.query, 1).tolist() == [8]
        a, b = batch.support.task(0).y.tolist()
        assert batch.query.task(0).y.tolist() == [a, b, b]
        assert batch.query.task(1).y.tolist() == [batch.support.task(1).y.tolist()[1]]
        assignments.add((a, b))
    assert len(assignments) == 6  # of two classes to three outputs


# --- what can be split


@pytest.mark.parametrize(
    ("sizes", "n_shots", "words"),
    [
        ([4, 1, 1], None, "Some of the 3 tasks.*: 2 with a single row, which is a query row."),
        ([4, 3, 5], 3, r"1 with fewer than 4 rows \(n_shots=3 and a query row\), which give fewer"),
        ([4, 3, 1, 0], 3, "1 without rows, left out; 1 with a single row.*; 1 with fewer than 4"),
        ([4, 4], 3, None),
        ([2, 2], None, None),
    ],
)
def test_tasks_too_small_to_split_are_counted(sizes, n_shots, words):
    tasks, few = usable(make_tasks(sizes), n_shots, None, False)
    assert tasks.sizes.tolist() == [n for n in sizes if n]
    assert few is None if words is None else re.search(words, few)
    check_splittable(tasks, n_shots, None, False)


@pytest.mark.parametrize(
    ("counts", "n_shots", "n_ways", "kept", "words"),
    [
        ([[3, 2], [3, 1]], 2, None, [5, 4], "2 with fewer than 3 rows of a class"),
        ([[3, 3], [3, 1]], 1, 2, [6], "1 with fewer than two classes of two rows, left out"),
        (
            [[3, 3, 1], [3, 0, 2]],
            1,
            2,
            [6, 5],
            r": 1 single row\(s\) of a class in a task, left out",
        ),
        ([[2, 2], [2, 3]], 1, None, [4, 5], None),
        ([[2, 2], [2, 3]], 1, 2, [4, 5], None),
    ],
)
def test_classes_too_small_to_split_are_counted(counts, n_shots, n_ways, kept, words):
    tasks, few = usable(make_classes(counts), n_shots, n_ways, True)
    assert tasks.sizes.tolist() == kept
    assert few is None if words is None else re.search(words, few)
    check_splittable(tasks, n_shots, n_ways, True)


def test_episodes_that_are_given_are_taken_as_they_are():
    tasks = fixed_tasks()
    assert usable(tasks, 100, None, False) == (tasks, None)
    check_splittable(tasks, 100, None, False)


@pytest.mark.parametrize(
    ("tasks", "n_shots", "n_ways", "message"),
    [
        (
            make_tasks([4, 3]),
            5,
            None,
            "n_shots=5.*any task can give: the largest task has 4.*Lower",
        ),
        (make_classes([[3, 2], [3, 1]]), 3, None, "the largest class of a task has 3 rows"),
        (make_classes([[3, 0], [2, 0]]), 1, 2, "too few classes of task 0: got 1 class"),
    ],
)
def test_tasks_none_of_which_can_be_split_are_refused(tasks, n_shots, n_ways, message):
    classification = tasks.y.dtype.kind == "i"
    with pytest.raises(ValueError, match=message):
        check_splittable(tasks, n_shots, n_ways, classification)


@pytest.mark.parametrize("n_shots", [None, 0, 1, 3])
@pytest.mark.parametrize("n_ways", [None, 2])
def test_every_episode_of_ragged_classes_has_query_rows(n_shots, n_ways):
    counts = [[1, 0, 0], [1, 1, 0], [4, 1, 2], [9, 9, 9], [2, 0, 0], [0, 5, 2]]
    tasks, _ = usable(make_classes(counts), n_shots, n_ways, True)
    sampler = EpisodeSampler(
        tasks, classification=True, n_ways=n_ways, n_shots=n_shots, n_queries=4
    )
    which = np.repeat(np.arange(tasks.n_tasks), 50)
    split = sampler.split(which, np.random.default_rng(0))
    assert split.n_query.min() >= 1
    several = tasks.sizes[which] > 1
    assert (split.n_support[several] > 0).all() == (n_shots != 0)
    assert (split.n_support[~several] == 0).all()
    if n_ways is not None and n_shots != 0:  # no query row is of a class without support rows
        for k in range(len(which)):
            s = split.support[split.n_support[:k].sum() :][: split.n_support[k]]
            q = split.query[split.n_query[:k].sum() :][: split.n_query[k]]
            assert not set(tasks.y[q]) - set(tasks.y[s])


@pytest.mark.parametrize(("n_shots", "expected"), [(None, [0, 1, 1, 2, 5]), (3, [0, 1, 2, 3, 3])])
def test_small_tasks_give_what_support_rows_they_can(n_shots, expected):
    tasks = make_tasks([1, 2, 3, 4, 30])
    sampler = EpisodeSampler(
        tasks, classification=False, n_shots=n_shots, n_queries=7, support_range=(5, 5)
    )
    batch = sampler.sample(np.arange(5), np.random.default_rng(0))
    real = batch.support.weight > 0
    assert real.sum(1).tolist() == expected
    assert batch.query.lengths.tolist() == [min(n, 7) for n in tasks.sizes - expected]
    assert batch.support.task(0).weight.tolist() == [0]


def test_fixed_episodes_with_more_classes_than_ways_are_refused():
    tasks = fixed_tasks([0, 1, 0, 1, 1, 2, 3, 4, 3])
    check_splittable(tasks, None, 3, True)
    with pytest.raises(ValueError, match="episode of task 1 has 3 classes, but n_ways=2"):
        check_splittable(tasks, None, 2, True)


# --- held-out tasks


def test_hold_out_splits_whole_tasks():
    tasks = make_tasks([3, 4, 5] * 7)
    kept, held = hold_out(tasks, "auto", 0.2, seed=0)
    train, valid = (part_of(tasks, units, pool=False) for units in (kept, held))
    assert valid.n_tasks == 4
    assert train.n_tasks == 17
    assert sorted([*train.ids, *valid.ids]) == list(range(21))
    for part in (train, valid):
        for j, task in enumerate(part.ids):
            rows = part.X[part.rows(j), 0].astype(int)
            assert sorted(rows) == sorted(tasks.rows(task))
    again = hold_out(tasks, "auto", 0.2, seed=0)[1]
    assert again.tolist() == held.tolist()
    assert {tuple(hold_out(tasks, "auto", 0.2, seed=s)[1]) for s in range(5)} != {tuple(held)}
    assert part_of(tasks, np.arange(tasks.n_tasks), pool=False) is tasks


def test_hold_out_is_automatic_from_ten_tasks_on():
    assert hold_out(make_tasks([2] * 9), "auto", 0.5, seed=0)[1] is None
    assert hold_out(make_tasks([2] * 10), "auto", 0.5, seed=0)[1].size == 5
    assert hold_out(make_tasks([2] * 10), "auto", 0.01, seed=0)[1].size == 1
    assert hold_out(make_tasks([2] * 50), False, 0.5, seed=0)[1] is None
    kept, held = hold_out(make_tasks([2, 2]), True, 0.9, seed=0)
    assert len(kept) == len(held) == 1


def test_hold_out_that_is_asked_for_and_impossible_is_an_error():
    with pytest.raises(ValueError, match=r"only 1 \(at least 2 are needed\).*early_stopping=False"):
        hold_out(make_tasks([4]), True, 0.5, seed=0)
    pool = make_classes([[3] * 9])
    with pytest.raises(ValueError, match=r"only 9 \(at least 10 are needed\)"):
        hold_out(pool, True, 0.5, seed=0, n_ways_of_pool=5)


def test_hold_out_of_a_class_pool_splits_whole_classes():
    pool = make_classes([[3] * 20])
    units = hold_out(pool, True, 0.2, seed=0, n_ways_of_pool=5)
    train, valid = (part_of(pool, classes, pool=True) for classes in units)
    held, kept = set(np.unique(valid.y)), set(np.unique(train.y))
    assert len(held) == 5  # as many as an episode needs
    assert held | kept == set(range(20))
    assert not held & kept
    for part in (train, valid):
        rows = part.X[:, 0].astype(int)
        assert part.y.tolist() == pool.y[rows].tolist()
    # both parts give episodes
    for part in (train, valid):
        sampler = EpisodeSampler(part, classification=True, n_ways=5, n_shots=1)
        batch = sampler.sample(np.zeros(3, dtype=int), np.random.default_rng(0))
        assert batch.support.y.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_some_of_very_many_tasks_are_looked_at():
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(11, 3).tolist() == [0, 5, 10]
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(9000, 1)), np.repeat(np.arange(3000), 3)
    for rule in ("sgd", "gaussian-head"):
        reg = MAMLRegressor(update_rule=rule, max_iter=1, hidden_layer_sizes=(2,), random_state=0)
        with mock.patch.object(sources, "EpisodeSampler", side_effect=EpisodeSampler) as made:
            reg.fit(X, X[:, 0] + task % 7, groups=task)
        sizes = {call.args[0].n_tasks for call in made.call_args_list}
        of_rule = {"sgd": {2550}, "gaussian-head": {3000, sources.MOST_OF_MEMBER}}[rule]
        assert sizes == {*of_rule, MOST_VALIDATED}


def test_members_are_judged_on_as_many_tasks_each():
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(9000, 1)), np.repeat(np.arange(3000), 3)
    settings = {"max_iter": 1, "hidden_layer_sizes": (2,), "random_state": 0}
    with mock.patch.object(sources, "HeldOut", side_effect=sources.HeldOut) as made:
        MAMLRegressor(**settings).fit(X, X[:, 0] + task % 7, groups=task)
    seen = {}
    for call in made.call_args_list:
        member, episodes, of_episode = call.args
        assert len(episodes) == len(of_episode)
        seen.setdefault(member, set()).update(of_episode.tolist())
    assert [len(tasks) for tasks in seen.values()] == [sources.MOST_OF_MEMBER] * 5
    assert len(set().union(*seen.values())) == 5 * sources.MOST_OF_MEMBER


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_are_gathered_from_any_layout(order):
    values = np.asarray(np.random.default_rng(0).normal(size=(50, 3)), order=order)
    index = np.array([[3, 0], [49, 3]])
    found = gather(values, index)
    np.testing.assert_array_equal(found, values[index])
    assert found.flags.c_contiguous


@pytest.mark.parametrize("n_tasks", [1, 3, 7, 100, 101, 250])
def test_validation_visits_every_task_equally_often_and_always_the_same(n_tasks):
    sampler = EpisodeSampler(make_tasks([4] * n_tasks), classification=False, n_shots=2)
    batches = draw_fixed(sampler, seed=0)
    tasks = torch.cat([batch.query.X[:, 0, 1] for batch in batches]).int()
    counts = torch.bincount(tasks, minlength=n_tasks)
    assert counts.min() == counts.max() == max(VALIDATION_EPISODES // n_tasks, 1)
    assert max(len(batch) for batch in batches) <= VALIDATION_EPISODES
    again = draw_fixed(sampler, seed=0)
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.support.X, same.support.X)
    data = FixedEpisodes(batches)
    assert len(data) == len(batches)
    assert data[0] is data.__getitems__([0]) is batches[0]


# --- the stream of tasks


def make_stream(n_tasks, batch_size, seed=0, drawn=None):
    """Stream whose batch is the pair of the tasks and the next random number."""

    def draw(which, rng):
        if drawn is not None:
            drawn.append(which.copy())
        return [(tasks.tolist(), float(rng.random())) for tasks in which]

    return TaskStream(draw, n_tasks, batch_size, seed)


def run_stream(stream, n_updates, *, start=0):
    """What a DataLoader draws in `n_updates` updates of an epoch."""
    stream.first_update, stream.n_updates = start, n_updates
    loader = torch.utils.data.DataLoader(
        stream, batch_size=stream.batch_size, collate_fn=lambda batch: batch
    )
    return list(loader)


@pytest.mark.parametrize(("n_tasks", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (19, 1)])
def test_every_pass_visits_each_task_once(n_tasks, batch_size):
    batches = run_stream(make_stream(n_tasks, batch_size), 40)
    assert [len(tasks) for tasks, _ in batches] == [batch_size] * 40
    visited = np.concatenate([tasks for tasks, _ in batches])
    n_passes = len(visited) // n_tasks
    passes = visited[: n_passes * n_tasks].reshape(n_passes, n_tasks)
    assert (np.sort(passes, axis=1) == np.arange(n_tasks)).all()
    if n_tasks > 4 and n_passes > 1:
        assert len(np.unique(passes, axis=0)) > 1  # in a new order each time


@pytest.mark.parametrize(("n_tasks", "batch_size"), [(10, 4), (5, 12), (23, 1)])
def test_a_stream_that_was_interrupted_goes_on_as_if_it_was_not(n_tasks, batch_size):
    whole = run_stream(make_stream(n_tasks, batch_size), 30)
    stream, parts, start = make_stream(n_tasks, batch_size), [], 0
    for length in (1, 11, 3, 15):
        parts += run_stream(stream, length, start=start)
        start += length
    assert parts == whole
    # ... in another process, too
    assert run_stream(make_stream(n_tasks, batch_size), 15, start=15) == whole[15:]


@pytest.mark.parametrize("parts", [(100, 100), (64, 136), (1, 70, 129)])
def test_an_interrupted_stream_goes_on_inside_a_block(parts):
    whole = run_stream(make_stream(10, 4), 200)
    again, start = [], 0
    for length in parts:
        again += run_stream(make_stream(10, 4), length, start=start)
        start += length
    assert again == whole


def test_blocks_grow_so_that_little_is_drawn_in_vain():
    drawn = []
    stream = make_stream(10, 4, drawn=drawn)
    for n_updates in (1, 2, 3, 10, 64, 65, 500):
        drawn.clear()
        run_stream(stream, n_updates)
        # what the largest block may be, or as much again as was needed
        assert n_updates <= sum(map(len, drawn)) < min(2 * n_updates, n_updates + 64) + 1
        stream = make_stream(10, 4, drawn=drawn)


def test_blocks_of_large_episodes_are_short():
    drawn = []

    def draw(which, rng):
        drawn.append(len(which))
        return [0] * len(which)

    for n_bytes, largest in ((2**10, 64), (2**18, 16), (2**30, 1)):
        drawn.clear()
        stream = TaskStream(draw, 10, 4, 0, n_bytes)
        for update in range(200):
            stream.batch(update)
        assert max(drawn) == largest
        assert sum(drawn) >= 200


def test_a_loader_without_the_work_of_torchs_gives_the_same():
    sampler = EpisodeSampler(make_tasks([4] * 10), classification=False, n_shots=2)
    stream = TaskStream(sampler.sample_batches, 10, 4, 0)
    stream.first_update, stream.n_updates = 7, 5
    validation = FixedEpisodes(draw_fixed(sampler, 0))
    for data, size in ((stream, 4), (validation, 1)):
        light = BatchLoader(data)
        loader = torch.utils.data.DataLoader(data, batch_size=size, collate_fn=use_batch)
        assert len(light) == len(loader) == len(list(light))
        for (a, y), (b, z) in zip(light, loader, strict=True):
            assert torch.equal(a.support.X, b.support.X)
            assert torch.equal(a.query.X, b.query.X)
            assert torch.equal(y, z)


# --- several batches at once


@pytest.mark.parametrize("sizes", [[6] * 5, [6, 9, 4, 12, 7]], ids=["equal", "ragged"])
@pytest.mark.parametrize("n_shots", [2, None])
def test_batches_drawn_at_once_are_proper_batches(sizes, n_shots):
    tasks = make_tasks(sizes)
    sampler = EpisodeSampler(tasks, classification=False, n_shots=n_shots)
    which = np.random.default_rng(0).integers(0, 5, (30, 4))
    batches = sampler.sample_batches(which, np.random.default_rng(0))
    assert len(batches) == 30
    for batch, own in zip(batches, which, strict=True):
        assert len(batch) == 4
        for j, task in enumerate(own):
            rows = [*positions(batch.support, j), *positions(batch.query, j)]
            assert sorted(rows) == sorted(tasks.rows(task).tolist())
        width = batch.support.X.shape[1]  # no wider than its own longest episode
        assert width == max(len(positions(batch.support, j)) for j in range(4))


def test_each_batch_has_a_support_size_of_its_own():
    sampler = EpisodeSampler(make_tasks([60] * 3), classification=False)
    batches = sampler.sample_batches(np.zeros((200, 3), dtype=int), np.random.default_rng(0))
    assert {batch.support.lengths is None for batch in batches} == {True}
    assert {batch.support.X.shape[1] for batch in batches} == set(range(5, 21))


@pytest.mark.parametrize(("n_classes", "n_ways"), [(7, 3), (3, 3), (20, 2)])
def test_every_choice_of_classes_is_as_likely(n_classes, n_ways):
    labels = np.repeat(np.arange(n_classes), 3)
    rows = np.arange(len(labels), dtype=float)[:, None]
    zeros = np.zeros(len(labels), dtype=np.intp)
    tasks = TaskCollection(rows, labels, zeros, np.arange(1), None, "single")
    sampler = EpisodeSampler(tasks, classification=True, n_ways=n_ways, n_shots=1, n_queries=1)
    cells, episode = sampler._choose_cells(np.zeros(6000, dtype=int), np.random.default_rng(0))
    assert (np.bincount(episode) == n_ways).all()
    chosen = np.sort(cells.reshape(6000, n_ways), axis=1)
    assert (np.diff(chosen, axis=1) > 0).all()
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    n_choices = math.comb(n_classes, n_ways)
    assert len(counts) == n_choices
    expected = 6000 / n_choices
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


# --- the order of a data loader


def test_streams_differ_by_seed_and_draws_by_update():
    first, second = (run_stream(make_stream(10, 4, seed), 20) for seed in (0, 1))
    assert run_stream(make_stream(10, 4, 0), 20) == first
    assert [tasks for tasks, _ in first] != [tasks for tasks, _ in second]
    assert len({number for _, number in [*first, *second]}) == 40


def test_items_may_come_in_any_order():
    """As from a data loader that shuffles."""
    stream = make_stream(5, 4)
    in_order = stream.__getitems__(list(range(20)))[0]
    items = np.random.default_rng(0).permutation(20)
    shuffled = [task for k in range(5) for task in stream.__getitems__(list(items[4 * k :][:4]))[0]]
    assert shuffled == [in_order[item] for item in items]


def test_an_epoch_of_the_stream_is_its_number_of_updates():
    stream = make_stream(10, 4)
    assert len(stream) == 4 * UPDATES_PER_EPOCH
    stream.n_updates = 3
    assert len(stream) == 12
    assert stream[5] == stream.__getitems__([5])


def test_the_targets_of_a_batch_are_its_pooled_query_targets():
    tasks = make_tasks([4, 6])
    sampler = EpisodeSampler(tasks, classification=False, n_shots=2)
    batch = sampler.sample(np.array([0, 1]), np.random.default_rng(0))
    same, y = use_batch(batch)
    assert same is batch
    expected = [*positions(batch.query, 0), *positions(batch.query, 1)]
    assert y[:, 0].tolist() == [10.0 * row for row in expected]
