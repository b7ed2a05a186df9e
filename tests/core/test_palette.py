from __future__ import annotations

from distillens import distillers
from distillens.core.palette import colour


def test_no_two_methods_look_alike() -> None:
    names = [*distillers.room.names(), "full data"]
    assert len({colour(name) for name in names}) == len(names)


def test_an_unknown_name_keeps_its_colour() -> None:
    assert colour("mine") == colour("mine")
    assert colour("mine").startswith("#") and len(colour("mine")) == 7
