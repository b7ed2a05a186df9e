"""What a real image gave to a step, by a slow twin: each image's own term of the loss, moved along by finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.checks import UserError
from distillens.core.contracts import Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import MultiFormation
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Standardised
from distillens.data.planted import planted
from distillens.distillers import _gradient, _pixels
from distillens.distillers._formations import in_range
from distillens.distillers.dc import DC
from distillens.distillers.dm import DM
from distillens.distillers.dsa import DSA
from distillens.distillers.idc import IDC
from distillens.distillers.m3d import M3D
from distillens.distillers.ncfm import NCFM
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs

IPC, BATCH, CLASSES = 2, 5, 3
NET = ConvNet(depth=1, width=4)
KEY = Key(3, ("donors",))
STD = (0.05, 0.1, 0.2)
EVERY = "color_crop_cutout_flip_scale_rotate"


def problem_of(ipc: int = IPC) -> Problem:
    """Three classes of eight images in colour, in float64."""
    data = planted(Key(7), per_class=8, shape=(3, 8, 12)).train
    fine = Dataset(data.images.double(), data.labels, data.classes, data.space)
    return Problem(fine, ipc, KEY)


def first_step(method: Any, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images before the step [k, p, ...], the gradient that made it, and the parts of its record [p, n]."""
    begun = method.start(problem)
    state, _ = method.step(problem, begun, 0)
    shape = (CLASSES, problem.ipc, *problem.real.shape)
    assert not state.tensors["donors.parts"][1].any()
    return (
        begun.tensors["images"].view(shape),
        state.tensors["velocity"].view(shape),
        state.tensors["donors.parts"][0],
    )


def along(term: Any, images: torch.Tensor, gradient: torch.Tensor, j: int, size: float = 1e-5) -> float:
    """The derivative of a term of one class's images [p, ...], when image j moves along its step."""
    unit = torch.zeros_like(images)
    unit[j] = gradient[j] / gradient[j].norm()
    return float((term(images + size * unit) - term(images - size * unit)) / (2 * size))


def of_class(data: Dataset, index: torch.Tensor, c: int) -> torch.Tensor:
    return index.view(CLASSES, -1)[c]


# ---- DM ----


def features(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return NET.features(params, {}, x, "train")[0]


@pytest.mark.parametrize("strategy", ["", "color+crop+rotate", EVERY, "color"])
@pytest.mark.parametrize("ipc", [1, IPC])
def test_dm_shares_its_step_out_as_the_images_own_terms_have_it(strategy: str, ipc: int) -> None:
    problem = problem_of(ipc)
    data = problem.real
    method = DM(steps=1, batch_real=BATCH, augment=strategy, init="real", net=NET, donors=True)
    images, gradient, parts = first_step(method, problem)
    key = KEY.fold("step", 0)
    params = {name: value.double() for name, value in NET.init(data, key.fold("net"))[0].items()}
    index = data.drawn(BATCH, key.fold("real"))
    expected = torch.zeros_like(parts)
    for c in range(CLASSES):
        draw = augment.draw(strategy, key.fold("augment", c))
        for i in of_class(data, index, c).tolist():
            target = features(params, augment.apply(data.images[i : i + 1], draw))[0]

            def term(own: torch.Tensor, target: torch.Tensor = target, draw: Any = draw) -> torch.Tensor:
                return (target - features(params, augment.apply(own, draw)).mean(0)).square().sum() / BATCH

            for j in range(ipc):
                expected[j, i] = along(term, images[c], gradient[c], j)
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-8)
    # A batch's parts are the whole step.
    sums = torch.stack([parts[:, data.labels.hard() == c].sum(1) for c in range(CLASSES)])
    torch.testing.assert_close(sums, gradient.flatten(2).norm(dim=2), rtol=1e-9, atol=1e-12)


def test_dms_step_without_an_image_is_what_the_others_gave() -> None:
    """Left out, an image takes its part with it, exactly; the others then count as one more each: n / (n - 1)."""
    problem = problem_of()
    data = problem.real
    method = DM(steps=1, batch_real=BATCH, augment="", init="real", net=NET, donors=True)
    images, gradient, parts = first_step(method, problem)
    key = KEY.fold("step", 0)
    params = {name: value.double() for name, value in NET.init(data, key.fold("net"))[0].items()}
    index = data.drawn(BATCH, key.fold("real"))
    for c in range(CLASSES):
        members = of_class(data, index, c).tolist()
        for left_out in members:
            rest = [i for i in members if i != left_out]
            target = features(params, data.images[rest]).mean(0)
            leaf = images[c].clone().requires_grad_()
            # torch's own method has no types.
            (target - features(params, leaf).mean(0)).square().sum().backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            for j in range(IPC):
                unit = gradient[c, j] / gradient[c, j].norm()
                length = float(gradient[c, j].norm() - parts[j, left_out]) * BATCH / (BATCH - 1)
                assert float((leaf.grad[j] * unit).sum()) == pytest.approx(length, rel=1e-8, abs=1e-10)


# ---- DC and DSA ----


def rows_of(params: dict[str, torch.Tensor], x: torch.Tensor, c: int, graph: bool = False) -> Any:
    """The gradients of the mean loss in every weight, as rows of output units."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    logits, _ = NET.logits(leaves, {}, x)
    loss = F.cross_entropy(logits, torch.full((len(x),), c))
    wanted = [leaf for leaf in leaves.values() if leaf.ndim > 1]
    return [g.reshape(len(g), -1) for g in torch.autograd.grad(loss, wanted, create_graph=graph)]


@pytest.mark.parametrize("strategy", ["", "color+crop+rotate", EVERY])
@pytest.mark.parametrize("ipc", [1, IPC])
def test_gradient_matching_shares_its_step_out_as_the_images_own_terms_have_it(
    strategy: str, ipc: int
) -> None:
    problem = problem_of(ipc)
    data = problem.real
    method: Any = DSA(augment=strategy) if strategy else DC()
    method = replace(
        method,
        steps=1,
        outer_loop=1,
        batch_real=BATCH,
        init="real",
        lr_img=1.0,
        net=NET,
        donors=True,
        donors_every=1,
    )
    images, gradient, parts = first_step(method, problem)
    key = KEY.fold("step", 0)
    params = {name: value.double() for name, value in NET.init(data, key.fold("net"))[0].items()}
    place = key.fold("turn", 0)
    index = data.drawn(BATCH, place.fold("real"))
    expected = torch.zeros_like(parts)
    for c in range(CLASSES):
        draw = augment.draw(strategy, place.fold("augment", c))
        members = of_class(data, index, c).tolist()
        single = [rows_of(params, augment.apply(data.images[i : i + 1], draw), c) for i in members]
        mean = [torch.stack(layer).mean(0) for layer in zip(*single, strict=True)]
        for i, alone in zip(members, single, strict=True):

            def term(
                own: torch.Tensor, alone: Any = alone, mean: Any = mean, draw: Any = draw, c: int = c
            ) -> torch.Tensor:
                total = torch.zeros((), dtype=torch.float64)
                for g, t, s in zip(alone, mean, rows_of(params, augment.apply(own, draw), c), strict=True):
                    both = t.norm(dim=1) * s.norm(dim=1) + 1e-6
                    total = total - ((g / BATCH * s).sum(1) / both).sum()
                return total

            for j in range(ipc):
                expected[j, i] = along(term, images[c], gradient[c], j)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-7)
    sums = torch.stack([parts[:, data.labels.hard() == c].sum(1) for c in range(CLASSES)])
    torch.testing.assert_close(sums, gradient.flatten(2).norm(dim=2), rtol=1e-8, atol=1e-12)


# ---- M3D, NCFM and IDC: steps in pixels, several images in one ----


def in_standard_units(ipc: int, networks: Any = None) -> Problem:
    """Three classes in colour whose channels are standardised each on its own."""
    plain = problem_of(ipc)
    space = Standardised((0.5, 0.45, 0.55), STD)
    data = Dataset(plain.real.images, plain.real.labels, plain.real.classes, space)
    return replace(plain, real=data, inputs={} if networks is None else {"networks": networks})


def of_terms(terms: Any, images: torch.Tensor) -> torch.Tensor:
    """Parts [p, b] by the terms [b] of the real images, from stored images [p, c, h, w] that have not moved."""
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(terms(leaf).sum(), leaf)
    per_step = (
        torch.tensor(STD, dtype=torch.float64).view(3, 1, 1) ** -2
    )  # a step in pixels is one of that length
    way = slope * per_step
    way = way / way.flatten(1).norm(dim=1)[:, None, None, None]
    each = torch.autograd.functional.jacobian(terms, images)  # [b, p, c, h, w]
    return (each * (way * per_step)).flatten(2).sum(2).T


def kernel(x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> torch.Tensor:
    apart = torch.stack([(one - y).square().sum(1) for one in x])
    return sum((-apart / (w * bandwidth)).exp() for w in (0.25, 0.5, 1, 2, 4))  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", ["", EVERY])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("how", ["gaussian", "linear"])
def test_m3d_shares_its_step_out_as_the_images_own_terms_have_it(
    how: Any, factor: int, strategy: str
) -> None:
    problem = in_standard_units(IPC)
    data = problem.real
    method = M3D(steps=1, batch_real=BATCH, kernel=how, factor=factor, augment=strategy, net=NET, donors=True)
    begun = method.start(problem)
    parts = method.step(problem, begun, 0)[0].tensors["donors.parts"][0]
    key = KEY.fold("step", 0)
    params = {name: value.double() for name, value in NET.init(data, KEY.fold("net", 0))[0].items()}
    index = data.drawn(BATCH, key.fold("real"))
    for c, own in enumerate(begun.tensors["images"].view(CLASSES, IPC, *data.shape)):
        draw = augment.draw(strategy, key.fold("augment", c))
        members = of_class(data, index, c)
        theirs = features(params, augment.apply(data.images[members], draw))

        def seen(x: torch.Tensor, draw: Any = draw) -> torch.Tensor:
            return features(params, augment.apply(MultiFormation(factor).images({"images": x}), draw))

        both = torch.cat([theirs, seen(own)])
        pairs = len(both) ** 2 - len(both)
        bandwidth = float(torch.stack([(one - both).square().sum() for one in both]).sum() / pairs)

        def terms(
            x: torch.Tensor, seen: Any = seen, theirs: Any = theirs, bandwidth: float = bandwidth
        ) -> Any:
            y = seen(x)
            if how == "linear":
                return ((y @ y.T).mean() - 2 * (theirs @ y.T).mean(1)) / BATCH
            return (kernel(y, y, bandwidth).mean() - 2 * kernel(theirs, y, bandwidth).mean(1)) / BATCH

        torch.testing.assert_close(parts[:, members], of_terms(terms, own), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("amplitude", [0.5, 0.2])
@pytest.mark.parametrize(("factor", "stepping"), [(1, "summed"), (2, "summed"), (2, "by_class")])
def test_ncfm_shares_its_step_out_as_the_images_own_terms_have_it(
    factor: int, stepping: Any, amplitude: float
) -> None:
    recipe = Recipe(steps=2, batch=8)
    method = NCFM(
        steps=1,
        num_freqs=16,
        amplitude=amplitude,
        calibration=0.7,
        batch_real=BATCH,
        factor=factor,
        augment=EVERY,
        n_nets=1,
        recipe=recipe,
        stepping=stepping,
        lr_img=1e-15,  # class after class: those before leave the others where they are
        net=NET,
        donors=True,
    )
    problem = in_standard_units(IPC)
    networks = Runs(Plan()).get(method.needs(problem)["networks"])[0]
    problem = in_standard_units(IPC, networks)
    data = problem.real
    begun = method.start(problem)
    parts = method.step(problem, begun, 0)[0].tensors["donors.parts"][0]
    key = KEY.fold("step", 0)
    share = float(key.fold("net").fold("share").uniform(1))
    mixture = torch.lerp(networks.at(0)[0].double(), networks.final[0].double(), share)
    params = networks.shapes.unflatten(mixture)
    index = data.drawn(BATCH, key.fold("real"))
    for c, own in enumerate(begun.tensors["images"].view(CLASSES, IPC, *data.shape)):
        draw = augment.draw(EVERY, key.fold("augment", c))
        members = of_class(data, index, c)

        def waves(x: torch.Tensor, draw: Any = draw) -> torch.Tensor:
            z = F.normalize(NET.features(params, {}, augment.apply(x, draw))[0], dim=1)
            noise = key.fold("frequencies").fold("noise").normal(16, z.shape[1]).double()
            return torch.polar(torch.ones((), dtype=z.dtype), z @ noise.T)

        theirs = waves(data.images[members])
        target = theirs.mean(0)
        long = target.abs()

        def squares(
            x: torch.Tensor, each: torch.Tensor, waves: Any = waves, long: torch.Tensor = long
        ) -> torch.Tensor:
            phi = waves(MultiFormation(factor).images({"images": x})).mean(0)
            turned = long * phi.abs() - (each * phi.conj()).real
            return amplitude * (phi.abs() - long).square() + (1 - amplitude) * 2 * turned

        apart = squares(own, target).sqrt()

        def terms(
            x: torch.Tensor, squares: Any = squares, theirs: Any = theirs, apart: Any = apart
        ) -> torch.Tensor:
            return 300 * (squares(x, theirs) / (2 * apart)).mean(1) / BATCH

        torch.testing.assert_close(parts[:, members], of_terms(terms, own), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("most", [128, 3])
@pytest.mark.parametrize("layers", ["convolutions", "all"])
@pytest.mark.parametrize("metric", ["mse", "cos"])
def test_idc_shares_its_step_out_as_the_images_own_terms_have_it(metric: Any, layers: Any, most: int) -> None:
    problem = in_standard_units(IPC)
    data = problem.real
    method = IDC(
        steps=1,
        inner_loop=2,
        metric=metric,
        layers=layers,
        batch_real=BATCH,
        batch_syn_max=most,
        augment=EVERY,
        net=NET,
        donors=True,
        donors_every=1,
    )
    begun = method.start(problem)
    parts = method.step(problem, begun, 0)[0].tensors["donors.parts"][0]
    key = KEY.fold("step", 0)
    params = {name: value.double() for name, value in NET.init(data, KEY.fold("net"))[0].items()}
    index = data.drawn(BATCH, key.fold("real"))
    stored = in_range(begun.tensors["images"], data.space).view(CLASSES, IPC, *data.shape)
    for c, own in enumerate(stored):
        draw = augment.draw(EVERY, key.fold("augment", c))
        some = key.fold("shown").fold(c).permutation(4 * IPC)[:most]
        members = of_class(data, index, c)

        def rows(x: torch.Tensor, graph: bool, draw: Any = draw, c: int = c) -> list[torch.Tensor]:
            leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
            logits, _ = NET.logits(leaves, {}, augment.apply(x, draw))
            loss = F.cross_entropy(logits, torch.full((len(x),), c))
            wanted = [leaf for leaf in leaves.values() if layers == "all" or leaf.ndim == 4]
            return [g.reshape(len(g), -1) for g in torch.autograd.grad(loss, wanted, create_graph=graph)]

        single = [rows(data.images[i : i + 1], False) for i in members.tolist()]
        mean = [torch.stack(layer).mean(0) for layer in zip(*single, strict=True)]

        def terms(
            x: torch.Tensor, single: Any = single, mean: Any = mean, some: Any = some, rows: Any = rows
        ) -> torch.Tensor:
            ours = rows(MultiFormation(2).images({"images": x})[some], True)
            found = []
            for alone in single:
                total = torch.zeros((), dtype=torch.float64)
                for g, t, s in zip(alone, mean, ours, strict=True):
                    if metric == "mse":
                        total = total + (s * (s - 2 * g)).sum() / BATCH
                    else:
                        both = t.norm(dim=1) * s.norm(dim=1) + 1e-6
                        total = total - ((g / BATCH * s).sum(1) / both).sum()
                found.append(total)
            return torch.stack(found)

        torch.testing.assert_close(parts[:, members], of_terms(terms, own), rtol=1e-5, atol=1e-8)


def test_idc_has_no_donors_where_a_step_follows_signs() -> None:
    with pytest.raises(UserError) as error:
        IDC(metric="l1", donors=True)
    assert str(error.value) == (
        "idc keeps no record of donors for this metric: a step follows the signs of differences, which are no one image's; got "
        "metric=l1; set metric=mse or metric=cos, or leave donors out"
    )


# ---- of all that keep a record ----

EACH = {
    "dm": DM(augment=EVERY),
    "dc": DC(donors_every=1),
    "dsa": DSA(donors_every=1),
    "m3d": M3D(),
    "ncfm": NCFM(num_freqs=16, n_nets=1, recipe=Recipe(steps=2, batch=8)),
    "idc": IDC(donors_every=1, n_data=8, batch_train=8, batch_syn_max=5),
}


def asked(name: str, **changes: Any) -> tuple[Any, Problem]:
    """A method of each kind, and what it is asked."""
    method: Any = replace(EACH[name], steps=2, batch_real=BATCH, net=NET, donors=True, **changes)
    problem = in_standard_units(IPC)
    inputs = {place: Runs(Plan()).get(need)[0] for place, need in method.needs(problem).items()}
    return method, replace(problem, inputs=inputs)


@pytest.mark.parametrize("name", EACH)
def test_a_record_does_not_depend_on_how_many_classes_go_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, problem = asked(name)
    found = []
    for at_once in (1 << 18, 1):
        monkeypatch.setattr(_pixels, "AT_ONCE", at_once)
        monkeypatch.setattr(_gradient, "NUMBERS", 32 * at_once)
        state = method.start(problem)
        for i in range(method.steps):
            state = method.step(problem, state, i)[0]
        found.append(state.tensors["donors.parts"])
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EACH)
def test_each_image_counts_along_its_own_way(name: str) -> None:
    """One that has not moved yet has its first gradient's direction, whatever the others have done."""
    method, problem = asked(name)
    begun = method.start(problem)
    first = method.step(problem, begun, 0)[0].tensors["donors.parts"][0]
    images = begun.tensors["images"].clone()
    push = KEY.fold("push").normal(*images[::IPC].shape).double()
    images[::IPC] += 1e-9 * push  # the first of each class, too little to change a gradient
    other = method.step(problem, State({**begun.tensors, "images": images}, begun.values), 0)[0]
    parts = other.tensors["donors.parts"][0]
    torch.testing.assert_close(parts[1], first[1], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(parts[0], first[0], rtol=0.1)


def test_idc_has_one_match_a_step() -> None:
    method, problem = asked("idc")
    method = replace(method, steps=6, donors_every=3)
    state = method.start(problem)
    for i in range(method.steps):
        before = state
        state, _ = method.step(problem, state, i)
        on_record = int(KEY.fold("step", i).fold("donors").integers(3, 1)) == 0
        assert torch.equal(state.tensors["donors.met"], before.tensors["donors.met"]) is not on_record


@pytest.mark.parametrize("every", [1, 2, 4])
def test_of_so_many_matches_one_is_on_record_and_one_a_step_at_most(every: int) -> None:
    problem = problem_of()
    method = DC(steps=6, outer_loop=2, batch_real=4, init="real", net=NET, donors=True, donors_every=every)
    state = method.start(problem)
    met = torch.zeros_like(state.tensors["donors.met"])
    turns = []
    for i in range(method.steps):
        state, _ = method.step(problem, state, i)
        key = KEY.fold("step", i)
        turn = int(key.fold("donors").integers(max(2, every), 1))
        if turn < 2:
            turns.append(turn)
            met[i % 2, problem.real.drawn(4, key.fold("turn", turn, "real"))] += 1
    assert torch.equal(state.tensors["donors.met"], met)
    if every <= 2:
        assert len(turns) == 6 and {*turns} == {0, 1}
    else:
        assert 0 < len(turns) < 6


# ---- along which way ----


@pytest.mark.parametrize("kind", [DM, DC, DSA])
def test_later_steps_count_along_the_way_from_the_start(kind: Any) -> None:
    """A batch's parts sum to the step, less what is left of its speed, along the way so far."""
    problem = problem_of()
    method = replace(kind(), steps=4, batch_real=BATCH, init="real", lr_img=0.5, net=NET, donors=True)
    if kind is not DM:
        method = replace(method, donors_every=1)
    states = [method.start(problem)]
    for i in range(method.steps):
        states.append(method.step(problem, states[-1], i)[0])
    own = torch.stack([problem.real.labels.hard() == c for c in range(CLASSES)]).double()
    for i in range(1, method.steps):
        before, after = states[i].tensors, states[i + 1].tensors
        gradient = (after["velocity"] - method.momentum * before["velocity"]).flatten(1)
        way = (before["images"] - states[0].tensors["images"]).flatten(1)
        expected = -(gradient * way).sum(1) / way.norm(dim=1)
        parts = (after["donors.parts"] - before["donors.parts"])[i % 2]
        found = (parts @ own.T).T.flatten()  # class by class, as the images lie
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_what_a_point_at_rest_owes_to_its_batches_comes_and_goes() -> None:
    """Steps at rest are noise, and each leans to the images of its own batch; hardly any of that is a way."""
    problem = problem_of(1)
    method = DM(
        steps=400, batch_real=2, augment="", init="real", net=NET, lr_img=0.02, momentum=0.0, donors=True
    )
    state = method.start(problem)
    for i in range(200):
        state = method.step(problem, state, i)[0]
    at_rest, length = state, 0.0
    for i in range(200, 400):
        state = method.step(problem, state, i)[0]
        length += float(state.tensors["velocity"].flatten(1).norm(dim=1).sum())
    gained = (state.tensors["donors.parts"] - at_rest.tensors["donors.parts"]).sum()
    assert abs(float(gained)) < 0.25 * length


# ---- what is met and what is not ----


def test_steps_of_even_and_odd_number_are_kept_apart_and_each_image_met_is_counted() -> None:
    problem = problem_of()
    method = DM(steps=5, batch_real=4, augment="", init="real", net=NET, donors=True)
    state: State = method.start(problem)
    drawn = torch.zeros(2, len(problem.real), dtype=torch.int64)
    for i in range(method.steps):
        state, _ = method.step(problem, state, i)
        drawn[i % 2, problem.real.drawn(4, KEY.fold("step", i, "real"))] += 1
    assert torch.equal(state.tensors["donors.met"], drawn)
    never = drawn == 0
    assert not state.tensors["donors.parts"].transpose(0, 1)[:, never].any()


def test_an_image_of_a_cluster_that_pulls_is_a_donor_and_one_where_the_point_already_is_none() -> None:
    """A class of two clusters: the point starts at the large one, so that it is the small one that moves it."""
    key = Key(11, ("clusters",))
    shape = (1, 8, 8)
    centres = key.fold("centres").normal(2, *shape) * 2
    sizes = (18, 2)
    images = torch.cat(
        [centres[c] + 0.1 * key.fold("images", c).normal(size, *shape) for c, size in enumerate(sizes)]
    ).double()
    template = planted(Key(7), per_class=2, shape=shape).train
    data = Dataset(
        torch.cat([images, images.flip(3)]),
        Hard(torch.tensor([0] * 20 + [1] * 20)),
        ("a", "b"),
        template.space,
    )
    problem = Problem(data, 1, key.fold("run"))
    method = DM(steps=6, batch_real=20, augment="", net=NET, lr_img=0.01, donors=True)
    begun = method.start(problem)
    start = torch.stack([images[:18].mean(0), images[:18].mean(0).flip(2)])
    state = State({**begun.tensors, "images": start})
    for i in range(method.steps):
        state, _ = method.step(problem, state, i)
    parts = state.tensors["donors.parts"].sum(0)[0]
    for first in (0, 20):
        whole = parts[first : first + 20].sum()
        small = parts[first + 18 : first + 20]
        assert float(small.sum() / whole) > 0.9, "two of twenty images gave nine tenths of the way"
        assert int(parts[first : first + 20].topk(2).indices.min()) == 18
