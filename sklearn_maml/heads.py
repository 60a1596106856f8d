"""Heads whose initialisation is the same for all classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklearn_maml.modules import head_names
from sklearn_maml.theta import name_in_module, name_in_rule
from sklearn_maml.update_rules import TaskSolver


class SymmetricHead:
    """Projection of meta-parameters, and of meta-gradients, on those that treat classes alike.

    A meta-step followed by it is one of the projected gradient method: what is equal for all
    classes, or zero, at the start of meta-training stays so under any optimiser.

    Parameters
    ----------
    rows : dict of str to int
        The axis of the classes of each meta-parameter that has one.
    zero : sequence of str
        Those of them that stay zero; the others are equal for all classes.
    """

    def __init__(self, rows: dict[str, int], zero: Sequence[str] = ()) -> None:
        self.rows = rows
        self.zero = frozenset(zero)

    def project(self, params: dict[str, nn.Parameter]) -> None:
        """Give all classes the parameters of the first, in place.

        Not their mean: equal parameters have to keep their last bit, and those of the classes
        differ by rounding alone after a step for equal gradients.
        """
        with torch.no_grad():
            for name, axis in self.rows.items():
                p = params.get(name)
                if p is None:
                    continue
                if name in self.zero:
                    p.zero_()
                else:
                    n_others = p.shape[axis] - 1
                    p.narrow(axis, 1, n_others).copy_(p.narrow(axis, 0, 1))

    def project_gradient(self, grads: dict[str, Tensor], in_place: bool) -> None:
        """Project gradients: their mean over the classes, or zero.

        In place where the tensors are parts of a whole; otherwise they are replaced in the dict.
        """
        for name, axis in self.rows.items():
            grad = grads.get(name)
            if grad is None:
                continue
            if name in self.zero:
                projected = torch.zeros_like(grad)
            else:
                projected = grad.mean(axis, keepdim=True).expand_as(grad)
            if in_place:
                grad.copy_(projected)
            else:
                grads[name] = projected.contiguous()

    def check(self, module: nn.Module, rows: Tensor) -> None:
        """Refuse a module whose outputs for some rows still differ between the classes."""
        probe = copy.deepcopy(module).eval()
        self.project({name_in_module(name): p for name, p in probe.named_parameters()})
        with torch.no_grad():
            outputs = probe(rows)
        if not torch.allclose(outputs, outputs[:, :1]):
            head = "zero" if self.zero else "shared"
            raise ValueError(
                f"head={head!r} found a last layer in {type(module).__name__} that does not "
                "make its outputs alone: they differ between classes with equal rows. Give the "
                "module a torch.nn.Linear at its end, all of it trainable, or use head='free'."
            )


def find_head(
    module: nn.Module, head: str, rule: TaskSolver, adapted: Sequence[str], n_classes: int
) -> SymmetricHead:
    """Return the projection that `head`, "shared" or "zero", asks for.

    ValueError if the module has no linear head with `n_classes` outputs, if it does not adapt, or
    if the rule solves for the head or learns something about each pair of classes.
    """
    if rule.layer(module, adapted) is not None:
        raise ValueError(
            f"head={head!r} is where inner steps start from, but the update rule "
            f"{type(rule).__name__} solves for the head and takes none. Use head='free'."
        )
    names = head_names(module)
    prefix = names[0].rpartition(".")[0]
    layer = module.get_submodule(prefix)
    if not isinstance(layer, nn.Linear) or layer.out_features != n_classes:
        raise ValueError(
            f"head={head!r} needs a torch.nn.Linear with one row for each of the {n_classes} "
            f"classes as the last layer with parameters; that of {type(module).__name__} is "
            f"{prefix or 'the module itself'}: {layer}. Use such a layer, or head='free'."
        )
    weight = f"{prefix}.weight" if prefix else "weight"
    if weight not in adapted:
        raise ValueError(
            f"head={head!r} starts with equal outputs for all classes, and only the inner steps of "
            f"the head can tell them apart, but {weight} does not adapt. Use adapted='all' or "
            "'head', or head='free'."
        )
    rows = {name_in_module(name): 0 for name in names}
    zero = [*rows] if head == "zero" else []
    return SymmetricHead({**rows, **_rows_of_rates(module, names, rule, adapted, head)}, zero)


def _rows_of_rates(
    module: nn.Module,
    head_params: Sequence[str],
    rule: TaskSolver,
    adapted: Sequence[str],
    head: str,
) -> dict[str, int]:
    """Axis of the classes of what a rule learns: the one that grows with a class more."""
    fast = {n: p.detach() for n, p in module.named_parameters() if n in adapted}
    with_one_more = {n: torch.cat([p, p[:1]]) if n in head_params else p for n, p in fast.items()}
    learned, larger = (rule.initial_rates(params) for params in (fast, with_one_more))
    found = {}
    for name, rate in learned.items():
        pairs = zip(rate.shape, larger[name].shape, strict=True)
        axes = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if len(axes) > 1:
            raise ValueError(
                f"head={head!r} makes all classes alike, but {type(rule).__name__} learns "
                f"something for every pair of classes ({name}, of shape {tuple(rate.shape)}). Use "
                "another update_rule, or head='free'."
            )
        if axes:
            found[name_in_rule(name)] = axes[0]
    return found
