"""How far a network is from another, and which one a set was distilled on."""

from __future__ import annotations

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.config import restore
from distillens.core.contracts import Net

SAME, RESIZED, RELATED, FOREIGN = range(4)
_CONVOLUTIONAL = {"ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18", "ResNet34"}


def distance(a: Net, b: Net) -> int:
    """0 the same network, 1 the same kind with other settings, 2 both convolutional, 3 of two families.

    A coarse order, fixed beforehand: it is a matter of kind, not of what either has learned.
    """
    if a == b:
        return SAME
    kinds = {type(a).__name__, type(b).__name__}
    if len(kinds) == 1:
        return RESIZED
    return RELATED if kinds <= _CONVOLUTIONAL else FOREIGN


def made_with(distilled: DistilledDataset) -> Net | None:
    """The network that a set was distilled on, as its provenance says; None where it says nothing."""
    described = distilled.provenance.settings.get("net") if distilled.provenance else None
    if described is None:
        return None
    try:
        found: Net = restore(described)
    except UserError:  # a network of the user's own that is not at hand
        return None
    return found
