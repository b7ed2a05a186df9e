"""Networks as a reader knows them."""

from __future__ import annotations

from collections.abc import Sequence

from distillens.core.contracts import Net


def label(net: Net) -> str:
    """A network as a reader knows it: ``ResNet-18 w64``."""
    kind = type(net).__name__
    family = kind.rstrip("0123456789")
    named = f"{family}-{kind[len(family) :]}" if family != kind else kind
    width = getattr(net, "width", None)
    return named if width is None else f"{named} w{width}"


def labels_of(nets: Sequence[Net]) -> tuple[str, ...]:
    """The names of networks; those that would have the same name show all their settings."""
    plain = [label(net) for net in nets]
    return tuple(
        name if plain.count(name) == 1 else f"{name} ({', '.join(map(str, vars(net).values()))})"
        for name, net in zip(plain, nets, strict=True)
    )
