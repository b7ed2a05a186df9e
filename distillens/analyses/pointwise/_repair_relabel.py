"""Repair by relabelling: what networks without a point say of it becomes its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, restore_labels
from distillens.train import Population

LEAST = 1e-6  # a probability whose logarithm a label keeps


def as_table(labels: Labels, classes: int) -> torch.Tensor:
    """What each label asks for, [n, classes]: probabilities, or the targets of a regression."""
    if isinstance(labels, Targets | Probabilities):
        return labels.values
    if isinstance(labels, Logits):
        return labels.values.softmax(-1)
    return F.one_hot(labels.hard(), classes).float()


def foretold(population: Population, inits: int, data: Dataset, origin: torch.Tensor) -> torch.Tensor:
    """What networks trained without a point say of it, [points, k], of a population without each [inits, 1 + points].

    The mean probability over initialisations and the point's images; of regression targets the mean output.
    """
    outputs = population.logits(data).view(inits, -1, len(data), data.k)
    said = outputs[:, 1 + origin, torch.arange(len(data))]  # [inits, n, k]
    if not isinstance(data.labels, Targets):
        said = said.softmax(-1)
    by_point = said.new_zeros(int(origin.max()) + 1, data.k).index_add_(0, origin, said.mean(0))
    return torch.div(by_point, torch.bincount(origin)[:, None])


def relabelled(labels: Labels, rows: torch.Tensor, said: torch.Tensor) -> Labels:
    """The labels with those of ``rows`` as they are said to be [len(rows), k], in their kind; hard ones become probabilities."""
    said = said / said.sum(-1, keepdim=True) if not isinstance(labels, Targets) else said
    if isinstance(labels, Logits):
        values, said = labels.values.clone(), said.clamp(min=LEAST).log()
    else:
        values = as_table(labels, said.shape[1]).clone()
    values[rows] = said.to(values)
    if isinstance(labels, Hard):
        return Probabilities(values)
    return restore_labels(labels.kind, {"values": values}, {})
