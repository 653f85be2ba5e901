"""`mpo eval`: accuracies and paired differences against hand-made answers, and the whole verb on a tiny model."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_builders.records import InputError, Row, Verdict
from data_builders.shards import read_rows, write_rows
from mpo import evaluate
from mpo.evaluate import EvalConfig, run
from mpo.measures import bootstrap, compare, majority, pass_at


def answers(model: str, style: str, marks: dict[str, str]) -> list[Row]:
    """One answer per character of every source: `+` for a correct one, `-` for a wrong one, `?` for none."""
    verdicts = {"+": "correct", "-": "wrong", "?": "no_answer"}
    return [
        {"model": model, "style": style, "source": source, "id": f"{source}-{number}", "verdict": verdicts[mark]}
        for source, line in marks.items()
        for number, mark in enumerate(line)
    ]


TWO_MODELS = [
    *answers("SFT", "cot", {"sum": "++--", "count": "+-----"}),
    *answers("MPO", "cot", {"sum": "++++", "count": "-+++--"}),
    *answers("SFT", "direct", {"sum": "++?-", "count": "------"}),
    *answers("MPO", "direct", {"sum": "++--", "count": "------"}),
]


def by_place(rows: list[Row], value: str) -> dict[tuple[str, str, str], tuple[int, float]]:
    return {(row["model"], row["style"], row["source"]): (row["num"], round(row[value], 9)) for row in rows}


def test_accuracies_are_shares_of_correct_answers_in_all_and_by_source() -> None:
    evaluation = compare(TWO_MODELS, ["SFT", "MPO"], ["cot", "direct"])
    assert (evaluation["models"], evaluation["styles"]) == (["SFT", "MPO"], ["cot", "direct"])
    assert evaluation["num_questions"] == 10
    assert by_place(evaluation["accuracy"], "accuracy") == {
        ("SFT", "cot", "all"): (10, 0.3),
        ("MPO", "cot", "all"): (10, 0.7),
        ("SFT", "cot", "count"): (6, round(1 / 6, 9)),
        ("MPO", "cot", "count"): (6, 0.5),
        ("SFT", "cot", "sum"): (4, 0.5),
        ("MPO", "cot", "sum"): (4, 1.0),
        ("SFT", "direct", "all"): (10, 0.2),
        ("MPO", "direct", "all"): (10, 0.2),
        ("SFT", "direct", "count"): (6, 0.0),
        ("MPO", "direct", "count"): (6, 0.0),
        ("SFT", "direct", "sum"): (4, 0.5),
        ("MPO", "direct", "sum"): (4, 0.5),
    }


def test_differences_are_to_the_first_model() -> None:
    differences = compare(TWO_MODELS, ["SFT", "MPO"], ["cot", "direct"])["differences"]
    assert {row["baseline"] for row in differences} == {"SFT"}
    assert by_place(differences, "difference") == {
        ("MPO", "cot", "all"): (10, 0.4),
        ("MPO", "cot", "count"): (6, round(2 / 6, 9)),
        ("MPO", "cot", "sum"): (4, 0.5),
        ("MPO", "direct", "all"): (10, 0.0),
        ("MPO", "direct", "count"): (6, 0.0),
        ("MPO", "direct", "sum"): (4, 0.0),
    }


def test_differences_are_paired_by_question_and_not_by_place_in_the_file() -> None:
    same = answers("A", "cot", {"sum": "+-" * 200}) + answers("B", "cot", {"sum": "+-" * 200})
    (all_, _) = compare(same[:400] + same[:399:-1], ["A", "B"], ["cot"])["differences"]
    assert (all_["difference"], all_["low"], all_["high"]) == (0.0, 0.0, 0.0)
    opposite = answers("A", "cot", {"sum": "+-" * 200}) + answers("B", "cot", {"sum": "-+" * 200})
    (all_, _) = compare(opposite, ["A", "B"], ["cot"])["differences"]
    assert all_["difference"] == 0.0
    assert all_["high"] == pytest.approx(1.96 / math.sqrt(400), abs=0.01)  # differences of +-1: deviation 1


def test_one_model_has_nothing_to_be_compared_with() -> None:
    evaluation = compare(answers("SFT", "cot", {"": "+-"}), ["SFT"], ["cot"])
    assert evaluation["differences"] == []
    assert [row["source"] for row in evaluation["accuracy"]] == ["all", "(no source)"]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_the_interval_of_many_values_is_close_to_the_normal_approximation(share: float) -> None:
    values = np.arange(1000) < 1000 * share
    interval = bootstrap(values.astype(float))
    reach = 1.96 * math.sqrt(share * (1 - share) / 1000)
    assert interval["low"] == pytest.approx(share - reach, abs=0.1 * reach)
    assert interval["high"] == pytest.approx(share + reach, abs=0.1 * reach)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_the_interval_of_constant_values_is_the_value(value: float) -> None:
    assert bootstrap(np.full(37, value)) == {"low": value, "high": value}
    assert bootstrap(np.array([value])) == {"low": value, "high": value}


def test_the_interval_depends_on_the_seed_and_not_on_the_order() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, 0) == bootstrap(values[::-1], 0)
    assert bootstrap(values, 0) != bootstrap(values, 1)


@pytest.fixture
def config(task: Path, tmp_path: Path) -> EvalConfig:
    """Two names for one model, twelve questions in three parts, two ways to ask."""
    return EvalConfig(
        models=[f"SFT={task / 'model'}", f"MPO={task / 'model'}"],
        questions=str(task / "questions.jsonl"),
        output=str(tmp_path / "evaluation"),
        image_root=str(task),
        max_new_tokens=4,
        shard_size=5,
        device="cpu",
    )


def content(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_verb_writes_answers_and_their_evaluation(config: EvalConfig) -> None:
    summary = run(config)
    output = Path(config.output)
    rows = list(read_rows(output / "answers.jsonl", Verdict))
    assert len(rows) == 2 * 2 * 12
    assert [(rows[i]["model"], rows[i]["style"]) for i in (0, 12, 24, 36)] == [
        ("SFT", "final_answer"),
        ("SFT", "direct"),
        ("MPO", "final_answer"),
        ("MPO", "direct"),
    ]
    assert {row["sampler"]["temperature"] for row in rows} == {0.0}
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    assert list(evaluation) == [
        *("models", "styles", "num_questions", "num_samples", "accuracy", "differences", "samples")
    ]
    assert evaluation["num_questions"] == 12
    assert len(evaluation["accuracy"]) == 2 * 4 * 2
    assert set(evaluation["accuracy"][0]) == {"model", "style", "source", "num", "accuracy", "low", "high"}
    compared = {"model", "style", "source", "num", "baseline", "difference", "low", "high"}
    assert [set(row) for row in evaluation["differences"]] == [compared] * 8
    assert {row["source"]: row["num"] for row in evaluation["accuracy"]} == {
        "all": 12,
        "count": 4,
        "largest": 4,
        "sum": 4,
    }
    assert all(row["difference"] == row["low"] == row["high"] == 0.0 for row in evaluation["differences"])
    assert summary.columns == ["measure", "prompt", "source", "SFT", "MPO", "MPO - SFT"]
    assert [row[1:3] for row in summary.rows][:2] == [["final_answer", "all"], ["final_answer", "count"]]
    assert summary.rows[0][-1] == "+0.0 (+0.0 to +0.0)"
    assert summary.next_command == f"mpo report --evaluation {config.output} --output report.html"


def test_parts_that_are_there_are_not_made_again(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    before = content(config.output)
    for name in ("answers.jsonl", "evaluation.json", "parts/MPO-direct/00001.jsonl"):
        (Path(config.output) / name).unlink()
    asked, sample = [], evaluate.sample_responses
    monkeypatch.setattr(
        evaluate,
        "sample_responses",
        lambda rows, *rest: asked.extend(row["id"] for row in rows) or sample(rows, *rest),
    )
    run(config)
    assert asked == [f"known-{number:05d}" for number in range(5, 10)]
    assert content(config.output) == before


def test_a_model_is_loaded_once_for_all_its_parts(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], evaluate.open_sampler
    monkeypatch.setattr(evaluate, "open_sampler", lambda own: loaded.append(own.model) or load(own))
    run(config)
    assert loaded == [entry.partition("=")[2] for entry in config.models]


def test_a_finished_evaluation_loads_no_model(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate, "open_sampler", load)
    assert run(replace(config, seed=1)).rows


@pytest.mark.parametrize(
    "models",
    [["runs/a/mpo", "runs/b/mpo"], ["A=runs/a", "A=runs/b"], ["mpo=runs/a", "runs/mpo"], ["runs/a", "runs/a"]],
)
def test_two_models_of_one_name_are_refused(config: EvalConfig, models: list[str]) -> None:
    with pytest.raises(InputError, match="two models have the same name in .*: write them as `Name=path`"):
        run(replace(config, models=models))
    assert not Path(config.output).exists()


def test_a_model_without_a_name_is_called_by_its_folder(config: EvalConfig, task: Path) -> None:
    summary = run(replace(config, models=[str(task / "model")], prompts=["direct"]))
    assert summary.columns == ["measure", "prompt", "source", "model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "question 'known-00003' has no answer: accuracy can only be measured where it is known"),
        ({"id": "known-00001"}, "two questions have the id 'known-00001': models are compared by id"),
        ({"images": ["images/none.png"]}, r"row 'known-00003': image 'images/none\.png' does not exist"),
        ({"question": ""}, r"line 4: `question` is ''"),
    ],
)
def test_questions_that_cannot_be_evaluated_are_refused_before_anything_is_written(
    config: EvalConfig, tmp_path: Path, change: Row, message: str
) -> None:
    rows = list(read_rows(Path(config.questions)))
    rows[3].update(change)
    write_rows(tmp_path / "data" / "questions.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run(replace(config, questions=str(tmp_path / "data" / "questions.jsonl")))
    assert not Path(config.output).exists()


def test_an_unknown_prompt_style_is_refused_before_anything_is_written(config: EvalConfig) -> None:
    with pytest.raises(InputError, match="there is no prompt style 'cot'"):
        run(replace(config, prompts=["direct", "cot"]))
    assert not Path(config.output).exists()


def test_a_model_that_is_not_there_is_refused(config: EvalConfig) -> None:
    with pytest.raises(InputError, match="there is no model folder /no/model"):
        run(replace(config, models=["/no/model"]))


@pytest.mark.parametrize("change", [{"max_new_tokens": 5}, {"prompts": ["direct"]}])
def test_another_setting_wants_another_folder(config: EvalConfig, change: dict[str, object]) -> None:
    run(replace(config, models=config.models[:1], prompts=["direct", "plain"]))
    with pytest.raises(InputError, match="was filled with other settings"):
        run(replace(config, **{"models": config.models[:1], "prompts": ["direct", "plain"], **change}))


def vote(*predictions: str | None, right: str) -> list[Row]:
    """Answers to one question; those that are `right` are correct."""
    verdicts = {right: "correct", None: "no_answer"}
    return [{"prediction": text, "verdict": verdicts.get(text, "wrong")} for text in predictions]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (vote("7", "7", "8", right="7"), 1.0),
        (vote("7", "8", "8", right="7"), 0.0),
        (vote("7", "8", right="7"), 0.5),  # a tie
        (vote("1/2", "0.5", "3", "4", right="3"), 0.0),  # two ways to write one wrong answer vote together
        (vote("7", None, None, None, right="7"), 1.0),  # no answer is no vote
        (vote(None, None, right="7"), 0.0),
    ],
)
def test_the_majority_decides_by_what_answers_mean(answers: list[Row], expected: float) -> None:
    assert majority(answers) == expected


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer() -> None:
    for num, num_correct, k in ((6, 2, 3), (5, 0, 2), (5, 5, 2), (4, 3, 2), (8, 1, 8)):
        marks = [True] * num_correct + [False] * (num - num_correct)
        draws = list(combinations(marks, k))
        assert pass_at(k, num, num_correct) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_several_answers_give_mean_accuracy_pass_at_k_and_the_majority_vote() -> None:
    def answered(model: str, question: str, marks: str) -> list[Row]:
        kinds = {"+": ("correct", "7"), "-": ("wrong", "8"), "?": ("no_answer", None)}
        fields = [dict(zip(("verdict", "prediction"), kinds[mark], strict=True)) for mark in marks]
        return [{"model": model, "style": "cot", "source": "sum", "id": question, **row} for row in fields]

    rows = answered("A", "q", "++--") + answered("A", "r", "-???")
    rows += answered("B", "q", "+++-") + answered("B", "r", "+---")
    evaluation = compare(rows, ["A", "B"], ["cot"])
    assert evaluation["num_samples"] == 4
    assert [row["accuracy"] for row in evaluation["accuracy"]] == [0.25, 0.5, 0.25, 0.5]
    found = {(row["measure"], row["model"]): row for row in evaluation["samples"] if row["source"] == "all"}
    values = {key: round(row["value"], 9) for key, row in found.items()}
    assert values == {
        ("pass@2", "A"): round((1 - 1 / 6 + 0) / 2, 9),
        ("pass@2", "B"): round((1 + 1 / 2) / 2, 9),
        ("pass@4", "A"): 0.5,
        ("pass@4", "B"): 1.0,
        ("majority@4", "A"): 0.25,
        ("majority@4", "B"): 0.5,
    }
    assert found["pass@4", "B"]["difference"]["value"] == 0.5
    assert "difference" not in found["pass@4", "A"]
    json.dumps(evaluation)


def test_the_verb_draws_several_answers_and_shows_their_measures(config: EvalConfig, task: Path) -> None:
    several = replace(config, models=[str(task / "model")], prompts=["direct"], num_samples=3, max_new_tokens=4)
    summary = run(several)
    assert list(dict.fromkeys(row[0] for row in summary.rows)) == ["accuracy", "pass@2", "pass@3", "majority@3"]
    rows = list(read_rows(Path(config.output) / "answers.jsonl"))
    assert len(rows) == 3 * len({row["id"] for row in rows})
    assert {row["sampler"]["temperature"] for row in rows} == {1.0}
    assert any("VLMEvalKit" in note and "lmms-eval" in note for note in summary.notes)
