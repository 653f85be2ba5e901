"""The command line: `mpo <verb> --config file.yaml --key value`.

A verb is a module with `CONFIGS`, the dataclasses of its settings, and `run(*configs) -> Summary`. It is imported when
it is run, so that `mpo --help` does not wait for TRL. Only this file prints, and only on the first rank.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_builders.records import InputError, Summary
from mpo import __version__
from mpo.settings import describe_settings, read_settings, read_values


@dataclass(frozen=True)
class Verb:
    """One command.

    Args:
        module: Where its `CONFIGS` and `run` are.
        help: Its line in `mpo --help`.
        runs_others: `run` also takes `run_verb(verb, argv) -> Summary`, to run other verbs in this process.
        takes_values: `run` takes each config as the dictionary that was read, not built: for another machine's, or to
            be varied.
    """

    module: str
    help: str
    runs_others: bool = False
    takes_values: bool = False


VERBS = {
    "quickstart": Verb("mpo.quickstart", "The whole method on real handwritten digits, on a CPU.", runs_others=True),
    "sft": Verb("mpo.sft", "Fine-tune a vision-language model on conversations.", runs_others=True, takes_values=True),
    "sample": Verb("data_builders.sample", "Let a model answer every question several times."),
    "judge": Verb("data_builders.judge", "Compare the final answer of every response with the true one."),
    "pair": Verb("data_builders.pair", "Pair right responses with wrong ones of the same question."),
    "dropout-ntp": Verb("data_builders.dropout_ntp", "Pair responses with continuations made without the image."),
    "rewrite": Verb("data_builders.rewrite", "Rewrite short answers into instruction data with rationales."),
    "filter": Verb("data_builders.filter", "Keep the conversations that rules and a model as judge find good."),
    "mix": Verb("data_builders.mix", "Mix data sets in exact shares, in an order that is fixed once."),
    "convert": Verb("data_builders.convert", "Read and write the formats of others, or look for faults in data."),
    "reference": Verb("mpo.reference", "Compute the reference's log-probabilities ahead of training."),
    "check": Verb("mpo.check", "Say what `mpo train` will take and what is wrong.", takes_values=True),
    "train": Verb("mpo.train", "Train on pairs with Mixed Preference Optimization."),
    "loop": Verb("mpo.loop", "Sample, judge, pair and train, round after round.", runs_others=True),
    "eval": Verb("mpo.evaluate", "Measure a model's accuracy on questions with answers."),
    "export": Verb("mpo.export", "Merge, save and describe a trained model for others."),
    "report": Verb("mpo.report", "Write a page about a run: data, training and evaluation."),
}

app = typer.Typer(
    name="mpo",
    help="Multimodal preference optimization: from a vision-language model and questions to a better model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run_verb(name: str, argv: Sequence[str]) -> Summary:
    """Runs a verb in this process.

    Args:
        name: The verb as it stands on the command line.
        argv: What would follow it there.

    Returns:
        What the verb has to say; nothing was printed of it.

    Raises:
        InputError: A setting, or something that it names, is wrong.
    """
    verb = VERBS[name]
    module = import_module(verb.module)
    read = read_values if verb.takes_values else read_settings
    configs = read(name, module.CONFIGS, argv)
    if verb.runs_others:
        return module.run(*configs, run_verb=_run_step)
    return module.run(*configs)


def _run_step(name: str, argv: Sequence[str]) -> Summary:
    """Runs a verb for another one, shown as the command that would do the same."""
    _print(f"$ mpo {shlex.join([name, *argv])}")
    summary = run_verb(name, argv)
    _print_summary(replace(summary, next_command=None))
    return summary


def _command(context: typer.Context) -> None:
    name = context.info_name
    try:
        if "--help" in context.args:
            _print_help(name)
        else:
            summary = run_verb(name, context.args)
            _print_summary(summary)
            _leave_ranks()
            if summary.exit_code:
                raise typer.Exit(summary.exit_code)
    except InputError as error:
        _console(stderr=True).print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        _console(stderr=True).print("stopped: the same command goes on where this one stopped.", soft_wrap=True)
        raise typer.Exit(130) from error


def _leave_ranks() -> None:
    """Ends what several ranks talk through: a process that just exits may be killed in the middle of it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


for _name, _verb in VERBS.items():
    _settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(_name, help=_verb.help, add_help_option=False, context_settings=_settings)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(f"mpo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Holds the options that stand before the verb."""


def _console(*, stderr: bool = False) -> Console:
    # what is printed holds names and texts of the user's: `[x]` in them is no markup
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _print(*parts: str | Table) -> None:
    if os.environ.get("RANK", "0") == "0":
        for part in parts:
            _console().print(part, soft_wrap=isinstance(part, str))


def _print_summary(summary: Summary) -> None:
    if summary.text is not None:
        _print(summary.text)
        return
    table = Table(*summary.columns, title=summary.title, title_justify="left")
    for row in summary.rows:
        table.add_row(*row)
    _print(table, *summary.notes)
    for other in summary.also:
        _print_summary(other)
    if summary.next_command:
        _print(f"Next: {summary.next_command}")


def _print_help(name: str) -> None:
    settings, parents = describe_settings(import_module(VERBS[name].module).CONFIGS)
    table = Table("setting", "type", "default", "meaning", title="Settings", title_justify="left")
    for setting in settings:
        table.add_row(setting.name, setting.type, setting.default, setting.help)
    _print(f"mpo {name}: {VERBS[name].help}\n", f"mpo {name} --config FILE.yaml --key value ...\n", table)
    for parent in parents:
        _print(f"Every setting of {parent} is taken too.")
    _print("A setting is a line of the YAML file or `--setting value`; the command line wins over the file.")
