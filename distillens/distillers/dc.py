"""DC, dataset condensation by gradient matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distillens.core.dataset import Dataset
from distillens.distillers._gradient import Alternating, loops
from distillens.distillers._pixels import small
from distillens.nets.convnet import ConvNet


@dataclass(frozen=True)
class DC(Alternating):
    """Distilled images are moved so that they give a network the gradients that real images give.

    min_S  E_theta0  sum_t sum_c  Dist(grad L(T_c; theta_t), grad L(S_c; theta_t)),
    theta_{t+1} trained on S. Dist sums 1 - cosine over the output units of every weight; biases and norm
    weights take no part.

    One step of ours is one outer iteration of theirs: a fresh network, ``outer_loop`` matching steps,
    ``inner_loop`` passes of training on S after each but the last.

    Source: Zhao, Mopuri & Bilen 2021, algorithm 1, equation 9; ``main.py``, ``match_loss``. Batch norm as there: a
    pass over 16 real images a class sets its statistics before each match, which holds them constant. Where we differ:
    the gradient is taken by as many classes at a time as a cache holds (the loss is a sum, so it is the same), which
    bounds memory.
    """

    paper: ClassVar[str] = "Zhao et al. 2021"

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> DC:
        """The authors' loops (the nearest row of their table); on digits' scale a short version of them."""
        net = ConvNet.defaults(like)
        if small(like):
            if ipc == 1:
                return cls(steps=150, lr_img=1.0, batch_real=64, init="real", net=net)
            return cls(steps=20, outer_loop=5, inner_loop=10, lr_img=1.0, lr_net=0.2, init="real", net=net)
        return cls(**loops(ipc), net=net)

    @property
    def strategy(self) -> str:
        """Images are matched and trained on as they are."""
        return ""
