"""`mpo dropout-ntp`: where a response is cut, what the model is asked, and which continuations make no pair."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_builders.dropout_ntp import DropoutNTPConfig, continue_rows, cut_response, run
from data_builders.engine import drop_reasons
from data_builders.records import InputError, Pair, Row
from data_builders.samplers import Completion, Request, SamplingSettings
from data_builders.shards import read_rows, read_stage, write_rows

SETTINGS = SamplingSettings(max_new_tokens=9, seed=4)
CONFIG = DropoutNTPConfig(model="m", responses="r", output="o")


class Inventor:
    """Goes on from every prefix with the same text, or fails; a token ends behind every word."""

    name = "m"

    def __init__(self, continuation: str = " and a dog", error: str | None = None) -> None:
        self.continuation, self.error = continuation, error
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        self.requests += requests
        reason = "error" if self.error else "stop"
        return [[Completion(request.prefix + self.continuation, reason, self.error)] * num for request in requests]

    def token_ends(self, text: str) -> list[int]:
        return [end for end in range(1, len(text) + 1) if end == len(text) or text[end] == " "]


def response(text: str | None = "one two three four", **more: object) -> Row:
    row = {
        "id": "q",
        "images": ["a.png"],
        "question": "What?",
        "answer": None,
        "source": "open",
        "prompt": "What? Say.",
    }
    return {**row, "response": text, "finish_reason": "stop", "sampler": {"model": "m", "index": 2}, **more}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one two three four", "one two"),
        ("one two three four five", "one two"),
        ("one, two. three", "one,"),
        ("  one   two\n\nthree  four  ", "  one   two"),
        ("图中有三只猫", "图中有"),
        ("图中有三只猫。", "图中有"),
        ("이 그림에는 고양이 세 마리가 있다", "이 그림에는 고양이"),
        ("ねこが三匹います", "ねこが三"),
        ("カメラの前", "カメ"),
        ("a图b中", "a图"),
        ("Größe und Maß", "Größe"),
        ("x", ""),
        ("图", ""),
        ("", ""),
        ("   ", ""),
    ],
)
def test_words_chinese_and_japanese_characters_and_punctuation_are_what_is_cut_at(text: str, kept: str) -> None:
    assert cut_response(text) == kept


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.0, ""), (0.2, ""), (0.25, "one"), (0.5, "one two"), (0.74, "one two"), (0.75, "one two three")],
)
def test_the_ratio_is_the_share_that_is_kept_rounded_down(ratio: float, kept: str) -> None:
    assert cut_response("one two three four", ratio=ratio) == kept
    assert cut_response("one two three four", ratio=ratio, ends=[3, 7, 13, 18]) == kept


def test_the_tokens_of_a_model_come_before_words() -> None:
    assert cut_response("unbelievable", ends=[2, 9, 10, 12]) == "unbelieva"[:9]
    assert cut_response("图猫", ends=[1, 1, 1, 2, 2, 2]) == "图"
    assert cut_response("one two", ends=[]) == ""
    assert cut_response("one two", ends=[7]) == ""


@pytest.mark.parametrize(
    "text", ["one two three four", "图中有三只猫。", "ねこが three 匹います!", " a  b\nc ", "e\u0301té 🐈‍⬛"]
)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.99])
def test_what_is_kept_is_the_beginning_and_ends_without_a_space(text: str, ratio: float) -> None:
    kept = cut_response(text, ratio=ratio)
    assert text.startswith(kept)
    assert kept == kept.rstrip()
    assert len(kept) < len(text)


def test_a_pair_prefers_the_response_to_what_the_model_made_up() -> None:
    (pair,), dropped = continue_rows([response()], Inventor(), SETTINGS, CONFIG)
    assert dropped == []
    assert pair == {
        "id": "q#ntp2",
        "question_id": "q",
        "images": ["a.png"],
        "question": "What?",
        "prompt": "What? Say.",
        "chosen": "one two three four",
        "rejected": "one two and a dog",
        "kind": "dropout_ntp",
        "source": "open",
        "answer": None,
        "chosen_meta": {"sampler": {"model": "m", "index": 2}, "finish_reason": "stop"},
        "rejected_meta": {
            "sampler": {"model": "m", **SETTINGS.provenance()},
            "finish_reason": "stop",
            "ratio": 0.5,
            "with_image": False,
            "prefix_characters": 7,
        },
    }
    assert Pair.model_validate(pair)


def test_the_model_goes_on_without_the_image() -> None:
    inventor = Inventor()
    continue_rows([response()], inventor, SETTINGS, CONFIG)
    assert inventor.requests == [Request("What? Say.", (), "one two")]


def test_a_response_is_cut_at_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    inventor = Inventor()
    monkeypatch.setattr(inventor, "token_ends", lambda text: list(range(1, len(text) + 1)))
    continue_rows([response()], inventor, SETTINGS, CONFIG)
    assert [request.prefix for request in inventor.requests] == ["one two t"]


def test_as_a_control_the_model_goes_on_with_the_image() -> None:
    inventor = Inventor()
    (pair,), _ = continue_rows([response()], inventor, SETTINGS, replace(CONFIG, with_image=True))
    assert inventor.requests == [Request("What? Say.", ("a.png",), "one two")]
    assert pair["rejected_meta"]["with_image"] is True


def test_with_ratio_0_the_model_starts_anew() -> None:
    inventor = Inventor("A dog.")
    (pair,), _ = continue_rows([response()], inventor, SETTINGS, replace(CONFIG, ratio=0.0))
    assert inventor.requests == [Request("What? Say.", (), "")]
    assert (pair["chosen"], pair["rejected"]) == ("one two three four", "A dog.")
    assert (
        continue_rows([response("Yes")], inventor, SETTINGS, replace(CONFIG, ratio=0.0))[0][0]["rejected"] == "A dog."
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (response(answer="4"), "answer known"),
        (response(answer=""), "answer known"),
        (response(None, finish_reason="error", error="server gone"), "failed"),
        (response("one two three four", finish_reason="error", error="image token"), "failed"),
        (response(""), "failed"),
        (response(finish_reason="length"), "cut off"),
        (response("Yes"), "too short"),
        (response(" \n "), "failed"),
        (response("\n Yes"), "too short"),
    ],
)
def test_a_response_that_cannot_be_used_is_left_out_with_the_reason_and_costs_nothing(row: Row, reason: str) -> None:
    inventor = Inventor()
    assert continue_rows([row], inventor, SETTINGS, CONFIG) == ([], [{"id": "q", "reason": reason}])
    assert inventor.requests == []


@pytest.mark.parametrize(
    ("inventor", "reason"),
    [
        (Inventor(""), "continuation empty"),
        (Inventor(" \n"), "continuation empty"),
        (Inventor(" three four"), "continuation identical"),
        (Inventor(" three four\n"), "continuation identical"),
        (Inventor("  Three, FOUR!"), "continuation too similar"),
        (Inventor(" and", error="the response contains an image token"), "continuation failed"),
    ],
)
def test_a_continuation_that_cannot_be_used_is_left_out_with_the_reason(inventor: Inventor, reason: str) -> None:
    assert continue_rows([response()], inventor, SETTINGS, CONFIG) == ([], [{"id": "q", "reason": reason}])


def test_how_similar_a_continuation_may_be_is_a_setting() -> None:
    text = "one two three four five six seven eight"
    close = Inventor(" five six seven nine")  # one of the two trigrams is shared
    for limit, num_pairs in ((0.4, 0), (0.5, 1)):
        pairs, _ = continue_rows([response(text)], close, SETTINGS, replace(CONFIG, max_similarity=limit))
        assert len(pairs) == num_pairs
    with pytest.raises(InputError, match="`max_similarity` must be between 0 and 1, got 1.5"):
        run(replace(CONFIG, max_similarity=1.5))


def test_every_response_is_either_a_pair_or_left_out() -> None:
    rows = [response(id="a"), response("Yes", id="b"), response(id="c", answer="4"), response("x y z", id="d")]
    pairs, dropped = continue_rows(rows, Inventor(), SETTINGS, CONFIG)
    assert [pair["question_id"] for pair in pairs] == ["a", "d"]
    assert [row["id"] for row in dropped] == ["b", "c"]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("one two three four", "one two and a dog"),
        ("x y z", "x and a dog"),
    ]


def test_responses_to_questions_with_an_answer_are_taken_on_demand() -> None:
    (pair,), _ = continue_rows([response(answer="4")], Inventor(), SETTINGS, replace(CONFIG, answered_too=True))
    assert pair["answer"] == "4"


def test_responses_to_one_question_make_pairs_of_different_names() -> None:
    rows = [response(sampler={"index": index}) for index in range(3)]
    pairs, _ = continue_rows(rows, Inventor(), SETTINGS, CONFIG)
    assert [pair["id"] for pair in pairs] == ["q#ntp0", "q#ntp1", "q#ntp2"]


@pytest.fixture
def config(task: Path, tmp_path: Path) -> DropoutNTPConfig:
    """Eight responses to four open questions; one of them is too short, one cut off."""
    questions = list(read_rows(task / "open.jsonl"))
    more = {"prompt": "What is the sum of the digits?", "finish_reason": "stop"}
    text = "top-left is 3. top-right is 5, 3 + 5 = 8.  Final answer: 8"
    rows = [
        {**row, **more, "response": f"{text}{index}", "sampler": {"model": "m", "index": index}}
        for row in questions
        for index in range(2)
    ]
    rows[1]["response"], rows[2]["finish_reason"] = "8", "length"
    write_rows(tmp_path / "responses" / "00000.jsonl", rows)
    return DropoutNTPConfig(
        model=str(task / "model"),
        responses=str(tmp_path / "responses"),
        output=str(tmp_path / "pairs"),
        image_root=str(task),
        max_new_tokens=6,
        shard_size=3,
        device="cpu",
    )


def content(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.jsonl")}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_verb_makes_pairs_whose_sides_share_the_kept_part(config: DropoutNTPConfig, ratio: float) -> None:
    summary = run(replace(config, ratio=ratio))
    pairs = list(read_stage(Path(config.output), Pair))
    assert len(pairs) == 6
    for pair in pairs:
        kept = pair["chosen"][: pair["rejected_meta"]["prefix_characters"]]
        assert pair["rejected"].startswith(kept)
        assert ratio / 2 < len(kept) / len(pair["chosen"]) < ratio + 0.15
        assert pair["rejected"] != pair["chosen"]
    assert sum(int(count) for _, count in summary.rows) == 6
    assert drop_reasons(Path(config.output)) == {"too short": 1, "cut off": 1}
    assert summary.notes[0].startswith("Left out: 1 ")
    assert f"mpo train --data {config.output} --model_name_or_path {config.model}" in summary.next_command


def test_a_shard_that_is_gone_is_made_again_byte_for_byte(config: DropoutNTPConfig) -> None:
    run(config)
    before = content(config.output)
    assert sorted(before) == [
        "00000.jsonl",
        "00001.jsonl",
        "00002.jsonl",
        "dropped/00000.jsonl",
    ]
    (Path(config.output) / "00001.jsonl").unlink()
    run(config)
    assert content(config.output) == before


def test_without_the_image_no_image_is_looked_at(config: DropoutNTPConfig, tmp_path: Path) -> None:
    run(replace(config, image_root=str(tmp_path / "nowhere")))
    assert len(list(read_stage(Path(config.output)))) == 6


def test_with_the_image_a_missing_one_is_refused_before_anything_is_written(
    config: DropoutNTPConfig, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "images" / "open-00000.png")
    with pytest.raises(InputError, match=r"row 'open-0000\d': image 'images/open-0000\d\.png' does not exist"):
        run(replace(config, with_image=True, image_root=str(tmp_path)))
    assert not Path(config.output).exists()


def test_with_the_image_the_continuations_are_others(config: DropoutNTPConfig, tmp_path: Path) -> None:
    run(config)
    run(replace(config, with_image=True, output=str(tmp_path / "control")))
    without, seen = (list(read_stage(Path(folder))) for folder in (config.output, tmp_path / "control"))
    assert [pair["chosen"] for pair in seen] == [pair["chosen"] for pair in without]
    assert [pair["rejected"] for pair in seen] != [pair["rejected"] for pair in without]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(config: DropoutNTPConfig, ratio: float) -> None:
    with pytest.raises(InputError, match=f"`ratio` must be at least 0 and below 1, got {ratio}"):
        run(replace(config, ratio=ratio))
    assert not Path(config.output).exists()


def test_broken_responses_are_refused_before_anything_is_written(config: DropoutNTPConfig) -> None:
    write_rows(Path(config.responses) / "00001.jsonl", [{"id": "q", "question": "?"}])
    with pytest.raises(InputError, match=r"00001\.jsonl, line 1: `prompt` is missing"):
        run(config)
    assert not Path(config.output).exists()


def test_a_model_that_was_trained_further_does_not_go_on_with_another_ones_pairs(
    config: DropoutNTPConfig, tmp_path: Path
) -> None:
    model = shutil.copytree(config.model, tmp_path / "model")
    run(replace(config, model=str(model)))
    text = (model / "generation_config.json").read_text(encoding="utf-8")
    (model / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"was filled with other settings \(inputs: then"):
        run(replace(config, model=str(model)))


def test_another_setting_wants_another_folder(config: DropoutNTPConfig) -> None:
    run(config)
    for change in ({"ratio": 0.25}, {"seed": 1}, {"with_image": True}, {"answered_too": True}):
        with pytest.raises(InputError, match=f"other settings \\({next(iter(change))}: then"):
            run(replace(config, **change))
