"""Settings: what a user writes into a file or after the verb, and what the dataclass gets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter

from data_builders.records import InputError
from mpo.settings import describe_settings, read_settings, read_values


@dataclass
class PairSettings:
    questions: Path = field(metadata={"help": "The questions."})
    output: Path = field(metadata={"help": "A folder."})
    max_pairs: int = 15
    beta: float = 0.1
    answer: str = ""
    suffix: str | None = None
    keep_order: bool = False
    kind: Literal["auto", "math"] = "auto"
    weights: tuple[float, float] = (0.8, 0.2)
    stop: list[str] = field(default_factory=lambda: ["###"])
    numbers: list[int] = field(default_factory=list)
    model: str | list[str] = "tiny"
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise ValueError(f"`max_pairs` is {self.max_pairs}: a question needs at least one pair.")


@dataclass
class OtherSettings:
    seed: int = 0
    beta: float = 0.5


REQUIRED = ["--questions", "q.jsonl", "--output", "out"]


def read(*argv: str) -> PairSettings:
    return read_settings("pair", (PairSettings,), [*REQUIRED, *argv])[0]


def read_file(tmp_path: Path, text: str) -> PairSettings:
    path = tmp_path / "pair.yaml"
    path.write_text(text, encoding="utf-8")
    return read("--config", str(path))


@dataclass
class FromSettings:
    from_: Path = field(metadata={"help": "Where from."})
    to: str = "here"


def test_a_field_that_would_be_a_word_of_python_is_set_without_its_underscore() -> None:
    assert read_settings("copy", (FromSettings,), ["--from", "a"]) == (FromSettings(Path("a")),)
    (setting, _), _ = describe_settings((FromSettings,))
    assert (setting.name, setting.default) == ("from", "required")
    with pytest.raises(InputError, match="`mpo copy` also needs `from`"):
        read_settings("copy", (FromSettings,), [])
    with pytest.raises(InputError, match="unknown setting `from_`.*did you mean `from`"):
        read_settings("copy", (FromSettings,), ["--from_", "a"])


def test_values_take_the_type_of_their_field() -> None:
    assert read() == PairSettings(Path("q.jsonl"), Path("out"))


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max_pairs", "3"], "max_pairs", 3),
        (["--max-pairs=3"], "max_pairs", 3),
        (["--max-pairs", "3", "--max_pairs", "4"], "max_pairs", 4),
        (["--beta", "1e-4"], "beta", 0.0001),
        (["--beta", "5e-6"], "beta", 0.000005),
        (["--beta", "-.5"], "beta", -0.5),
        (["--beta", "1"], "beta", 1.0),
        (["--max-pairs", "007"], "max_pairs", 7),
        (["--keep-order"], "keep_order", True),
        (["--keep-order", "false"], "keep_order", False),
        (["--keep-order", "no"], "keep_order", False),
        (["--keep-order", "--beta", "2"], "keep_order", True),
        (["--weights", "[0.5, 1]"], "weights", (0.5, 1.0)),
        (["--stop", "a"], "stop", ["a"]),
        (["--stop", "7"], "stop", ["7"]),
        (["--stop", "###"], "stop", ["###"]),
        (["--stop", "[007, no, 12]"], "stop", ["007", "no", "12"]),
        (["--numbers", "7"], "numbers", [7]),
        (["--options", "{scale: 1e-3, on: yes}"], "options", {"scale": 0.001, "on": "yes"}),
        (["--kind", "math"], "kind", "math"),
        (["--suffix", "null"], "suffix", None),
        (["--suffix", "none"], "suffix", "none"),
        (["--suffix", ""], "suffix", ""),
        (["--model", "[a, b]"], "model", ["a", "b"]),
        (["--model", "a"], "model", "a"),
        (["--output", "2024"], "output", Path("2024")),
    ],
)
def test_an_override_is_read_as_yaml(argv: list[str], name: str, value: object) -> None:
    assert getattr(read(*argv), name) == value


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "7",
        "0.70",
        "1_000",
        "12:30:00",
        "2026-01-01",
        "true",
        "no",
        "[a, b]",
        "a: b",
        "- item",
        "# of cats",
        "5 # c",
    ]
    + ["'quoted'", 'say "yes": [', " spaces ", "--", "a=b", "0x1F", "=", "~/models"],
)
def test_a_text_on_the_command_line_stays_as_it_was_written(text: str) -> None:
    assert read(f"--answer={text}").answer == text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("007", "007"),
        ("0.70", "0.70"),
        ("no", "no"),
        ("true", "true"),
        ("12:30", "12:30"),
        ("'# 5'", "# 5"),
        ("1e3", "1e3"),
    ],
)
def test_a_text_in_a_file_keeps_what_the_user_wrote(tmp_path: Path, written: str, value: str) -> None:
    assert read_file(tmp_path, f"answer: {written}\n").answer == value


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text("max-pairs: 4\nbeta: 0.3\nquestions: here.jsonl\noutput: there\n")
    (settings,) = read_settings("pair", (PairSettings,), ["--beta", "0.7", "--config", str(path)])
    assert (settings.max_pairs, settings.beta, settings.answer) == (4, 0.7, "")
    assert settings.questions == Path("here.jsonl")


def test_a_file_with_comments_alone_sets_nothing(tmp_path: Path) -> None:
    assert read_file(tmp_path, "# mpo pair\n") == read()


def test_a_key_goes_to_every_dataclass_that_has_it() -> None:
    values = read_values("pair", (PairSettings, OtherSettings), [*REQUIRED, "--seed", "3", "--beta", "2"])
    assert values == ({"questions": Path("q.jsonl"), "output": Path("out"), "beta": 2.0}, {"seed": 3, "beta": 2.0})


def test_an_unknown_key_on_the_command_line_names_the_closest_one() -> None:
    with pytest.raises(
        InputError, match=r"`max_pair` on the command line; did you mean `max_pairs`\? `mpo pair --help`"
    ):
        read("--max-pair", "3")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown setting `learning_rat` in .*pair\.yaml"):
        read_file(tmp_path, "learning_rat: 1\n")


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(InputError, match="`mpo pair` also needs `questions`, `output`"):
        read_settings("pair", (PairSettings,), [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--beta", "fast"], "`beta` is 'fast' on the command line, but it takes float"),
        (["--beta", "null"], "`beta` is 'null' on the command line, but it takes float"),
        (["--max-pairs"], "`max_pairs` is given without a value on the command line, but it takes int"),
        (["--max-pairs", "true"], "but it takes int"),
        (["--max-pairs", "1.5"], "but it takes int"),
        (["--output"], "`output` is given without a value"),
        (["--kind", "anls"], r"`kind` is 'anls' on the command line, but it takes auto \| math"),
        (["--weights", "[1]"], r"but it takes tuple\[float, float\]"),
        (["--answer", "null"], "but it takes str"),
        (["--config"], "`config` is given without a value"),
        (["--stop", "a", "b"], r"unexpected 'b' on the command line: .* `--key '\[a, b\]'`"),
        (["-x", "b"], "unexpected '-x'"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place_and_type(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer:\n", r"`answer` is None in .*pair\.yaml, but it takes str"),
        ("beta: 0.1\nmax_pairs: 3\nbeta: 0.2\n", r"pair\.yaml, line 3: `beta` is given twice"),
        ("max-pairs: 3\nmax_pairs: 3\n", r"line 2: `max_pairs` is given twice"),
        ("options:\n  a: 1\n  a: 2\n", r"pair\.yaml is not valid YAML: `a` is given twice"),
        ("- a\n- b\n", r"pair\.yaml must hold a mapping, .* but it holds a sequence"),
        ("just text\n", "but it holds a scalar"),
        ("a: [1\n", r"pair\.yaml is not valid YAML: .*line 2"),
        ("answer: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        read_file(tmp_path, text)


def test_a_config_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read: No such file"):
        read("--config", "nowhere.yaml")


def test_what_a_dataclass_refuses_is_told_in_its_own_words() -> None:
    with pytest.raises(InputError, match=r"^`max_pairs` is 0: a question needs at least one pair\.$"):
        read("--max-pairs", "0")


def test_the_description_has_the_type_the_default_and_the_help_of_every_setting() -> None:
    settings, parents = describe_settings((PairSettings,))
    lines = {setting.name: (setting.type, setting.default, setting.help) for setting in settings}
    assert parents == []
    assert lines["questions"] == ("Path", "required", "The questions.")
    assert lines["suffix"] == ("str | None", "null", "")
    assert lines["keep_order"] == ("bool", "false", "")
    assert lines["stop"] == ("list[str]", '["###"]', "")
    assert lines["kind"] == ("auto | math", '"auto"', "")


def test_of_a_config_of_trls_only_what_we_add_is_described() -> None:
    from trl import DPOConfig, SFTConfig

    @dataclass
    class OwnConfig(DPOConfig):
        beta: float = 0.1
        reward_shift_decay: float | None = None

    settings, parents = describe_settings((OtherSettings, OwnConfig, SFTConfig))
    assert {setting.name for setting in settings} == {"seed", "beta", "reward_shift_decay"}
    assert parents == ["trl.DPOConfig", "trl.SFTConfig"]


def test_trls_config_is_read_from_a_file_as_its_users_write_it(tmp_path: Path) -> None:
    from trl import DPOConfig

    path = tmp_path / "train.yaml"
    path.write_text(
        f"""
        output_dir: {tmp_path}
        use_cpu: true
        bf16: false
        learning_rate: 5e-6
        loss_type: [sigmoid, bco_pair, sft]
        loss_weights: [0.8, 0.2, 1]
        eval_strategy: no
        save_strategy: "no"
        lr_scheduler_type: cosine
        lr_scheduler_kwargs: {{num_cycles: 5e-1}}
        warmup_steps: 0.03
        gradient_checkpointing_kwargs: {{use_reentrant: false}}
        report_to: none
        max_length: null
        """
    )
    (config,) = read_settings("train", (DPOConfig,), ["--config", str(path), "--max-steps", "-1"])
    assert (config.learning_rate, config.warmup_steps, config.max_steps) == (0.000005, 0.03, -1)
    assert config.loss_type == ["sigmoid", "bco_pair", "sft"]
    assert config.loss_weights == [0.8, 0.2, 1.0]
    assert (config.eval_strategy.value, config.save_strategy.value) == ("no", "no")
    assert (config.lr_scheduler_type.value, config.lr_scheduler_kwargs) == ("cosine", {"num_cycles": 0.5})
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert (config.report_to, config.max_length) == ([], None)


def test_trls_config_takes_a_single_loss_and_tells_a_wrong_name_in_its_own_words(tmp_path: Path) -> None:
    from trl import DPOConfig, SFTConfig

    argv = ["--output-dir", str(tmp_path), "--use-cpu", "--bf16", "false"]
    (config,) = read_settings("train", (DPOConfig,), [*argv, "--loss-type", "ipo"])
    assert config.loss_type == ["ipo"]
    with pytest.raises(InputError, match="cosinus is not a valid SchedulerType"):
        read_settings("sft", (SFTConfig,), [*argv, "--lr-scheduler-type", "cosinus"])


def test_every_field_of_trls_configs_can_be_checked() -> None:
    from typing import get_type_hints

    from trl import DPOConfig, SFTConfig

    for hint in [*get_type_hints(DPOConfig).values(), *get_type_hints(SFTConfig).values()]:
        TypeAdapter(hint)
