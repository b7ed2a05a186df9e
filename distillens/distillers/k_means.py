"""k-means: the real image nearest to each centre of its class."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens.core.rng import Key
from distillens.distillers._coreset import Embedded


@dataclass(frozen=True)
class KMeans(Embedded):
    """Each class is cut into ``ipc`` clusters; the real image nearest to each cluster's mean is taken.

    Clusters by Lloyd's rule from one k-means++ start (scikit-learn's). Where two means share their nearest image, each
    gets one of its own: the assignment of images to means with the least sum of squared distances.

    Features are the last hidden layer of one network trained on the real data, or pixels.

    Source: Cui et al. 2022 (DC-BENCH) use such sets; the code that chose theirs is not published.
    """

    paper: ClassVar[str] = "Cui et al. 2022"

    def choose_in(self, features: torch.Tensor, count: int, key: Key) -> torch.Tensor:
        """The images of ``count`` clusters, whose start is drawn from the key."""
        return nearest_to(clusters(features, count, key), features)


def clusters(features: torch.Tensor, count: int, key: Key) -> torch.Tensor:
    """The means [count, d] of the clusters of features [n, d]; some are alike where fewer features differ."""
    from sklearn.cluster import KMeans as Lloyd
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    seed = key.number() % 2**32  # what scikit-learn takes
    # Threads would add up in another order: other last bits, now and then another cluster.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
        rule = Lloyd(count, init="k-means++", n_init=1, tol=0.0, random_state=seed)
        found = rule.fit(features.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(features)


def nearest_to(centres: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """For each centre [m, d] the index [m] of its own nearest among features [n, d], n >= m."""
    from scipy.optimize import linear_sum_assignment

    squared = torch.stack([(features - centre).square().sum(1) for centre in centres])
    return torch.from_numpy(linear_sum_assignment(squared.cpu().numpy())[1])
