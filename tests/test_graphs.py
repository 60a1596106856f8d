"""Recorded graphs: what becomes of their operations, and when they are taken for right."""

import collections
import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from sklearn_maml.engine.tracing import branches, fusing, graphs, recording
from sklearn_maml.engine.tracing.graphs import close, nudged
from sklearn_maml.engine.tracing.tracer import Tracer


def meta_gradient(module, n_steps=2):
    """Function of parameters and rows: gradient through inner steps, and its arguments."""
    names = [name for name, _ in module.named_parameters()]

    def loss(params, X, y):
        return (functional_call(module, params, (X,)) - y).square().mean()

    def query_loss(params, X, y):
        for _ in range(n_steps):
            found = grad(loss)(params, X, y)
            params = {name: p - 0.1 * found[name] for name, p in params.items()}
        return loss(params, X, y)

    def function(*tensors):
        params = dict(zip(names, tensors, strict=False))
        found = vmap(grad(query_loss), in_dims=(None, 0, 0))(params, *tensors[len(names) :])
        return [found[name].mean(0) for name in names]

    return function, [p.detach() for p in module.parameters()]


def mlp():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    function, params = meta_gradient(module.double())
    X, y = torch.randn(4, 6, 3).double(), torch.randn(4, 6, 1).double()
    return function, [*params, X, y]


@pytest.fixture
def fused(monkeypatch):
    """Record as for an accelerator; the graphs that are made."""
    monkeypatch.setattr(recording, "accelerators", lambda tensors: [torch.device("cpu")])
    monkeypatch.setattr(recording, "states_of", lambda tensors: ())
    monkeypatch.setattr(recording, "restore", lambda tensors, states: None)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.ELU])
def test_recorded_convolutions_read_memory_as_it_lies(activation):
    """torch is wrong about strides of some results, unless it sees values."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4, track_running_stats=False), activation()]
    layers += [nn.Conv2d(4, 2, 3, 2, 1), activation(), nn.Flatten(), nn.Linear(18, 1)]
    function, params = meta_gradient(nn.Sequential(*layers).double(), 1)
    inputs = [*params, torch.randn(2, 5, 1, 12, 12).double(), torch.randn(2, 5, 1).double()]
    graph = recording.trace(function, inputs)
    for got, expected in zip(graph(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_inner_steps_of_all_parameters_are_one_operation_each(fused):
    function, inputs = mlp()
    graph = recording.trace(function, inputs)
    found = collections.Counter(node.target for node in graph.module.graph.nodes)
    n_parameters = len(inputs) - 2
    moves = found[torch._foreach_sub]
    assert 1 <= moves <= 2
    assert found["sub"] < n_parameters
    for got, expected in zip(graph(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_operations_that_read_each_other_are_not_joined(fused):
    def function(a, b):
        first = a * 3.0
        second = first * 3.0
        third = b * 3.0
        return [first - 2.0 * a, second - 2.0 * third, third + second]

    inputs = [torch.arange(4.0), torch.arange(4.0) + 1]
    graph = recording.trace(function, inputs)
    for got, expected in zip(graph(*inputs), function(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_equal_constants_are_one_and_nothing_is_not_added():
    def function(a):
        ones = [torch.ones_like(a).cumsum(0) for _ in range(2)]
        return [a * ones[0] + a * ones[1] + torch.zeros_like(a), -a * 2.0]

    graph = recording.trace(function, [torch.randn(3)])
    targets = collections.Counter(str(node.target) for node in graph.module.graph.nodes)
    assert targets["add"] == 1
    assert targets["mul"] == 2  # one with the constant, one with the sign
    assert "neg" not in targets
    a = torch.randn(3)
    for got, expected in zip(graph(a), function(a), strict=True):
        assert torch.equal(got, expected)


def test_hidden_tensors_are_not_recorded():
    hidden = torch.ones(3)
    with pytest.raises(recording.Untraceable, match="no parameter and no buffer"):
        recording.trace(lambda a: [a + hidden], [torch.ones(3)])


# --- what is run side by side


class Streams:
    """A device on which every operation knows what has surely happened before it."""

    def __init__(self):
        self.current = self.Stream()
        outer = self

        class Event:
            def record(self, stream):
                self.known = set(stream.known)

        self.Event, self.n_streams = Event, 1
        self.made = outer

    class Stream:
        def __init__(self):
            self.known = set()

        def wait_event(self, event):
            self.known |= event.known

    def current_stream(self):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.mark.parametrize("fuses", [False, True])
def test_operations_wait_for_what_they_read_and_the_end_for_all(fuses, fused, monkeypatch):
    monkeypatch.setattr(branches, "_side_streams", {})
    if not fuses:
        monkeypatch.setattr(recording, "fuse", lambda module: None)
    function, inputs = mlp()
    graph = recording.trace(function, inputs)
    device, used = Streams(), set()
    wrote = {}  # memory, and the operation that wrote it
    original = torch.fx.Interpreter.run_node

    def listed(value):
        return value if isinstance(value, list | tuple) else [value]

    def run_node(self, node):
        result = original(self, node)
        if node.op in ("placeholder", "get_attr", "output"):
            return result
        stream = device.current
        places = {
            value.untyped_storage().data_ptr()
            for source in node.all_input_nodes
            for value in listed(self.env[source])
        }
        results = listed(result)
        if any(value.untyped_storage().data_ptr() not in places for value in results):
            assert {wrote[place] for place in places if place in wrote} <= stream.known
            stream.known.add(node)
            used.add(id(stream))
            wrote.update((value.untyped_storage().data_ptr(), node) for value in results)
        return result

    monkeypatch.setattr(torch.fx.Interpreter, "run_node", run_node)
    main = device.current
    got = graph.in_branches(device, torch.device("cpu"))(*inputs)
    assert device.current is main
    assert set(wrote.values()) <= main.known
    assert len(used) > 1
    for a, b in zip(got, function(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_large_graphs_run_one_operation_after_another(monkeypatch):
    function, inputs = mlp()
    graph = recording.trace(function, inputs)
    monkeypatch.setattr(branches, "MOST_BYTES", 100)
    assert graph.in_branches(Streams(), torch.device("cpu")) == graph.run


# --- taking a graph for right


def test_gradients_that_are_nothing_but_rounding_may_differ():
    """As of a bias before a batch norm."""

    def function(bias, x):
        return [(x + bias - (x + bias).mean()).mean(0, keepdim=True), x.square()]

    inputs = [torch.full((1,), 0.3), torch.linspace(0, 1, 37)]
    expected = function(*inputs)
    got = [expected[0] + 3e-8, expected[1]]

    def rounded():
        return function(*nudged(inputs))

    assert close(got, expected, rounded)
    assert not close([expected[0] + 1e-3, expected[1]], expected, rounded)
    assert not close([expected[0], expected[1] * 1.001], expected, rounded)
    assert not close([expected[0], expected[1] * torch.nan], expected, rounded)


def test_rectified_units_may_be_on_either_side_of_0_but_not_further():
    def function(x):
        return [(x - 1.0 > 0).float()]

    inputs = [torch.ones(5) + 1e-8]
    expected = function(*inputs)
    other = [expected[0].clone()]
    other[0][1] = 1.0

    def rounded():
        return function(*nudged(inputs))

    assert rounded()[0].sum() > 0
    # a change as large as the largest value is not rounding, whatever the function is
    assert not close(other, expected, rounded)
    scaled = [torch.tensor([100.0]), 0.5 * other[0]]
    base = [torch.tensor([100.0]), 0.5 * expected[0]]
    assert close(scaled, base, lambda: [base[0], 0.5 * rounded()[0]])


def test_a_captured_graph_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(graphs, "_launched_at_once", lambda graph, inputs: lambda a: [a * 1.01])
    tracer = Tracer(0, 1)
    tracer.updates_left = 10
    tracer.begin_update()
    with pytest.raises(recording.Untraceable, match="where it is captured"):
        tracer.run(lambda a: [a * 1.0], [torch.ones(3)], shape=(), settings=lambda: None)


def test_fusing_takes_factors_into_sums():
    module = recording.record(lambda a, b: [a - b * 0.5, a + b * 2.0], [torch.ones(3)] * 2)
    fusing.fuse(module)
    factors = [node.kwargs.get("alpha") for node in module.graph.nodes if node.kwargs]
    assert factors == [0.5, 2.0]
