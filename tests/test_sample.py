"""`mpo sample`: what stands in a response row, what is refused before any work, and going on after a stop."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_builders.prompts import prompt_style
from data_builders.records import InputError, Response
from data_builders.sample import SampleConfig, run, sample_responses
from data_builders.samplers import Completion, Request, SamplingSettings
from data_builders.shards import read_rows, read_stage, write_rows

SETTINGS = SamplingSettings(temperature=0.7, top_p=0.9, top_k=50, max_new_tokens=12, seed=3)


class Parrot:
    """Answers with the prompt and a number; every second answer to a question about rain fails."""

    name = "parrot"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        self.requests += requests
        return [[self._answer(request, number) for number in range(num)] for request in requests]

    def _answer(self, request: Request, number: int) -> Completion:
        if "rain" in request.prompt and number % 2:
            return Completion("", "error", "server gone")
        return Completion(f"{request.prompt} {number}", "stop")

    def token_ends(self, text: str) -> list[int]:
        return list(range(1, len(text) + 1))


@pytest.fixture
def config(task: Path, tmp_path: Path) -> SampleConfig:
    """Twelve questions, two responses each, five questions to a shard."""
    return SampleConfig(
        model=str(task / "model"),
        questions=str(task / "questions.jsonl"),
        image_root=str(task),
        output=str(tmp_path / "responses"),
        num_responses=2,
        max_new_tokens=5,
        shard_size=5,
        device="cpu",
    )


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_response_keeps_its_question_and_says_how_it_was_made() -> None:
    question = {"id": "q-1", "images": ["a.png"], "question": "How many?", "answer": "3", "level": "easy"}
    style = prompt_style("direct")
    first, second = sample_responses([question], Parrot(), style, 2, SETTINGS)
    prompt = "How many?\nAnswer with a single word, number or letter."
    assert first == {
        "id": "q-1",
        "images": ["a.png"],
        "question": "How many?",
        "answer": "3",
        "level": "easy",
        "prompt": prompt,
        "response": f"{prompt} 0",
        "finish_reason": "stop",
        "sampler": {
            "model": "parrot",
            "prompt": f"direct@{style.version}",
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 50,
            "max_new_tokens": 12,
            "seed": 3,
            "index": 0,
        },
    }
    assert second["sampler"] == {**first["sampler"], "index": 1}


def test_the_sampler_is_given_the_prompt_and_the_images() -> None:
    parrot = Parrot()
    questions = [{"id": "a", "question": "Why?", "images": ["x.png", "y.png"]}, {"id": "b", "question": "Who?"}]
    sample_responses(questions, parrot, prompt_style("plain"), 1, SETTINGS)
    assert parrot.requests == [Request("Why?", ("x.png", "y.png")), Request("Who?", ())]


def test_a_failed_response_is_a_row_with_its_error() -> None:
    rows = sample_responses([{"id": "q", "question": "rain?"}], Parrot(), prompt_style("plain"), 2, SETTINGS)
    assert [(row["finish_reason"], row.get("error")) for row in rows] == [("stop", None), ("error", "server gone")]


def test_responses_stand_in_the_order_of_the_questions() -> None:
    questions = [{"id": str(number), "question": f"{number}?"} for number in range(3)]
    rows = sample_responses(questions, Parrot(), prompt_style("plain"), 2, SETTINGS)
    assert [row["response"] for row in rows] == ["0? 0", "0? 1", "1? 0", "1? 1", "2? 0", "2? 1"]


def test_the_verb_writes_every_response_and_counts_them(config: SampleConfig) -> None:
    summary = run(config)
    rows = list(read_stage(Path(config.output), Response))
    questions = list(read_rows(Path(config.questions)))
    assert [row["id"] for row in rows] == [question["id"] for question in questions for _ in range(2)]
    assert sorted(content(config.output)) == ["00000.jsonl", "00001.jsonl", "00002.jsonl", "settings.json"]
    assert {row["sampler"]["model"] for row in rows} == {config.model}
    assert [row["images"] for row in rows[::2]] == [question["images"] for question in questions]
    assert summary.columns == ["source", "responses", "finished", "cut off", "failed"]
    assert [row[:2] for row in summary.rows] == [["count", "8"], ["largest", "8"], ["sum", "8"]]
    assert all(int(finished) + int(cut) == 8 for _, _, finished, cut, _ in summary.rows)
    assert summary.next_command == f"mpo judge --responses {config.output} --output verdicts"


def test_a_shard_that_is_gone_is_made_again_byte_for_byte(config: SampleConfig) -> None:
    run(config)
    before = content(config.output)
    (Path(config.output) / "00001.jsonl").unlink()
    run(config)
    assert content(config.output) == before


def test_the_same_command_makes_the_same_files_elsewhere_and_another_seed_others(
    config: SampleConfig, tmp_path: Path
) -> None:
    outputs = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        run(replace(config, output=str(tmp_path / name), seed=seed))
        outputs[name] = content(str(tmp_path / name))["00000.jsonl"]
    assert outputs["a"] == outputs["b"] != outputs["c"]


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"prompt": "direct"}, {"num_responses": 3}, {"shard_size": 4}, {"seed": 1}]
)
def test_a_folder_is_only_filled_with_one_setting(config: SampleConfig, change: dict[str, object]) -> None:
    run(config)
    before = content(config.output)
    with pytest.raises(InputError, match=f"was filled with other settings \\({next(iter(change))}: then"):
        run(replace(config, **change))
    assert content(config.output) == before


def test_a_model_that_was_trained_further_does_not_go_on_with_another_ones_responses(
    config: SampleConfig, tmp_path: Path
) -> None:
    model = shutil.copytree(config.model, tmp_path / "model")
    config = replace(config, model=str(model))
    run(config)
    text = (model / "generation_config.json").read_text(encoding="utf-8")
    (model / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="was filled with other settings"):
        run(config)


def broken_config(config: SampleConfig, folder: Path, name: str) -> SampleConfig:
    """Settings of which one thing is wrong."""
    rows = list(read_rows(Path(config.questions)))
    questions = folder / "broken" / "questions.jsonl"
    if name == "missing image":
        write_rows(questions, [*rows[:-1], {**rows[-1], "images": ["images/none.png"]}])
    elif name == "image outside":
        write_rows(questions, [*rows[:-1], {**rows[-1], "images": ["../secret.png"]}])
    elif name == "broken line":
        write_rows(questions, rows)
        questions.write_text(questions.read_text(encoding="utf-8") + '{"id": "q', encoding="utf-8")
    elif name == "missing field":
        write_rows(questions, [*rows, {"id": "q"}])
    elif name == "no rows":
        write_rows(questions, [])
    return replace(config, questions=str(questions))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing image", r"row 'known-00011': image 'images/none\.png' does not exist under the image root"),
        ("image outside", r"row 'known-00011': image '\.\./secret\.png' is outside the image root"),
        ("broken line", r"questions\.jsonl, line 13: not a JSON object"),
        ("missing field", r"questions\.jsonl, line 13: `question` is missing"),
        ("no rows", r"questions\.jsonl holds no row"),
        ("missing file", r"questions\.jsonl does not exist"),
    ],
)
def test_broken_questions_are_refused_before_anything_is_written(
    config: SampleConfig, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(broken_config(config, tmp_path, name))
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no-model"}, "there is no model folder no-model"),
        ({"prompt": "cot"}, "there is no prompt style 'cot': choose one of boxed, direct"),
        ({"num_responses": 0}, "`num_responses` must be at least 1, got 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"image_root": "no-folder"}, r"does not exist under the image root no-folder\. Is `image_root` right"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    config: SampleConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(replace(config, **change))
    assert not Path(config.output).exists()


def test_the_folder_of_the_questions_is_not_taken_for_output(config: SampleConfig, task: Path) -> None:
    with pytest.raises(InputError, match="Give an output folder of its own"):
        run(replace(config, output=str(task)))
    assert not (task / "settings.json").exists()


def test_questions_without_pictures_or_source_are_answered_too(config: SampleConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "q.jsonl", [{"id": "a", "question": "2 + 2?"}, {"id": "b", "question": "?", "source": "x"}])
    summary = run(replace(config, questions=str(tmp_path / "q.jsonl")))
    assert [row[:2] for row in summary.rows] == [["(no source)", "2"], ["x", "2"]]
