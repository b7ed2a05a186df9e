"""Settings to JSON and back, and from the command line, typed by their dataclass."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from distillens import analyses, distillers, nets
from distillens.core import recipe as recipe_module
from distillens.core.checks import UserError
from distillens.core.config import describe, override, restore, settings_of, shrunk
from distillens.core.contracts import Net
from distillens.core.dataset import Splits
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.nets.resnet18 import ResNet18

ROOMS = {"method": distillers.room, "network": nets.room, "analysis": analyses.room}
EVERYTHING = [(what, name) for what, room in ROOMS.items() for name in room.names()]
everything = pytest.mark.parametrize(("what", "name"), EVERYTHING)


@dataclass(frozen=True)
class Inner:
    width: int = 8
    norm: Literal["group", "none"] = "group"


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    rate: float = 0.5
    flip: bool = False
    name: str = "x"
    mode: Literal["graph", "adjoint"] = "graph"
    batch: int | None = None
    label: str | None = "y"
    sizes: tuple[int, ...] = (1, 2)
    rates: tuple[float, ...] | None = None
    groups: tuple[tuple[int, ...], ...] = ((1, 2),)
    pair: tuple[int, int] = (1, 2)
    net: Inner = field(default_factory=Inner)
    nets: tuple[Inner, ...] = ()
    foreign: object = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError("steps must not be negative")


@everything
def test_every_default_survives_json(what: str, name: str) -> None:
    value = ROOMS[what].find(name)()
    assert restore(json.loads(json.dumps(describe(value)))) == value


def _part(item: Any) -> str:
    return " ".join(map(str, item)) if isinstance(item, tuple) else str(item)


@everything
def test_every_plain_setting_can_be_overridden_with_its_own_text(what: str, name: str) -> None:
    value: Any = ROOMS[what].find(name)()
    for path, item in settings_of(value).items():
        if isinstance(item, tuple) and item and not isinstance(item[0], str | int | float | tuple):
            continue  # settings objects: refused with words, below
        if path == "levels":
            continue  # one of its words holds a space
        text = ",".join(map(_part, item)) if isinstance(item, tuple) else str(item)
        assert override(value, [f"{path}={text}"]) == value


@everything
def test_a_changed_setting_survives_json(what: str, name: str) -> None:
    value: Any = ROOMS[what].find(name)()
    if "net.width" in settings_of(value):
        value = override(value, ["net.width=7"])
        again = restore(json.loads(json.dumps(describe(value))))
        assert again == value
        assert again.net.width == 7


def test_describe_names_the_class_and_nests() -> None:
    assert describe(MLP(1, 2)) == {"is": "distillens.nets.mlp.MLP", "depth": 1, "width": 2}
    assert describe((1, 2.5, None, True, "a")) == [1, 2.5, None, True, "a"]
    assert describe({"a": Key(1).fold("x", 2)}) == {"a": {"is": "key", "key": [1, "x", 2]}}


def test_restore_gives_tuples_mappings_and_keys() -> None:
    value = {"a": (1, (2, "b")), "k": Key(1).fold("x", 2), "n": MLP(1, 2), "none": None}
    assert restore(json.loads(json.dumps(describe(value)))) == value


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"x", Inner])
def test_what_json_cannot_hold_is_not_a_setting(value: Any) -> None:
    with pytest.raises(TypeError, match=r"a setting of type .* cannot be written as JSON"):
        describe(value)


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "os.system",
        "builtins.eval",
        "distillens.nowhere.Recipe",
        "distillens.core.recipe.Recipes",
        "distillens.core.recipe.Recipe.but",
        "distillens.core.recipe.replace",
        "distillens.core.recipe.OPTIMISERS",
        "distillens.core.checks.UserError",
        "distillens.Recipe",
        "distillensx.core.Recipe",
        "distillens..core.recipe.Recipe",
        "Recipe",
        "",
        None,
        3,
    ],
)
def test_restore_refuses_what_is_not_a_class_of_settings(name: Any) -> None:
    with pytest.raises(UserError, match=r"unknown settings; got .*; expected a class of distillens"):
        restore({"is": name})


def test_restore_refuses_classes_outside_the_package() -> None:
    with pytest.raises(UserError, match="expected a class of distillens"):
        restore(describe(Inner()))


def test_restore_refuses_a_foreign_class_that_one_of_our_modules_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe_module, "Inner", Inner, raising=False)
    with pytest.raises(UserError, match="expected a class of distillens"):
        restore({"is": "distillens.core.recipe.Inner"})


def test_restore_suggests_the_field_that_was_meant() -> None:
    with pytest.raises(
        UserError, match=r"unknown setting of MLP 'widht'; Did you mean 'width'\? Known: depth, width"
    ):
        restore({"is": "distillens.nets.mlp.MLP", "widht": 3})


def test_restore_checks_the_values() -> None:
    with pytest.raises(UserError, match="recipe: lr must be above 0"):
        restore({**describe(Recipe()), "lr": -1.0})
    with pytest.raises(UserError, match="settings do not fit Recipe; got must be real number, not str"):
        restore({**describe(Recipe()), "lr": "fast"})


@pytest.mark.parametrize(
    ("assignment", "changes"),
    [
        ("steps=500", {"steps": 500}),
        ("steps=0", {"steps": 0}),
        (" steps = 5 ", {"steps": 5}),
        ("rate=1e-3", {"rate": 1e-3}),
        ("rate=2", {"rate": 2.0}),
        ("flip=true", {"flip": True}),
        ("flip=1", {"flip": True}),
        ("flip=yes", {"flip": True}),
        ("flip=False", {"flip": False}),
        ("flip=off", {"flip": False}),
        ("name=7", {"name": "7"}),
        ("name=a=b", {"name": "a=b"}),
        ("name=", {"name": ""}),
        ("name=none", {"name": "none"}),
        ("mode=adjoint", {"mode": "adjoint"}),
        ("batch=64", {"batch": 64}),
        ("batch=none", {"batch": None}),
        ("batch=None", {"batch": None}),
        ("label=none", {"label": None}),
        ("label=z", {"label": "z"}),
        ("sizes=3,4,5", {"sizes": (3, 4, 5)}),
        ("sizes=3, 4 5", {"sizes": (3, 4, 5)}),
        ("sizes=3", {"sizes": (3,)}),
        ("sizes=", {"sizes": ()}),
        ("rates=1,0.5", {"rates": (1.0, 0.5)}),
        ("rates=none", {"rates": None}),
        ("pair=3,4", {"pair": (3, 4)}),
        ("groups=3 4,5", {"groups": ((3, 4), (5,))}),
        ("groups=3  4 , 5", {"groups": ((3, 4), (5,))}),
        ("groups=", {"groups": ()}),
        ("net.width=64", {"net": Inner(width=64)}),
        ("net.norm=none", {"net": Inner(norm="none")}),
    ],
)
def test_text_becomes_the_type_of_the_field(assignment: str, changes: dict[str, Any]) -> None:
    got = override(Outer(), [assignment])
    assert got == replace(Outer(), **changes)
    name = next(iter(changes))
    assert type(getattr(got, name)) is type(changes[name])


def test_assignments_follow_one_another() -> None:
    got = override(Outer(), ["net.width=1", "steps=2", "net.width=3", "net.norm=none"])
    assert got == Outer(steps=2, net=Inner(3, "none"))


def test_no_assignment_changes_nothing() -> None:
    value = Outer()
    assert override(value, []) is value


def test_the_value_itself_is_left_alone() -> None:
    value = Outer()
    override(value, ["steps=9", "net.width=9"])
    assert value == Outer()


def test_the_field_may_be_a_contract() -> None:
    value = override(distillers.room.find("dm")(), ["net.width=64", "net.norm=none", "steps=5"])
    assert value.net == ConvNet(width=64, norm="none")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stesp=5", "unknown setting of outer 'stesp'; Did you mean 'steps'? Known: batch, flip, foreign, "),
        ("net.widht=5", "unknown setting of inner 'widht'; Did you mean 'width'? Known: norm, width"),
        ("zzz=5", "unknown setting of outer 'zzz'; Known: "),
        ("steps=many", "setting 'steps' does not fit; got 'many'; expected Input should be a valid integer"),
        ("steps=1.5", "setting 'steps' does not fit; got '1.5'; expected Input should be a valid integer"),
        ("steps=none", "setting 'steps' does not fit; got 'none'; expected Input should be a valid integer"),
        ("rate=fast", "setting 'rate' does not fit; got 'fast'; expected Input should be a valid number"),
        ("flip=maybe", "setting 'flip' does not fit; got 'maybe'; expected Input should be a valid boolean"),
        (
            "mode=both",
            "setting 'mode' does not fit; got 'both'; expected Input should be 'graph' or 'adjoint'",
        ),
        (
            "mode=none",
            "setting 'mode' does not fit; got 'none'; expected Input should be 'graph' or 'adjoint'",
        ),
        (
            "net.norm=layer",
            "setting 'net.norm' does not fit; got 'layer'; expected Input should be 'group' or",
        ),
        ("sizes=1,x", "setting 'sizes' does not fit; got '1,x'; expected Input should be a valid integer"),
        ("pair=1", "setting 'pair' does not fit; got '1'; expected "),
        ("steps", "a setting is written NAME=VALUE; got 'steps'; --set steps=500, say"),
        ("=5", "a setting is written NAME=VALUE; got '=5'; --set steps=500, say"),
        ("", "a setting is written NAME=VALUE; got ''"),
        ("net=mlp", "setting 'net' holds settings of its own; set one of net.width, net.norm"),
        ("steps.more=1", "setting 'steps.more': 'steps' has no settings of its own; got 3"),
        ("steps=-1", "steps must not be negative"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        override(Outer(), [assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class NoJury:
    judges: tuple[Net, ...] = ()  # none says which room they come from


def test_settings_that_text_cannot_hold_are_refused() -> None:
    with pytest.raises(UserError, match="setting 'judges' cannot be written as text; set it from Python"):
        override(NoJury(), ["judges=mlp"])


def test_settings_of_lists_what_can_be_set_with_dots() -> None:
    assert settings_of(Outer(net=Inner(5))) == {
        "steps": 3,
        "rate": 0.5,
        "flip": False,
        "name": "x",
        "mode": "graph",
        "batch": None,
        "label": "y",
        "sizes": (1, 2),
        "rates": None,
        "groups": ((1, 2),),
        "pair": (1, 2),
        "net.width": 5,
        "net.norm": "group",
        "nets": (),
        "foreign": None,
    }


def test_settings_that_must_fit_each_other_may_come_in_any_order() -> None:
    method = distillers.room.find("rat_bptt")()
    both = ["inner_steps=10", "window=5"]
    assert override(method, both) == override(method, both[::-1])
    with pytest.raises(UserError, match="the window does not fit into the training"):
        override(method, both[:1])


# ---- a network by name ----


@pytest.mark.parametrize("name", nets.room.names())
def test_a_network_is_given_by_name(name: str, digits: Splits) -> None:
    method = distillers.room.find("dm")()
    chosen: Any = override(method, [f"net={name}"])
    assert chosen.net == nets.room.find(name)()
    assert replace(chosen, net=method.net) == method  # type: ignore[attr-defined]
    assert restore(json.loads(json.dumps(describe(chosen)))) == chosen
    fitting: Any = override(method, [f"net={name}"], like=digits.train)
    assert fitting.net == nets.room.find(name).defaults(digits.train)  # type: ignore[attr-defined]


def test_settings_of_a_named_network_go_with_it_in_any_order() -> None:
    method = distillers.room.find("dm")()
    wanted = ["net=resnet18", "net.width=8", "net.downsample=average", "steps=5"]
    for assignments in (wanted, wanted[::-1]):
        chosen: Any = override(method, assignments)
        assert chosen.net == ResNet18(8, "group", "average")
        assert chosen.steps == 5
    last: Any = override(method, ["net=lenet", "net.depth=1", "net=mlp"])
    assert last.net == MLP(depth=1)


def test_a_module_is_given_by_name() -> None:
    method = distillers.room.find("dm")()
    chosen: Any = override(method, ["net=module:torchvision.models:resnet18"])
    assert chosen.net == nets.from_module("torchvision.models:resnet18", num_classes="{k}")
    assert restore(json.loads(json.dumps(describe(chosen)))) == chosen
    more: Any = override(method, ["net=module:timm:create_model,model_name=vit,num_classes={k},width=8"])
    assert more.net == nets.from_module("timm:create_model", model_name="vit", num_classes="{k}", width=8)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("net=resnet81", "unknown network 'resnet81'; Did you mean 'resnet18'? Known: alexnet, "),
        ("net=none", "unknown network 'none'; "),
        (
            "net=module:",
            "a module is named PACKAGE.MODULE:FUNCTION; got ''; torchvision.models:resnet18, say",
        ),
        (
            "net=module:a:b,5",
            "an argument of a module is written NAME=VALUE; got '5'; module:a:b,num_classes={k}, say",
        ),
    ],
)
def test_a_network_that_is_not_there_is_said_in_one_line(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        override(distillers.room.find("dm")(), [assignment])
    assert str(error.value).startswith(message)


def test_settings_of_a_network_that_was_replaced_are_unknown() -> None:
    with pytest.raises(UserError, match=r"unknown setting of lenet 'depth'; .*Known: norm, width"):
        override(distillers.room.find("dm")(), ["net.depth=2", "net=lenet"])


def test_a_field_that_is_named_twice_takes_the_last() -> None:
    assert override(Inner(), ["width=3", "norm=none", "width=5"]) == Inner(5, "none")


@dataclass(frozen=True)
class Timed:
    steps: int = 300
    moments: tuple[int, ...] = (30, 100, 300)


@dataclass(frozen=True)
class Sized:
    pool: int = 52
    seeds: int = 1
    name: str = "a"
    inner: Timed = Timed()


def test_settings_shrink_by_a_share_and_say_to_what() -> None:
    names = ("pool", "seeds", "inner.steps", "inner.moments", "name", "absent")
    found = shrunk(Sized(), names, 0.1)
    assert found == ["pool=6", "inner.steps=30", "inner.moments=3,10,30"]
    small = override(Sized(), found)
    assert small == Sized(6, 1, "a", Timed(30, (3, 10, 30)))


@pytest.mark.parametrize(("share", "expected"), [(0.5, ["pool=26"]), (1e-6, ["pool=2"]), (1.0, [])])
def test_two_models_are_left_and_nothing_grows(share: float, expected: list[str]) -> None:
    assert shrunk(Sized(), ("pool", "seeds"), share) == expected


@dataclass(frozen=True)
class WithNet:
    net: Net = ConvNet()


@dataclass(frozen=True)
class Jury:
    judges: tuple[Net, ...] = (ConvNet(), MLP())


def test_a_tuple_of_networks_is_a_list_of_names_with_settings(digits: Splits) -> None:
    chosen = override(Jury(), ["judges=mlp, resnet18(width=8 norm=batch),convnet(depth=2, width=16)"])
    assert chosen.judges == (MLP(), ResNet18(8, "batch"), ConvNet(2, 16))
    fitted = override(Jury(), ["judges=convnet"], like=digits.train)
    assert fitted.judges == (ConvNet.defaults(digits.train),)


def test_a_network_by_name_brings_settings_of_its_own(digits: Splits) -> None:
    chosen = override(WithNet(), ["net.width=4", "net=resnet18(width=16 norm=batch)"])
    assert chosen.net == ResNet18(4, "batch")  # what is set inside comes after, wherever it stands
    assert override(WithNet(), ["net=convnet()"], like=digits.train).net == ConvNet.defaults(digits.train)
    with pytest.raises(UserError, match=r"setting 'net': a bracket is not closed; got 'mlp\(width=3'"):
        override(WithNet(), ["net=mlp(width=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet19", "unknown network 'resnet19'.*Did you mean"),
        ("mlp(width", "a bracket is not closed"),
        ("mlp(wide=3)", "unknown setting of mlp 'wide'"),
    ],
)
def test_a_name_in_a_list_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(Jury(), [f"judges={text}"])
