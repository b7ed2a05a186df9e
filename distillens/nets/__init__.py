"""The field's networks as pure functions. A network is a file here; its class has the file's name."""

from __future__ import annotations

from distillens.core.contracts import Like, Net
from distillens.core.registry import Room

room: Room[type[Net]] = Room("distillens.nets", "network")


def default_net(like: Like) -> Net:
    """The network the field would take for such images: ConvNet, deeper and wider with their size."""
    from distillens.nets.convnet import ConvNet

    return ConvNet.defaults(like)
