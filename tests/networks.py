"""Modules of users, which are no plain sequences of layers."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Run with torch.vmap."""

    def __init__(self, in_features: int, out_features: int, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Linear(in_features, width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden + hidden.square())


class Normed(nn.Module):
    """Rows meet in its batch norm."""

    def __init__(self, in_features: int, out_features: int, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Linear(in_features, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


class Dropped(nn.Module):
    """Draws random numbers in meta-training."""

    def __init__(self, in_features: int, out_features: int, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Linear(in_features, width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))
