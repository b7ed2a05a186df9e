"""How much more often than in its class a word must stand among the most helped images to be found."""

from __future__ import annotations

import math

import torch

from distillens.analyses.pointwise._enrichment import tails

POWER = 0.8


def detectable(size: int, base: float, top: int, threshold: float) -> float:
    """The smallest lift found with probability POWER, where a tail of at most ``threshold`` is a finding; infinite where none is.

    ``base`` is the share of the class's ``size`` images that have the word. The ``top`` are taken as independent draws: the share s
    that has P(Binomial(top, s) >= c) = POWER is a quantile of the beta distribution, with c the smallest count that is a finding.
    """
    from scipy.special import betaincinv

    having = round(base * size)
    tail = tails(size, torch.tensor([having]), top)[0]
    least = int((tail > threshold).sum())
    if least > min(top, having):
        return math.inf
    share = float(betaincinv(least, top - least + 1, POWER)) if least else 0.0
    return share * size / having if share * top <= having else math.inf
