"""The command line: which verb runs, with what, what is printed where, and the exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from data_builders.records import InputError, Summary
from mpo import cli

ROOT = Path(__file__).parent.parent
Install = Callable[..., None]
Capture = pytest.CaptureFixture[str]


@dataclass
class GreetSettings:
    name: str = field(metadata={"help": "Whom to greet [bold]."})
    times: int = 1


def greet(settings: GreetSettings) -> Summary:
    return Summary(
        title="Greeted [bold]",
        columns=["who", "times"],
        rows=[[f"[{settings.name}]", str(settings.times)]],
        notes=["One [note] :smile:"],
        next_command="mpo judge --config " + "very_long_name/" * 20,
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a `run` in the place of a verb's module."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RANK", raising=False)

    def put(verb: str, run: Callable[..., Summary], *, runs_others: bool = False) -> None:
        module = ModuleType(f"fake_{verb}")
        module.CONFIGS, module.run = (GreetSettings,), run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.VERBS, verb, cli.Verb(module.__name__, "Greet.", runs_others=runs_others))

    return put


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.app(argv, prog_name="mpo")
    return stop.value.code


def test_a_verb_gets_its_settings_and_its_summary_is_printed_as_it_is(install: Install, capsys: Capture) -> None:
    install("pair", greet)
    assert call("pair", "--name", "Ada", "--times=2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Greeted [bold]" in out
    assert "│ [Ada] │ 2     │" in out
    assert "One [note] :smile:\n" in out
    assert out.endswith("Next: mpo judge --config " + "very_long_name/" * 20 + "\n")


def test_the_exit_code_is_that_of_the_summary(install: Install, capsys: Capture) -> None:
    install("pair", lambda settings: Summary("Found", ["what"], [["faults"]], exit_code=1))
    assert call("pair", "--name", "Ada") == 1
    assert "faults" in capsys.readouterr().out


def test_a_config_file_is_relative_to_the_working_directory(
    install: Install, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pair", greet)
    (tmp_path / "greet.yaml").write_text("name: 007\n")
    monkeypatch.chdir(tmp_path)
    assert call("pair", "--config", "greet.yaml") == 0
    assert "[007]" in capsys.readouterr().out


def test_only_the_first_rank_prints_a_summary(
    install: Install, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("train", greet)
    monkeypatch.setenv("RANK", "1")
    assert call("train", "--name", "Ada") == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert call("train", "--name", "Ada") == 0
    assert "[Ada]" in capsys.readouterr().out


def test_what_the_user_got_wrong_is_one_line_on_stderr_and_exit_code_2(install: Install, capsys: Capture) -> None:
    def refuse(settings: GreetSettings) -> Summary:
        raise InputError(f"{settings.name} [red]is not here[/red]: " + "look elsewhere, " * 20)

    install("judge", refuse)
    assert call("judge", "--name", "Ada") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: Ada [red]is not here[/red]: " + "look elsewhere, " * 20 + "\n"


def test_a_wrong_setting_is_exit_code_2_before_the_verb_runs(install: Install, capsys: Capture) -> None:
    install("judge", greet)
    assert call("judge", "--nam", "Ada") == 2
    assert capsys.readouterr().err.startswith("error: unknown setting `nam` on the command line; did you mean `name`?")


def test_a_stopped_run_says_how_to_go_on(install: Install, capsys: Capture) -> None:
    def stop(settings: GreetSettings) -> Summary:
        raise KeyboardInterrupt

    install("sample", stop)
    assert call("sample", "--name", "Ada") == 130
    assert capsys.readouterr().err == "stopped: the same command goes on where this one stopped.\n"


def test_a_fault_of_ours_keeps_its_trace(install: Install) -> None:
    def fail(settings: GreetSettings) -> Summary:
        raise RuntimeError("a fault of ours")

    install("sample", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.app(["sample", "--name", "Ada"], prog_name="mpo")


def test_a_verb_that_runs_others_shows_each_as_a_command_with_its_summary(install: Install, capsys: Capture) -> None:
    def both(settings: GreetSettings, run_verb: Callable[[str, list[str]], Summary]) -> Summary:
        first = run_verb("pair", ["--name", f"{settings.name} B."])
        return Summary("Both", ["first"], [[first.rows[0][0]]])

    install("pair", greet)
    install("quickstart", both, runs_others=True)
    assert call("quickstart", "--name", "Ada") == 0
    out = capsys.readouterr().out
    assert out.startswith("$ mpo pair --name 'Ada B.'\nGreeted [bold]")
    assert out.count("[Ada B.]") == 2
    assert "Next:" not in out


def test_the_help_of_a_verb_lists_its_settings(install: Install, capsys: Capture) -> None:
    install("dropout-ntp", greet)
    assert call("dropout-ntp", "--help") == 0
    out = capsys.readouterr().out
    assert "mpo dropout-ntp --config FILE.yaml --key value ..." in out
    assert "│ name    │ str  │ required │ Whom to greet [bold]. │" in out
    assert "│ times   │ int  │ 1        │" in out
    assert "taken too" not in out


def test_the_help_of_a_verb_with_trls_settings_names_their_class(
    install: Install, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DPOConfig

    install("train", greet)
    monkeypatch.setattr(sys.modules["fake_train"], "CONFIGS", (GreetSettings, DPOConfig))
    assert call("train", "--help") == 0
    out = capsys.readouterr().out
    assert "Every setting of trl.DPOConfig is taken too." in out
    assert "learning_rate" not in out


def test_the_help_lists_every_verb_and_an_unknown_one_is_exit_code_2(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert call("--help") == 0
    listed = capsys.readouterr().out
    assert all(f"│ {verb} " in listed and cli.VERBS[verb].help in listed for verb in cli.VERBS)
    assert call("trian") == 2


@pytest.mark.parametrize("arguments", [["-m", "mpo"], ["-c", "from mpo.__main__ import main; main()"]])
def test_the_package_runs_as_a_module_and_as_a_script(arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments, "--version"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mpo 0.1.0\n", "")
