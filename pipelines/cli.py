"""The `i2i` command.

Results go to stdout (with `--json` as one JSON document), messages and progress to stderr. Exit status: 0 done, 2 the
user's mistake, 1 a failure of ours, 143 after SIGTERM. Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from models.errors import ConfigError, I2IError, UserError

# Where results go. Ray prints warnings of its own to stdout, so commands run with stdout turned to stderr.
_results = sys.stdout

app = typer.Typer(
    help="Image-to-image translation at scale: from images in a bucket to a served generator.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting, such as weights.cycle=5. Repeatable."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Ray's own log lines.")]


@app.callback()
def _keep_stdout_for_results() -> None:
    sys.stdout = sys.stderr


@app.command()
def demo(
    keep_serving: Annotated[bool, typer.Option(help="Leave the trained model served until Ctrl-C.")] = False,
    out: Annotated[str | None, typer.Option(help="Directory for everything it makes.")] = None,
) -> None:
    """The whole pipeline on embedded data, in minutes on a laptop."""
    from pipelines.demo import run_demo

    report = run_demo(out=out, keep_serving=keep_serving)
    _print(report)


@app.command()
def prepare(
    src: Annotated[str, typer.Argument(help="Folder of images, local or s3://.")],
    dest: Annotated[str, typer.Argument(help="Dataset to write, local or s3://.")],
    layout: Annotated[str, typer.Option(help="auto, domains, paired or side-by-side.")] = "auto",
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=FILE", help="Train only on the keys listed in FILE, one a line. Repeatable."),
    ] = None,
    val: Annotated[float, typer.Option(help="Share of the images for validation, where no folder says so.")] = 0.05,
    test: Annotated[float, typer.Option(help="Share of the images for the test split, likewise.")] = 0.1,
    group: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Images whose keys match alike stay in one split.")
    ] = None,
    size: Annotated[int | None, typer.Option(metavar="PX", help="Shrink larger images to this side.")] = None,
    max_bad: Annotated[float, typer.Option(help="Share of unusable images that is put up with.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the cut in splits.")] = 0,
    licence: Annotated[str | None, typer.Option(help="Licence of the images; recorded with the data.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Turn folders of images into a dataset of verified shards."""
    from pipelines import cluster
    from pipelines.prepare import prepare as run

    selected = _pairs(select or [], "--select")
    cluster.connect(verbose=verbose)
    result = run(
        src,
        dest,
        layout=layout,
        select=selected,
        val=val,
        test=test,
        group=group,
        size=size,
        max_bad=max_bad,
        seed=seed,
        licence=licence,
    )
    if as_json:
        _print_json(result)
        return
    for domain, splits in result.domains.items():
        _print(f"{domain}: " + ", ".join(f"{count:,} {split}" for split, count in splits.items()))
    if result.quarantined:
        _print(f"{result.quarantined} unusable, listed in {result.report}")


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(help="Dataset written by prepare, local or s3://.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the digest of every shard.")] = False,
    sheet: Annotated[str | None, typer.Option(metavar="FILE.png", help="Write a contact sheet.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a dataset holds."""
    from pipelines import tables
    from pipelines.inspect import inspect_dataset

    report = inspect_dataset(dataset, verify=verify, sheet=sheet)
    _print_json(report) if as_json else _print(tables.dataset(report))


@app.command()
def train(
    system: Annotated[str, typer.Argument(help="Name of a system, such as cyclegan.")],
    data: Annotated[str | None, typer.Option(metavar="URI", help="Dataset written by prepare.")] = None,
    domains: Annotated[str | None, typer.Option(metavar="A,B", help="Domains in order.")] = None,
    out: Annotated[str | None, typer.Option(metavar="URI", help="Run directory, local or s3://.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of the run; default as published.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step, over all workers.")] = None,
    size: Annotated[int | None, typer.Option(metavar="PX", help="Side of the training images.")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; 0: in this one, without Ray.")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPU where there is one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, printed and stored.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; default: what the hardware does fast.")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="Bit-exact also on CUDA.")] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="A run.yaml to start from.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Go on with another number of --steps.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run; needs no data.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a system on a dataset."""
    from pipelines.config import load_document, merge, parse_settings

    named = {
        "name": system,
        "out": out,
        "data": {"uri": data, "domains": _names(domains)},
        "system": {"size": size},
        "train": {
            "steps": steps,
            "batch": batch,
            "workers": workers,
            "gpu": gpu,
            "seed": seed,
            "precision": precision,
            "deterministic": deterministic,
        },
    }
    base = load_document(_read(config)) if config else {}
    base.pop("out", None)  # a stored run's settings are taken, not its place
    options = merge(merge(merge({}, base), parse_settings(settings or [])), named)
    if dry_run:
        _dry_run(options, as_json)
        return
    _train(options, resume, extend, as_json, verbose)


def _train(options: dict[str, Any], resume: bool, extend: bool, as_json: bool, verbose: bool) -> None:
    from models import system_class
    from pipelines.train import plan_run
    from pipelines.train import train as run

    system_class(options["name"])
    if not (resume or extend):
        if not options["data"].get("uri"):
            raise ConfigError("no dataset was named", hint="give --data URI")
        options.setdefault("out", f"runs/{options['name']}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        options["train"].setdefault("gpu", _has_gpu())
    elif not options.get("out"):
        raise ConfigError("--resume needs the run directory", hint="give --out")
    resolved = plan_run(options, resume=resume, extend=extend)
    result = run(resolved, verbose=verbose)
    if as_json:
        _print_json(result)
    elif result.finished:
        _print(result.bundle)
    if not result.finished:
        raise SystemExit(143)


def _dry_run(options: dict[str, Any], as_json: bool) -> None:
    from pipelines.dryrun import describe, dry_run

    report = dry_run(options)
    _print_json(report) if as_json else _print(describe(report))


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="Bundle, or run directory, local or s3://.")],
    data: Annotated[str, typer.Option(metavar="URI", help="Dataset written by prepare.")],
    split: Annotated[str | None, typer.Option(help="Default: test where it exists, else val.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="A,B", help="Default: all that apply.")] = None,
    features: Annotated[
        str, typer.Option(metavar="NAME[:URI]", help="random_v1, inception:URI or dinov2:URI.")
    ] = "random_v1",
    source: Annotated[str | None, typer.Option(help="Domain to translate from.")] = None,
    to: Annotated[str | None, typer.Option(help="Domain to translate to.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many images.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random baseline.")] = 0,
    gpu: Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPU where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Score a bundle on held-out images, beside doing nothing and real images.

    Scores of the whole held-out split are kept in the bundle.
    """
    from pipelines import tables
    from pipelines.evaluate import evaluate as run
    from pipelines.evaluate import save_scores

    result = run(
        bundle,
        data,
        split=split,
        metrics=_names(metrics),
        features=features,
        source=source,
        to=to,
        limit=limit,
        seed=seed,
        device="cuda" if _use_gpu(gpu) else "cpu",
    )
    if limit is None and metrics is None and split is None:
        save_scores(bundle, result)
    _print_json(result) if as_json else _print(tables.evaluation(result))


@app.command()
def tune(
    system: Annotated[str, typer.Argument(help="Name of a system, such as cyclegan.")],
    data: Annotated[str, typer.Option(metavar="URI", help="Dataset written by prepare.")],
    domains: Annotated[str | None, typer.Option(metavar="A,B", help="Domains in order.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Study directory.")] = None,
    trials: Annotated[int, typer.Option(help="How many weightings are tried.")] = 16,
    steps: Annotated[int | None, typer.Option(help="Length of a trial that is not stopped; default 1000.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    size: Annotated[int | None, typer.Option(metavar="PX", help="Side of the training images.")] = None,
    scheduler: Annotated[str, typer.Option(help="asha (stops the worse half early) or none.")] = "asha",
    search: Annotated[str, typer.Option(help="random or optuna.")] = "random",
    features: Annotated[str, typer.Option(metavar="NAME[:URI]", help="As for evaluate.")] = "random_v1",
    objective: Annotated[str | None, typer.Option(help="Held-out metric; default: of the tune space.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Trials at a time; default: one a core.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search and of every trial; default 0.")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPU where there is one.")] = None,
    settings: Settings = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search the loss weights of a system on a held-out metric."""
    from pipelines import cluster
    from pipelines.config import merge, parse_settings, resolve
    from pipelines.tune import describe
    from pipelines.tune import tune as run

    named = {
        "name": system,
        "out": out or f"runs/tune-{system}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}",
        "data": {"uri": data, "domains": _names(domains)},
        "system": {"size": size},
        "train": {"steps": steps, "batch": batch, "seed": seed, "gpu": gpu},
    }
    defaults = {"train": {"steps": 1000, "workers": 0, "seed": 0, "gpu": _has_gpu()}}
    config = resolve(merge(merge(defaults, parse_settings(settings or [])), named))
    cluster.connect(verbose=verbose)
    result = run(
        config,
        trials=trials,
        scheduler=scheduler,
        search=search,
        objective=objective,
        concurrent=concurrent,
        features=features,
    )
    _print_json(result) if as_json else _print(describe(result))


@app.command()
def promote(
    source: Annotated[str | None, typer.Argument(help="Run, study or bundle directory.")] = None,
    *,
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    alias: Annotated[str, typer.Option(help="Alias that will point to the new version.")] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Even if it scores below the present one.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Point the alias back to the version before.")] = False,
    as_json: Json = False,
) -> None:
    """Register a bundle in MLflow and point an alias at it."""
    from pipelines import promote as promotion

    if rollback == (source is not None):
        raise ConfigError("promote needs a run, study or bundle, or --rollback", hint="one of the two")
    if source is None:
        result = promotion.rollback(name, alias)
    else:
        result = promotion.promote(source, name, alias=alias, force=force)
    _print_json(result) if as_json else _print(f"{result.model} version {result.version} is {result.alias}")


@app.command()
def serve(
    model: Annotated[list[str] | None, typer.Option(metavar="NAME@ALIAS", help="Registered model. Repeatable.")] = None,
    bundle: Annotated[list[str] | None, typer.Option(metavar="DIR", help="Bundle directory. Repeatable.")] = None,
    host: Annotated[str, typer.Option(help="Beyond 127.0.0.1 only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the HTTP server.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the token callers must send.")] = None,
    verbose: Verbose = False,
) -> None:
    """Serve models over HTTP, with a page to try them on."""
    from deploy.app import run

    status = run(model or [], bundle or [], host, port, verbose, token_file=str(token_file) if token_file else None)
    raise SystemExit(status)


@app.command()
def translate(
    bundle: Annotated[str, typer.Argument(help="Bundle, or run directory, local or s3://.")],
    src: Annotated[str, typer.Argument(help="Folder of images, local or s3://.")],
    dest: Annotated[str, typer.Argument(help="Where translations go; names are kept.")],
    to: Annotated[str | None, typer.Option(help="Target domain.")] = None,
    source: Annotated[str | None, typer.Option(help="Source domain.")] = None,
    workers: Annotated[int, typer.Option(help="Translating processes.")] = 1,
    gpu: Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPU where there is one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out images that are translated already.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Translate every image below a folder or prefix."""
    from models.system import Condition
    from pipelines import cluster
    from pipelines.translate import translate as run

    cluster.connect(verbose=verbose)
    condition = Condition(to=to, source=source)
    result = run(bundle, src, dest, condition, workers=workers, resume=resume, gpu=_use_gpu(gpu))
    if as_json:
        _print_json(result)
    else:
        _print(
            f"{result.done} translated, {result.failed} failed" + (f", see {result.report}" if result.failed else "")
        )
    if result.failed and not (result.done or result.skipped):
        raise UserError("no image could be translated", hint=f"see {result.report}")


@app.command()
def doctor(
    data: Annotated[str | None, typer.Option(metavar="URI", help="Also try to read this dataset.")] = None,
    as_json: Json = False,
) -> None:
    """Say what works on this machine."""
    from pipelines.doctor import doctor as run
    from pipelines.doctor import failed, render

    checks = run(data)
    _print_json([asdict(check) for check in checks]) if as_json else _print(render(checks))
    if failed(checks):
        raise SystemExit(1)


def main() -> NoReturn:
    """Entry point: errors become one line and an exit status."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _exit(f"error: {error}", 2)
    except I2IError as error:
        _exit(f"error: {error}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except Exception as error:
        # Typer vendors click: its usage errors are known by what they offer, not by a class we could import.
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        _exit(f"error: {text()}; see `i2i --help`", 2)
    sys.exit(status if isinstance(status, int) else 0)


def _exit(message: str, status: int) -> NoReturn:
    from pipelines import console

    console.say(message)
    sys.exit(status)


def _print_json(document: Any) -> None:
    plain = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
    _print(json.dumps(_finite(plain), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a finite number is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(text: Any) -> None:
    print(text, file=_results, flush=True)


def _pairs(given: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {item}: not of the form DOMAIN=FILE")
        pairs[name] = value
    return pairs


def _read(uri: str) -> bytes:
    from pipelines.storage import Store, split_name

    folder, name = split_name(uri)
    return Store(folder).read(name)


def _names(given: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in given.split(",")) if given else None


def _use_gpu(wanted: bool | None) -> bool:
    if wanted and not _has_gpu():
        raise ConfigError("--gpu: this machine has no GPU that torch can use", hint="leave it out, or give --cpu")
    return _has_gpu() if wanted is None else wanted


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
