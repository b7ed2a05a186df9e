"""The command: arguments to values and back, nothing else. torch is imported by the verbs, not here."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distillens import __version__
from distillens.core.checks import UserError, one_of

if TYPE_CHECKING:
    from rich.progress import TaskID

    from distillens.core.artefact import DistilledDataset
    from distillens.core.result import Estimate, Result, Table

app = typer.Typer(
    name="distillens",
    help="Distils image datasets and shows what the distilled data has learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LINE_SECONDS = 15.0

Data = Annotated[str, typer.Option("--data", help="digits, kind:path (parquet:cifar10/), or a path.")]
Space = Annotated[
    str,
    typer.Option("--space", help="standardised, pixel, zca, zca-kip or zca-frepo: the units of all images."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE, repeated: a setting to change.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The seed that every key starts from.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again, over what is there.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Of training: float32, float64, or bfloat16 (convolutions). Chosen where not given.",
    ),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="processes of this machine, or ray for a cluster.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="The Ray cluster: auto, or host:port; this machine alone without."),
]
Folders = Annotated[list[Path], typer.Argument(help="Run folders of distilled sets.")]


def _many(values: Sequence[str] | None) -> list[str]:
    """Comma-separated or repeated values as one list."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _precision(value: str | None) -> Any:
    from distillens.engine.plan import PRECISIONS

    if value is not None:
        one_of("precision", value, PRECISIONS)
    return value


def _sizes(values: Sequence[str] | None) -> list[int]:
    sizes = []
    for text in _many(values):
        if not text.isdigit() or int(text) < 1:
            raise UserError("--ipc takes whole numbers from 1", got=repr(text), fix="--ipc 1,10, say")
        sizes.append(int(text))
    return sizes


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on standard error, with the time left; a line now and then where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        begun: dict[str, float] = {}
        said: dict[str, float] = {}

        def tell(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            since = now - begun.setdefault(what, now)
            if quiet or (done < total and now - said.setdefault(what, now) < LINE_SECONDS):
                return
            said[what] = now
            left = "" if done == total else f", about {since * (total - done) / done:.0f} s left"
            print(f"{what}: {done} of {total} after {since:.0f} s{left}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


@app.command()
def study(
    data: Data = "digits",
    space: Space = "standardised",
    to: Annotated[Path, typer.Option("--to", help="The folder of the study.")] = Path("runs/study"),
    methods: Annotated[list[str] | None, typer.Option("--methods", help="Methods: dm,mtt.")] = None,
    ipc: Annotated[list[str] | None, typer.Option("--ipc", help="Images per class: 1,10.")] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="quick, full, smoke, or wddl: the paper.")
    ] = "quick",
    distilled: Annotated[
        list[str] | None,
        typer.Option("--distilled", help="Sets that are there: run folders or files, NAME=PATH to name one."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--analyses", help="Analyses or questions to ask, in place of all of the preset's."),
    ] = None,
    scale: Annotated[
        float, typer.Option("--scale", help="Below 1: so much of the steps and of the models.")
    ] = 1.0,
    replicates: Annotated[
        int | None, typer.Option("--replicates", min=1, help="Distillations a method.")
    ] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="How accuracy is measured.")] = "wddl",
    settings: Settings = None,
    seed: Seed = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; all cores by default.")
    ] = None,
    device: Device = "cpu",
    engine: EngineOption = "processes",
    address: Address = None,
    precision: PrecisionOption = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Distil, evaluate, ask all three questions, write the report."""
    from distillens import studies
    from distillens.data import load

    wishes: dict[str, Any] = {"methods": _many(methods)} if methods else {}
    with _progress(as_json) as tell:
        page = studies.study(
            load(data, space=space),
            to,
            ipc=_sizes(ipc),
            preset=preset,
            replicates=replicates,
            distilled=_many(distilled),
            only=_many(only),
            scale=scale,
            protocol=protocol,
            settings=tuple(settings or ()),
            seed=seed,
            workers=workers,
            device=device,
            engine=engine,
            address=address,
            precision=_precision(precision),
            force=force,
            tell=tell,
            announce=(lambda line: None)
            if as_json
            else lambda line: print(line, file=sys.stderr, flush=True),
            **wishes,
        )
    print(json.dumps({"report": str(page)}) if as_json else f"report: {page}")


@app.command()
def distill(
    method: Annotated[str, typer.Argument(help="A method: distillens list distillers.")],
    to: Annotated[Path, typer.Option("--to", help="The run folder to write.")],
    data: Data = "digits",
    space: Space = "standardised",
    ipc: Annotated[int, typer.Option("--ipc", help="Images per class.")] = 1,
    settings: Settings = None,
    seed: Seed = 0,
    replicate: Annotated[int, typer.Option("--replicate", min=0, help="Which replicate of the seed.")] = 0,
    device: Device = "cpu",
    engine: EngineOption = "processes",
    address: Address = None,
    precision: PrecisionOption = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; part of what settles the last bits.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="Where trainings (experts) are kept for the next run; thrown away without."
        ),
    ] = None,
    experts: Annotated[
        Path | None, typer.Option("--experts", help="A folder of imported experts to follow.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Distil one set with one method."""
    from distillens import pipeline

    finished = (to / "provenance.json").is_file() and not force
    with _progress(as_json) as tell:
        made = pipeline.distill(
            method,
            data,
            space=space,
            ipc=ipc,
            seed=seed,
            replicate=replicate,
            settings=settings or (),
            to=to,
            force=force,
            device=device,
            engine=engine,
            address=address,
            threads=threads,
            precision=_precision(precision),
            store=store,
            experts=experts,
            tell=tell,
            announce=None if as_json else lambda line: print(line, file=sys.stderr, flush=True),
        )
    if as_json:
        print(json.dumps({"folder": str(to), "fingerprint": made.fingerprint, "points": len(made)}))
    elif finished:
        print(f"nothing to do: {to} is finished (--force does it again)")
    else:
        print(f"{len(made)} points in {to}: next, distillens evaluate {to}")


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file or folder in a foreign layout.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    kind: Annotated[str, typer.Option("--from", help="distillens list formats.")],
    data: Data = "digits",
    net: Annotated[
        str | None,
        typer.Option("--net", help="The network that experts are of (convnet), or a set was distilled on."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What a set is called; the name of its file by default.")
    ] = None,
    settings: Settings = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Bring in what others have made: distilled sets, or expert trajectories to follow."""
    from distillens import pipeline
    from distillens.core.artefact import DistilledDataset

    found = pipeline.import_(
        source, kind, data, to=to, net=net, name=name, settings=settings or (), force=force
    )
    if isinstance(found, DistilledDataset):
        if as_json:
            print(json.dumps({"folder": str(to), "fingerprint": found.fingerprint, "points": len(found)}))
        else:
            print(f"{len(found)} points in {to}: next, distillens evaluate {to}")
    elif as_json:
        print(json.dumps({"folder": str(to), "experts": len(found), "passes": found.passes}))
    else:
        print(
            f"{len(found)} experts of {found.passes} passes in {to}: next, distillens distill mtt --experts {to}"
        )


@app.command()
def evaluate(
    folders: Folders,
    data: Annotated[
        str | None, typer.Option("--data", help="Real data; that of the sets by default.")
    ] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="distillens list protocols.")] = "wddl",
    nets: Annotated[
        int | None, typer.Option("--nets", min=1, help="Networks a set; the protocol's by default, or 5.")
    ] = None,
    net: Annotated[
        str | None, typer.Option("--net", help="distillens list nets; the protocol's by default.")
    ] = None,
    seed: Seed = 0,
    engine: EngineOption = "processes",
    address: Address = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Where the result goes; the first folder by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train fresh networks on distilled sets; random subset, herding and full data stand beside."""
    from distillens import pipeline

    sets, initial, source = _load(folders)
    place = to or folders[0]
    with _progress(as_json) as tell:
        result = pipeline.evaluate(
            sets,
            data or source,
            protocol=protocol,
            nets=nets,
            net=net,
            seed=seed,
            initial=initial,
            store=place / "store",
            engine=engine,
            address=address,
            tell=tell,
        )
    _deliver_whole(result, place, as_json)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="An analysis, or a question: ask behaviour.")],
    folders: Folders,
    data: Annotated[
        str | None, typer.Option("--data", help="Real data; that of the sets by default.")
    ] = None,
    settings: Settings = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="By the paper's protocol, where it has this experiment.")
    ] = False,
    seed: Seed = 0,
    engine: EngineOption = "processes",
    address: Address = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Where results go; the first folder by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask one analysis, or all of a question, about one set or several."""
    from distillens import pipeline

    names = pipeline.analyses_of(question)
    sets, _, source = _load(folders)
    place = to or folders[0]
    with _progress(as_json) as tell:
        results = [
            pipeline.ask(
                name,
                sets,
                data or source,
                settings=settings or (),
                as_published=as_published,
                seed=seed,
                store=place / "store",
                engine=engine,
                address=address,
                tell=tell,
            )
            for name in names
        ]
    _deliver(results, place, as_json)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders: a study, or distilled sets with results.")
    ],
    to: Annotated[Path | None, typer.Option("--to", help="The page, .html or .md.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of one run folder or several."""
    from distillens.report import write

    page = write(folders[0], *folders[1:], to=to)
    print(json.dumps({"report": str(page)}) if as_json else f"report: {page}")


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="distillers, analyses, nets, data, formats, protocols, presets.")
    ],
    as_json: Json = False,
) -> None:
    """What there is: distillers, analyses, nets, data, formats, protocols, presets."""
    from distillens import pipeline

    rows = pipeline.listed(what)
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row.get('about', '')}".rstrip())


def _load(
    folders: Sequence[Path],
) -> tuple[dict[str, list[DistilledDataset]], dict[str, list[DistilledDataset]], str]:
    """Sets by method (folders of one method are its replicates), what they started from, and their data."""
    from distillens.core.artefact import DistilledDataset

    sets: dict[str, list[DistilledDataset]] = {}
    initial: dict[str, list[DistilledDataset]] = {}
    sources = set()
    for folder in folders:
        one = DistilledDataset.load(folder)
        assert one.provenance is not None
        sets.setdefault(one.provenance.method, []).append(one)
        sources.add(one.provenance.data)
        if (folder / "initial" / "provenance.json").is_file():
            initial.setdefault(one.provenance.method, []).append(DistilledDataset.load(folder / "initial"))
    if len(sources) > 1:
        raise UserError(
            "these sets come from different data", got=", ".join(sorted(sources)), fix="name one with --data"
        )
    whole = {name: many for name, many in initial.items() if len(many) == len(sets[name])}
    return sets, whole, sources.pop()


def _deliver(results: Sequence[Result], place: Path, as_json: bool) -> None:
    """Save results, and print their headlines and claims."""
    paths = [result.save(place / "results") for result in results]
    if as_json:
        saved = [json.loads(path.read_text()) for path in paths]
        kept = ("analysis", "headline", "claims", "tables", "notes")
        print(json.dumps([{name: one[name] for name in kept} for one in saved]))
        return
    for result, path in zip(results, paths, strict=True):
        print(result.title)
        for name, estimate in result.headline().items():
            print(f"  {name}: {estimate.text()}  (n = {estimate.n}, {estimate.unit})")
        for claim in result.claims():
            print(f"  {claim.verdict:>13}, {claim.subject}: {claim.statement} ({claim.estimate.text()})")
        print(f"  saved: {path}; for a page: distillens report {place}")


def _deliver_whole(result: Result, place: Path, as_json: bool) -> None:
    """Save a result and print all of it: storage, images seen and how it was chosen belong beside every accuracy."""
    _deliver([result], place, as_json)
    if as_json:
        return
    for table in result.tables():
        _show(table)
    for note in result.notes():
        print(note)


def _show(table: Table) -> None:
    """Print a table in columns."""

    def text(cell: str | int | Estimate) -> str:
        if isinstance(cell, int):
            return f"{cell:,}"
        return cell if isinstance(cell, str) else cell.text()

    rows = [table.columns, *(tuple(map(text, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(table.title)
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


STOPPED = 130  # what typer exits with at Ctrl-C


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 2, Ctrl-C exit code 130."""
    # Batch systems ask for an end so: it is no other than Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if len(sys.argv) > 1 and not {"--help", "--version"} & set(sys.argv):
        from distillens.engine.workers import settle_process

        settle_process()
    try:
        app()
    except UserError as error:
        print(f"distillens: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as ended:
        if ended.code == STOPPED:
            print("distillens: stopped; the same command goes on where it was", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
