"""DSA, gradient matching under differentiable siamese augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from distillens.core.dataset import Dataset
from distillens.distillers._gradient import Alternating, loops
from distillens.distillers._pixels import Init, small
from distillens.nets.convnet import ConvNet


@dataclass(frozen=True)
class DSA(Alternating):
    """Gradient matching as ``dc``, of real and distilled images under the same random augmentation.

    min_S  E_theta0  sum_t sum_c  Dist(grad L(A(T_c); theta_t), grad L(A(S_c); theta_t)), with one siamese draw A a
    class and match shared by its real and distilled images, which the gradient goes through. The network is trained on S
    under draws of its own: one operation a batch, with other numbers for each image.

    Source: Zhao & Bilen 2021, equation 4; ``main.py --method DSA``. Its evaluation trains 1000 epochs under the
    same augmentation: that is the protocol's. Where we differ: as ``dc``; draws come from keys, where the authors re-seed
    the global generator from the clock.
    """

    paper: ClassVar[str] = "Zhao & Bilen 2021"

    init: Init = "real"
    augment: str = "color_crop_cutout_flip_scale_rotate"

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> DSA:
        """The authors' loops (the nearest row of their table); on digits' scale a short version of them."""
        net = ConvNet.defaults(like)
        if small(like):
            # A digit in the mirror is none. On validation this equals no augmentation at all (which is ``dc``).
            plain = cls(lr_img=1.0, batch_real=64, augment="color_crop_cutout_scale_rotate", net=net)
            if ipc == 1:
                return replace(plain, steps=150)
            return replace(plain, steps=20, outer_loop=5, inner_loop=10, lr_net=0.2)
        return cls(**loops(ipc), net=net)

    @property
    def strategy(self) -> str:
        """As set."""
        return self.augment
