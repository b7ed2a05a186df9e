"""The field's networks as pure functions. A network is a file here; its class has the file's name."""

from __future__ import annotations

from typing import Any

from distillens.core.contracts import Like, Net
from distillens.core.registry import Room
from distillens.nets._distance import distance, made_with
from distillens.nets._label import label, labels_of
from distillens.nets._module import PREFIX, from_module, from_text

__all__ = ["default_net", "distance", "from_module", "label", "labels_of", "made_with", "named", "room"]

room: Room[type[Net]] = Room("distillens.nets", "network")


def default_net(like: Like) -> Net:
    """The network the field would take for such images: ConvNet, deeper and wider with their size."""
    from distillens.nets.convnet import ConvNet

    return ConvNet.defaults(like)


def named(text: str, like: Like | None = None) -> Net:
    """The network that a text names: ``resnet18``, or ``module:torchvision.models:resnet18``.

    With the settings that fit the data, or without data the field's.

    Raises:
        UserError: there is no such network; the nearest name is suggested.
    """
    if text.startswith(PREFIX):
        return from_text(text)
    kind: Any = room.find(text)
    made: Net = kind() if like is None else kind.defaults(like)
    return made
