"""The command line: a thin layer over the Python API. It parses, calls, prints; it decides nothing.

The options of `finetune`, `plan` and `resume` come from options.py. Exit codes: 0 done, 1 a failed run, 2 bad input,
3 does not fit, 129, 130 and 143 interrupted (SIGHUP, SIGINT, SIGTERM). Errors and notes go to stderr, results to stdout
(terminal.py). Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lopt_edge.cli.data_check import data_check
from lopt_edge.cli.eval_page import evaluate
from lopt_edge.cli.export_command import export_command, push_command
from lopt_edge.cli.options import (
    BaseOption,
    CacheOption,
    DeviceOption,
    DtypeOption,
    RevisionOption,
    TemplateOption,
    check_words,
    config_parameters,
    in_our_words,
    own_option,
    settings_of,
    signature,
)
from lopt_edge.cli.start_pages import init, recipes_app
from lopt_edge.cli.stopping import stoppable
from lopt_edge.cli.terminal import err, exit_code_of, out, say, stream, streams, warn
from lopt_edge.config.load import load_config, placed
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError

DOES_NOT_FIT = 3  # exit code
NO_FORM = "Each switch has a --no- form, which turns off what the file turns on. Lists are written with commas."

app = typer.Typer(
    name="lopt-edge",
    help="Low-memory fine-tuning of large language models on one consumer GPU or a CPU laptop.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at a data file as training will see it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")

AdapterOption = Annotated[str | None, typer.Option("--adapter", help="LoRA adapter folder, e.g. a run's output")]
SystemOption = Annotated[str | None, typer.Option("--system", help="system message before the prompt")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="longest reply in tokens")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy")]
TopPOption = Annotated[float, typer.Option("--top-p", help="keep the most likely tokens of this mass")]
SeedOption = Annotated[int, typer.Option("--seed", help="seed of the sampling")]


def finetune_command(
    config_file: str | None = None, print_config: bool = False, verbose: bool = False, **flags: Any
) -> None:
    """Train a LoRA adapter on a data file. Settings come from CONFIG.yaml and flags; flags win."""
    flags = settings_of(flags)
    config = load_config(config_file, flags, placeholder="(needed)" if print_config else None)
    if print_config:
        out.print(config.as_yaml(), end="", markup=False)
        return
    with placed(config_file, flags):
        _finetune(config, verbose=verbose)


def resume_command(output: str, verbose: bool = False, **flags: Any) -> None:
    """Go on with a run that was stopped, from its newest checkpoint. Flags change what may change (budgets, more steps)."""
    settings, flags = Path(output).expanduser() / "config.yaml", settings_of(flags)
    if not settings.is_file():
        raise InputError("holds no run of finetune (it has no config.yaml)", where=output, fix="name a run's output folder")
    config = load_config(settings, {**flags, "output": output, "resume": "auto"})
    with placed(settings, flags):
        _finetune(config, verbose=verbose)


def _finetune(config: Config, *, verbose: bool) -> None:
    from lopt_edge.cli.run_page import run

    with stoppable():
        run(config, verbose=verbose)


def plan_command(config_file: str | None = None, **flags: Any) -> None:
    """Say what a run will take, and pick the fastest plan that fits. Takes the settings of finetune; data that is named is
    read, for hours."""
    from lopt_edge.cli.plan_cards import list_cards
    from lopt_edge.cli.plan_page import plan
    from lopt_edge.planning.worst_case import NOT_GIVEN

    own = {name: flags.pop(name) for name in ("gpu", "as_json", "sweep", "picture", "timeline", "explain")}
    if own["gpu"] == "list":
        list_cards(out, as_json=own["as_json"])
        return
    flags = settings_of(flags)
    config = load_config(config_file, flags, placeholder=NOT_GIVEN)
    if config.model == NOT_GIVEN:
        raise InputError("is needed", where="model", fix="add --model FOLDER, a hub id or a preset (llama-3.1-8b)")
    with placed(config_file, flags):
        fits = plan(config, out, **own)
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


VERBOSE = own_option("verbose", "--verbose", "say why things were chosen, and the plan's hash")
finetune_command.__signature__ = signature(  # type: ignore[attr-defined]  # typer reads it
    own_option("print_config", "--print-config", "print the resolved settings and stop"), VERBOSE
)
app.command("finetune", epilog=NO_FORM)(finetune_command)
plan_command.__signature__ = signature(  # type: ignore[attr-defined]  # typer reads it
    own_option(
        "gpu",
        "--gpu",
        "plan for this card (rtx4090, ...); all: a table of cards; list: their names",
        metavar="CARD",
    ),
    own_option("as_json", "--json", "print the answer as JSON"),
    own_option(
        "sweep", "--sweep", "plan for many values: max-seq-len=1k..256k or device-memory=4GB..24GB", metavar="NAME=VALUES"
    ),
    own_option("picture", "--picture", "where a sweep draws its curve (default: plan-sweep.svg)", metavar="FILE.svg"),
    own_option("timeline", "--timeline", "draw bytes over the ops of a step", metavar="FILE.svg"),
    own_option("explain", "--explain", "print the plan's text, op by op"),
)
app.command("plan", epilog=NO_FORM)(plan_command)
folder = Annotated[str, typer.Argument(metavar="OUTPUT", help="output folder of the run")]
resume_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
    [
        inspect.Parameter("output", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=folder),
        *(parameter for parameter in config_parameters() if parameter.name not in ("output", "resume")),
        VERBOSE,
    ]
)
app.command("resume", epilog=NO_FORM)(resume_command)


@app.command("compare")
def compare_command(
    config_file: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="settings that all variants share")],
    methods: Annotated[str, typer.Option("--methods", help="e.g. e2e,lopt,lopt:k=4:lr_local=0.1x,frozen")],
    seeds: Annotated[str, typer.Option("--seeds", help="one run of each variant per seed")] = "0,1,2",
    output: Annotated[str | None, typer.Option("--output", help="folder of runs, tables (default: the config's)")] = None,
    lr_grid: Annotated[
        str, typer.Option("--lr-grid", help="tune each variant's lr on the first seed, e.g. 1e-4,3e-4,1e-3")
    ] = "",
    test_data: Annotated[str | None, typer.Option("--test-data", help="the final figures are of this file")] = None,
    exact_match: Annotated[int, typer.Option("--exact-match", help="compare greedy completions of the first N rows")] = 0,
    only: Annotated[str, typer.Option("--only", help="run what is missing of these variants only")] = "",
    jobs: Annotated[int, typer.Option("--jobs", help="how many runs at once (their seconds are then not comparable)")] = 1,
    equal: Annotated[
        str,
        typer.Option(
            "--equal",
            metavar="seconds,bytes",
            help="seconds: each variant gets the steps that the first one's seconds allow; bytes: all get its memory",
        ),
    ] = "",
    closed_questions: Annotated[
        str | None, typer.Option("--closed-questions", help="FILE of prompts and answers, asked before and after")
    ] = None,
) -> None:
    """Compare methods on the same data, seeds and tokens: tables and plots. What is there already is not run again."""
    from lopt_edge.comparison.run import compare

    with stoppable():
        found = compare(
            config_file,
            methods,
            seeds=seeds,
            output=output,
            lr_grid=lr_grid,
            test_data=test_data,
            exact_match=exact_match,
            only=only,
            jobs=jobs,
            equal=equal,
            closed_questions=closed_questions,
            say=say,
        )
    out.print(found.markdown, end="", markup=False)
    say(f"tables and plots: {found.study.output / 'compare.html'}")
    for problem in found.problems:
        say(f"failed: {problem}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="model folder or hub id")],
    target: Annotated[str, typer.Argument(help="new folder for the 4-bit form")],
    form: Annotated[str, typer.Option("--form", help="nf4: 4 bits, double quantisation (bitsandbytes)")] = "nf4",
    dtype: Annotated[str | None, typer.Option("--dtype", help="recorded compute dtype (default: the model's)")] = None,
    revision: RevisionOption = None,
) -> None:
    """Write a model in 4 bits (NF4, double quantisation), in the form that transformers loads."""
    from lopt_edge.adapters.packed_forms import check_form
    from lopt_edge.models.folder import check_weights, find_model, tensor_entries
    from lopt_edge.models.four_bit import quantise_model

    check_form(form)
    model, folder = find_model(source, revision=revision), Path(target)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"{dtype!r} is unknown", where="--dtype", fix="choose float32, bfloat16 or float16")
    if model.facts.quantised:
        raise InputError("is in 4 bits already", where=source, fix="use it as it is")
    if folder.exists():
        raise InputError("exists already", where=target, fix="choose a new folder")
    check_weights(model, tensor_entries(model.path, model.facts))
    with stoppable():
        quantise_model(model, folder, dtype=dtype)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    out.print(f"{folder}: {n_bytes / 2**20:.0f} MiB", markup=False)


data_app.command("check")(data_check)
app.command("init")(init)
app.command("eval")(evaluate)


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Option("--prompt", help="the user's message")],
    model: BaseOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = "auto",
    compute_dtype: DtypeOption = "auto",
    chat_template: TemplateOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without a chat template")] = False,
) -> None:
    """Complete one prompt with a model, with or without an adapter."""
    from lopt_edge.adapters.generation import Sampling, asked, load_generator

    if not prompt.strip():
        raise InputError("is empty", where="--prompt", fix="give a text")
    if raw and system is not None:
        raise InputError("cannot be with --raw: there is no chat template", where="--system", fix="put it into the prompt")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generator = load_generator(
        model,
        adapter,
        revision=revision,
        cache_dir=cache_dir,
        device=device,
        compute_dtype=compute_dtype,
        chat_template=chat_template,
        say=warn,
    )
    if raw:
        generator.continue_text(prompt, sampling, on_text=stream)
    else:
        generator.reply(asked(prompt, system), sampling, on_text=stream)
    print()


@app.command()
def chat(
    model: BaseOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = "auto",
    compute_dtype: DtypeOption = "auto",
    chat_template: TemplateOption = None,
) -> None:
    """Talk to a model, with or without an adapter. An empty line or Ctrl-D ends it; /new starts over."""
    from lopt_edge.adapters.generation import Sampling, load_generator

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generator = load_generator(
        model,
        adapter,
        revision=revision,
        cache_dir=cache_dir,
        device=device,
        compute_dtype=compute_dtype,
        chat_template=chat_template,
        say=warn,
    )
    err.print("An empty line or Ctrl-D ends the talk, /new starts over.")
    begun: list[tuple[str, str]] = [("system", system)] if system else []
    messages = [*begun]
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        if line == "/new":
            messages = [*begun]
            continue
        messages.append(("user", line))
        messages.append(("assistant", generator.reply(messages, sampling, on_text=stream)))
        print()


app.command("export")(export_command)
app.command("push")(push_command)


@app.command("models")
def models_command(as_json: Annotated[bool, typer.Option("--json", help="print the list as JSON")] = False) -> None:
    """List the models that can be planned by name, and the families that can be trained."""
    from lopt_edge.cli.models_page import models_page

    models_page(out, as_json=as_json)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON schema of a settings file, for editors (examples/config.schema.json is this)."""
    from lopt_edge.config.schema import schema

    print(json.dumps(schema(), indent=2))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="measure a sound machine for the planner (20 s)")] = False,
    prove: Annotated[bool, typer.Option("--prove", help="hold the device's arithmetic against float64")] = False,
) -> None:
    """Check this machine: versions, devices, memory per tier, and a real 4-bit forward and backward."""
    from lopt_edge.cli.doctor_page import doctor_page

    if not doctor_page(out, as_json=as_json, measure=measure, prove=prove):
        raise typer.Exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lopt-edge {version('lopt-edge')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


def main() -> None:
    """The console script: errors of ours become one message and an exit code, never a traceback."""
    # Threads sleep at a barrier instead of spinning. Beside one other busy program, spinning made training on two cores
    # 4 to 20 times slower (341 and 53 against 1,213 and 979 tokens/s on the example). Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional CPU kernel that we do not use
    streams.guard()
    sys.exit(streams.exit_code(exit_code_of(_run)))


def _run() -> None:
    check_words(sys.argv[1:])
    app(args=in_our_words(sys.argv[1:]))
