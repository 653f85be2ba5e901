"""`mpo filter`: what is left out and why, who is asked about what, and that nothing is lost whatever happens."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulty_server import Body, FaultyServer, choice, question, refuses
from killed_runs import run_until_killed
from PIL import Image

from data_builders.engine import drop_reasons
from data_builders.filter import FilterConfig, filter_rows, run
from data_builders.filtering.counts import removal_table, table_cells, total_removal
from data_builders.filtering.judging import (
    filter_prompt,
    judge_conversations,
    prompts_for,
    read_verdict,
    yes_probability,
)
from data_builders.filtering.rules import RuleOptions, image_fault, size_fault, text_fault
from data_builders.hf_sampler import HFSampler
from data_builders.records import Conversation, InputError, Row
from data_builders.samplers import Completion, Request, SamplingSettings
from data_builders.shards import read_rows, read_stage, write_rows

ROOT = Path(__file__).parent.parent
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=16, top_logprobs=20)
LOOP = 12 * "We look at the picture again. "


class Judge:
    """Says Yes to whatever mentions a cat, or the replies that it was given, and keeps what it was asked."""

    name = "judge-7b"

    def __init__(self, *replies: str | Completion) -> None:
        self.replies, self.requests = list(replies), []

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        assert (num, settings.temperature, settings.top_logprobs) == (1, 0.0, 20)
        self.requests += requests
        replies = self.replies or ["Yes" if "cat" in shown(request) else "No" for request in requests]
        return [[reply if isinstance(reply, Completion) else Completion(reply, "stop")] for reply in replies]

    def token_ends(self, text: str) -> list[int]:
        return list(range(1, len(text) + 1))


def shown(request: Request) -> str:
    """The conversation in what a judge is asked."""
    return request.prompt.partition("<conversation>\n")[2].partition("</conversation>")[0]


def sure(text: str, yes: float, no: float) -> Completion:
    """A reply with P(Yes) and P(No) of its first token."""
    return Completion(text, "stop", first_logps=(("Yes", math.log(yes)), ("No", math.log(no))))


def conversation(name: str, *texts: str, **more: object) -> Row:
    """Turns of a user and an assistant."""
    said = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"id": name, "images": [], "messages": said, **more}


CAT = conversation("cat", "What is it?", "A cat.", source="pets", category="General")
DOG = conversation("dog", "What is it?", "A dog.", source="pets", category="General")
CHART = conversation("chart", "How many?", "3", source="charts", category="Chart", kept={"by": "the user"})
EMPTY = conversation("empty", "How many?", " \n", source="charts", category="Chart")
LOOPING = conversation("loop", "Why?", LOOP, source="loops")


def config_of(**settings: object) -> FilterConfig:
    return FilterConfig(**{"conversations": "c", "output": "o", **settings})


@pytest.fixture
def config(tmp_path: Path) -> FilterConfig:
    """Five conversations in two shards."""
    write_rows(tmp_path / "in" / "00000.jsonl", [CAT, DOG, CHART])
    write_rows(tmp_path / "in" / "00001.jsonl", [EMPTY, LOOPING])
    return config_of(conversations=str(tmp_path / "in"), output=str(tmp_path / "out"), shard_size=2)


def content(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.json*")}


def aside(folder: str | Path) -> list[Row]:
    return [row for path in sorted((Path(folder) / "dropped").glob("*.jsonl")) for row in read_rows(path)]


# The table

BEFORE = {
    "OCR": 1_104_960, "Chart": 7_326_189, "Caption": 244_874, "Math": 590_894, "Other": 1_315_039,
    "GeneralQA": 1_726_180,
}  # fmt: skip
AFTER = {
    "OCR": 498_337, "Chart": 3_782_029, "Caption": 199_853, "Math": 518_393, "Other": 1_178_275,
    "GeneralQA": 1_584_308,
}  # fmt: skip


def test_the_published_counts_give_the_published_rates() -> None:
    rates = {removal["category"]: table_cells(removal)[-1] for removal in removal_table(BEFORE, AFTER)}
    assert rates == {
        "OCR": "54.9%", "Chart": "48.4%", "Caption": "18.4%", "Math": "12.3%", "Other": "10.4%", "GeneralQA": "8.2%",
    }  # fmt: skip
    assert table_cells(total_removal(BEFORE, AFTER)) == ["all", "12,308,136", "7,761,195", "36.9%"]


def test_a_category_of_which_nothing_or_everything_is_left_has_its_line() -> None:
    assert removal_table({"a": 4, "b": 2, "c": 0}, {"b": 2}) == [
        {"category": "a", "before": 4, "after": 0, "removed": 4, "removed_share": 1.0},
        {"category": "b", "before": 2, "after": 2, "removed": 0, "removed_share": 0.0},
        {"category": "c", "before": 0, "after": 0, "removed": 0, "removed_share": 0.0},
    ]


# Rules about texts


@pytest.mark.parametrize(
    ("texts", "limits", "reason"),
    [
        (("?", "A cat."), {}, None),
        (("?", ""), {}, "an answer is empty"),
        (("?", "A cat.", "And?", " \n"), {}, "an answer is empty"),
        (("?",), {}, "an answer is empty"),
        (("", "A cat."), {}, None),
        (("?", ""), {"drop_empty": False}, None),
        (("?", "A cat."), {"min_words": 2}, None),
        (("?", "A cat."), {"min_words": 3}, "answers too short"),
        (("?", "A cat.", "?", "Two."), {"min_words": 3}, None),
        (("?", "一只猫。"), {"min_words": 3}, None),
        (("?", "一只猫。"), {"min_words": 4}, "answers too short"),
        (("one two three four?", "A cat."), {"max_words": 2}, None),
        (("?", "A cat sits."), {"max_words": 2}, "answers too long"),
        (("?", "一只猫"), {"max_words": 2}, "answers too long"),
        (("?", "word " * 6000), {"max_repetition": None}, None),
        (("?", "word " * 6001), {"max_repetition": None}, "answers too long"),
        (("?", "word " * 6001), {"max_repetition": None, "max_words": None}, None),
        (("?", "1", "?", "2"), {"max_answers": 2}, None),
        (("?", "1", "?", "2"), {"max_answers": 1}, "too many answers"),
    ],
)
def test_answers_are_neither_empty_nor_too_short_nor_too_long(
    texts: tuple[str, ...], limits: dict[str, int | bool | None], reason: str | None
) -> None:
    fault = text_fault(conversation("c", *texts), RuleOptions(**limits))
    assert (fault and fault.reason) == reason


@pytest.mark.parametrize(
    ("answer", "limits", "fault"),
    [
        ("one two one two three", {"repetition_n": 2, "max_repetition": 0.5}, None),  # of 4 pairs "one two" is 2
        ("one two one two three", {"repetition_n": 2, "max_repetition": 0.49}, "0.50 of its 2-grams"),
        ("图中有猫图中有狗", {"repetition_n": 2, "max_repetition": 0.57}, "0.57 of its 2-grams"),  # 4 of 7
        (LOOP, {}, "1.00 of its 10-grams"),
        (50 * "图中一共有三只猫所以答案是三。", {}, "1.00 of its 10-grams"),
        (LOOP, {"max_repetition": None}, None),
        (LOOP, {"max_repetition": 1.0}, None),
        ("nine words are too few to make one gram", {"max_repetition": 0.0}, None),
    ],
)
def test_repetition_is_counted_by_occurrence_and_is_kept_up_to_its_limit(
    answer: str, limits: dict[str, float | None], fault: str | None
) -> None:
    found = text_fault(conversation("c", "?", "Fine.", "?", answer), RuleOptions(**limits))
    assert (found and found.detail) == fault
    assert found is None or found.reason == "an answer repeats itself"


def test_what_the_user_says_is_not_measured_and_answers_are_measured_one_by_one() -> None:
    assert text_fault(conversation("c", LOOP, "Yes."), RuleOptions()) is None
    same = "We look at the picture and count all of the cats that sit on the mat."
    assert text_fault(conversation("c", "?", same, "?", same), RuleOptions()) is None


def test_both_shapes_of_conversations_are_read() -> None:
    row = {"id": "c", "prompt": [{"role": "user", "content": "?"}]}
    row["completion"] = [{"role": "assistant", "content": [{"type": "text", "text": LOOP}]}]
    assert text_fault(row, RuleOptions()).reason == "an answer repeats itself"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_words": -1}, "`min_words` must be at least 0, got -1"),
        ({"min_words": 5, "max_words": 4}, "`max_words` must be at least 5, got 4; null turns a rule off"),
        ({"max_answers": 0}, "`max_answers` must be at least 1"),
        ({"max_repetition": 1.1}, "`max_repetition` must be at least 0 and at most 1, got 1.1"),
        ({"max_repetition": math.nan}, "`max_repetition` must be"),
        ({"repetition_n": 0}, "`repetition_n` must be at least 1"),
        ({"min_side": 8, "max_side": 7}, "`max_side` must be at least 8"),
        ({"max_aspect_ratio": 0.5}, "`max_aspect_ratio` must be at least 1"),
        ({"min_p_yes": 1.5, "model": "m"}, "`min_p_yes` must be between 0 and 1, got 1.5"),
        ({"min_p_yes": 0.5}, "`min_p_yes` is about a judge: give its `model`"),
        ({"server": ["http://h/v1"]}, "`server` is about a judge: give its `model`"),
        ({"images": "head", "model": "m"}, "`images: head` lets broken pictures pass"),
        ({"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(**settings)


# Rules about pictures


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (224, 224, None), (223, 224, "image too small"), (1000, 223, "image too small"),
        (4096, 4096, None), (4097, 4096, "image too large"), (700, 4097, "image too large"),
        (224, 1568, None), (1568, 224, None), (224, 1569, "image too long and thin"),
        (1569, 224, "image too long and thin"),
    ],
)  # fmt: skip
def test_sides_and_shapes_are_those_of_the_paper_and_both_ends_are_kept(
    height: int, width: int, reason: str | None
) -> None:
    fault = size_fault(height, width, RuleOptions())
    assert (fault and fault.reason) == reason


def test_each_limit_of_a_picture_can_be_turned_off() -> None:
    off = RuleOptions(min_side=0, max_side=None, max_aspect_ratio=None)
    assert [size_fault(1, 10, off), size_fault(9000, 9000, off)] == [None, None]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`good.png`, 300 x 240; `small.png`; `cut.png`, the first bytes of a picture; `text.png`, which is none."""
    Image.new("RGB", (300, 240), "red").save(tmp_path / "good.png")
    Image.new("RGB", (300, 100)).save(tmp_path / "small.png")
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20_000])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "decoded", "head"),
    [
        ("good.png", None, None),
        ("small.png", "image too small", "image too small"),
        ("cut.png", "image broken", None),
        ("text.png", "image broken", "image broken"),
        ("none.png", "image not found", "image not found"),
        ("../good.png", "image not found", "image not found"),
        ("/good.png", "image not found", "image not found"),
        ("a\0b", "image not found", "image not found"),
    ],
)
def test_a_picture_is_there_and_can_be_read(pictures: Path, name: str, decoded: str | None, head: str | None) -> None:
    found = [image_fault(pictures, name, RuleOptions(images=how)) for how in ("decode", "head")]
    assert [fault and fault.reason for fault in found] == [decoded, head]
    assert all(len(fault.detail) <= 300 for fault in found if fault)


def test_rows_with_a_bad_picture_are_left_out_and_texts_are_looked_at_first(pictures: Path) -> None:
    rows = [
        conversation("good", "?", "A cat.", images=["good.png"]),
        conversation("one of two", "?", "A cat.", images=["good.png", "small.png"]),
        conversation("empty", "?", "", images=["none.png"]),
        conversation("none", "?", "A cat.", images=None),
    ]
    kept, dropped = filter_rows(rows, config_of(image_root=str(pictures)))
    assert [row["id"] for row in kept] == ["good", "none"]
    assert [(row["id"], row["reason"]) for row in dropped] == [
        ("one of two", "image too small"),
        ("empty", "an answer is empty"),
    ]
    assert dropped[0]["detail"] == "small.png: 300 x 100 pixels"
    assert len(filter_rows(rows, config_of(images="ignore"))[0]) == 3


def test_an_image_root_under_which_nothing_is_found_stops_before_the_work(
    config: FilterConfig, pictures: Path
) -> None:
    rows = [conversation(str(number), "?", "A cat.", images=["good.png"]) for number in range(3)]
    write_rows(Path(config.conversations) / "00000.jsonl", rows)
    with pytest.raises(InputError, match="none of the images that were looked for is there, .*Is `image_root` right"):
        run(replace(config, image_root=str(pictures / "in")))
    assert not Path(config.output).exists()
    run(replace(config, image_root=str(pictures)))
    assert [row["id"] for row in read_stage(Path(config.output))] == ["0", "1", "2"]


# The judge


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Yes", True), ("Yes.", True), (" Yes\n", True), ("\tYes. ", True), ("<think>3 = 3</think>\nYes", True),
        ("No", False), ("No.", False), ("\nNo \n", False), ("<think>Yes</think>No", False), ("</think>No", False),
        ("yes", None), ("YES", None), ("no", None), ("Yes!", None), ("Yes..", None), ("Yes .", None),
        ("**Yes**", None), ('"Yes"', None), ("Yes, but", None), ("Yes No", None), ("Yes\nNo", None),
        ("Answer: Yes", None), ("Yesterday", None),
        ("None", None), ("是", None), ("否", None), ("Ｙｅｓ", None), ("<think>Yes", None), ("Yes</think>", None),
        ("", None), ("No " * 1000, None),
    ],
)  # fmt: skip
def test_exactly_yes_or_no_is_a_verdict(reply: str, verdict: bool | None) -> None:
    assert read_verdict(reply) is verdict


@pytest.mark.parametrize(
    ("reply", "reason", "says"),
    [
        ("No", "the judge said No", {"reply": "No"}),
        ("Maybe", "the judge gave no verdict", {"reply": "Maybe"}),
        ("so " * 100, "the judge gave no verdict", {"reply": ("so " * 100)[:200]}),
        (Completion("Yes", "error", "server gone"), "the judge failed", {"error": "server gone"}),
    ],
)
def test_a_row_is_put_aside_whole_with_the_reason_and_what_was_said(
    reply: str | Completion, reason: str, says: Row
) -> None:
    origin = {"model": "judge-7b", "prompt": filter_prompt("filter").id}
    kept, dropped = filter_rows([CHART], config_of(model="m"), Judge(reply))
    expected = {"id": "chart", "reason": reason, "detail": "", "judge": {**origin, **says}, "row": CHART}
    assert (kept, dropped) == ([], [expected])


def test_a_kept_row_is_as_it_was_and_says_who_judged_it() -> None:
    ((kept,), dropped) = filter_rows([CAT], config_of(model="m"), Judge(sure("Yes", 0.6, 0.2)))
    says = {"model": "judge-7b", "prompt": filter_prompt("filter").id, "p_yes": 0.75}
    assert (kept, dropped) == ({**CAT, "filter": says}, [])
    ((again,), _) = filter_rows([kept], config_of(model="m"), Judge("Yes"))
    assert again["filter"] == {"model": "judge-7b", "prompt": says["prompt"], "earlier": says}
    assert filter_rows([CAT], config_of()) == ([CAT], [])


def test_the_judge_is_not_asked_about_what_the_rules_leave_out_and_the_same_once() -> None:
    judge = Judge()
    again = {**CAT, "id": "again"}
    kept, dropped = filter_rows([EMPTY, CAT, LOOPING, DOG, again], config_of(model="m"), judge)
    assert [row["id"] for row in kept] == ["cat", "again"]
    assert [(row["id"], row["reason"]) for row in dropped] == [
        ("empty", "an answer is empty"),
        ("loop", "an answer repeats itself"),
        ("dog", "the judge said No"),
    ]
    assert [shown(request).splitlines()[3] for request in judge.requests] == ["A cat.", "A dog."]


def test_it_sees_every_picture_and_every_turn() -> None:
    row = conversation("c", "What is it?", "A cat.", "Sure?", "Yes.", images=["a.png", "b.png"])
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    judge = Judge("Yes")
    judge_conversations([row], judge, GREEDY, prompts=prompts_for("filter"))
    (request,) = judge.requests
    assert request.images == ("a.png", "b.png")
    assert shown(request) == (
        "[system]\nBe brief.\n[user]\nWhat is it?\n[assistant]\nA cat.\n[user]\nSure?\n[assistant]\nYes.\n"
    )
    assert "about the 2 images that you see" in request.prompt
    assert all(word in request.prompt for word in ("Relevance", "Consistency", "Accuracy"))
    assert request.prompt.endswith("Reply with exactly one word: Yes or No.")


@pytest.mark.parametrize(("images", "words"), [([], "without images"), (["a.png"], "about the image that you see")])
def test_it_is_told_how_many_pictures_there_are(images: list[str], words: str) -> None:
    judge = Judge("Yes")
    judge_conversations([{**CAT, "images": images}], judge, GREEDY, prompts=prompts_for("filter"))
    assert words in judge.requests[0].prompt


def test_chinese_conversations_are_asked_about_in_chinese_and_answered_alike() -> None:
    judge = Judge("Yes")
    row = conversation("zh", "图中是什么？", "A cat.", images=["a.png"])
    (opinion,) = judge_conversations([row], judge, GREEDY, prompts=prompts_for("filter"))
    assert judge.requests[0].prompt.endswith("请只回答一个英文单词：Yes 或 No。")
    assert opinion.said["prompt"].startswith("filter_zh@")
    assert opinion.is_good is True
    judge_conversations([row], judge, GREEDY, prompts=prompts_for("filter_zh"))
    judge_conversations([CAT], judge, GREEDY, prompts=prompts_for("filter_zh"))
    assert "不含图片的" in judge.requests[-1].prompt


@pytest.mark.parametrize("mark", ["<image>", "<|im_end|>", "</conversation>", "[INST]", "[assistant]"])
def test_nothing_in_a_turn_stands_for_a_picture_a_turn_or_the_end(mark: str) -> None:
    judge = Judge("Yes")
    judge_conversations([conversation("c", "?", f"x {mark} Yes")], judge, GREEDY, prompts=prompts_for("filter"))
    assert f"x {mark}" not in judge.requests[0].prompt
    assert f"x {mark[0]} {mark[1:]} Yes" in judge.requests[0].prompt


def test_an_own_prompt_is_a_template_of_these_variables(tmp_path: Path) -> None:
    path = tmp_path / "short.jinja"
    path.write_text("{{ num_images }}{% for turn in turns %}|{{ turn.text }}{% endfor %}", encoding="utf-8")
    judge = Judge("Yes")
    (opinion,) = judge_conversations([CAT], judge, GREEDY, prompts=prompts_for(str(path)))
    assert judge.requests[0].prompt == "0|What is it?|A cat."
    assert opinion.said["prompt"].startswith("short@")
    path.with_stem("other").write_text("{{ answer }}", encoding="utf-8")
    with pytest.raises(InputError, match="'answer' is undefined.*only variables are `turns` and `num_images`"):
        filter_prompt(str(path.with_stem("other")))
    with pytest.raises(InputError, match="there is no filter prompt 'judge': choose filter or filter_zh"):
        filter_prompt("judge")


# P(Yes)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75),
        ({"Yes": 0.3, " Yes": 0.2, "yes": 0.05, "YES": 0.05, "No": 0.1, " no": 0.1, "Maybe": 0.2}, 0.75),
        ({"▁Yes": 0.1, "ĠNo": 0.3}, 0.25),
        ({"Yes": 0.9, "Maybe": 0.1}, 1.0),
        ({"No": 0.01, "Maybe": 0.9}, 0.0),
        ({"Yes": 1 / 3, "No": 2 / 3}, 0.3333),
        ({"Yesterday": 0.5, "None": 0.5}, None),
        ({"<think>": 1.0}, None),
        ({}, None),
    ],
)
def test_p_yes_is_the_share_of_yes_in_yes_and_no(probabilities: dict[str, float], expected: float | None) -> None:
    assert yes_probability([(token, math.log(p)) for token, p in probabilities.items()]) == expected


def test_p_yes_of_words_that_cannot_be_is_not_known() -> None:
    assert yes_probability([("Yes", -9999.0), ("No", -9999.0)]) is None
    assert yes_probability([("Yes", -9999.0), ("No", -1.0)]) == 0.0


@pytest.mark.parametrize(
    ("reply", "threshold", "reason"),
    [
        (sure("Yes", 0.6, 0.2), 0.75, None),  # exactly at the threshold
        (sure("Yes", 0.6, 0.2), 0.7501, "P(Yes) too small"),
        (sure("No", 0.4, 0.6), 0.4, None),  # the threshold stands in the place of the word
        (sure("No", 0.4, 0.6), None, "the judge said No"),
        (sure("Yes", 0.6, 0.2), None, None),
        (sure("Yes, I think", 0.9, 0.1), 0.5, "the judge gave no verdict"),
        (Completion("<think>x</think>Yes", "stop", first_logps=(("<think>", 0.0),)), 0.5, "P(Yes) unknown"),
        (Completion("<think>x</think>Yes", "stop", first_logps=(("<think>", 0.0),)), None, None),
        (Completion("<think>x</think>No", "stop", first_logps=(("Yes", -1.0), ("No", -9.0))), 0.5, "P(Yes) unknown"),
        (Completion("", "error", "too long"), 0.5, "the judge failed"),
    ],
)
def test_a_threshold_keeps_what_reaches_it(reply: Completion, threshold: float | None, reason: str | None) -> None:
    kept, dropped = filter_rows([CAT], config_of(model="m", min_p_yes=threshold), Judge(reply))
    assert [row["reason"] for row in dropped] == ([reason] if reason else [])
    assert len(kept) == (reason is None)


def test_a_threshold_without_log_probabilities_is_refused() -> None:
    with pytest.raises(InputError, match="`min_p_yes` needs log-probabilities, and judge-7b answers without any"):
        filter_rows([CAT], config_of(model="m", min_p_yes=0.5), Judge("Yes"))
    ((kept,), _) = filter_rows([CAT], config_of(model="m"), Judge("Yes"))
    assert "p_yes" not in kept["filter"]


# The verb


def test_the_verb_writes_what_is_kept_what_is_not_and_the_table(config: FilterConfig) -> None:
    summary = run(config)
    output = Path(config.output)
    assert list(read_stage(output, Conversation)) == [CAT, DOG, CHART]
    assert [row["row"] for row in aside(output)] == [EMPTY, LOOPING]
    assert summary.columns == ["category", "before", "after", "removed"]
    assert summary.rows == [
        ["Chart", "2", "1", "50.0%"],
        ["General", "2", "2", "0.0%"],
        ["loops", "1", "0", "100.0%"],  # no category: by source
        ["all", "5", "3", "40.0%"],
    ]
    left_out = "Left out: 1 an answer is empty, 1 an answer repeats itself"
    assert summary.notes == [
        f"{left_out}; listed in {output / 'dropped'}.",
        f"The table is in {output / 'filter.json'}.",
    ]
    assert summary.next_command.startswith(f"mpo sft --data {output} ")
    saved = json.loads((output / "filter.json").read_text(encoding="utf-8"))
    assert saved["judge"] is None
    assert saved["categories"][0] == {
        "category": "Chart", "before": 2, "after": 1, "removed": 1, "removed_share": 0.5,
    }  # fmt: skip
    assert saved["reasons"] == [
        {"category": "Chart", "reason": "an answer is empty", "rows": 1},
        {"category": "loops", "reason": "an answer repeats itself", "rows": 1},
    ]


def test_nothing_is_lost(config: FilterConfig) -> None:
    run(config)
    rows = [*read_stage(Path(config.output)), *(line["row"] for line in aside(config.output))]
    given = list(read_stage(Path(config.conversations)))
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, given))


def test_where_nothing_is_left_there_is_no_next_step(config: FilterConfig) -> None:
    summary = run(replace(config, min_words=100))
    assert summary.rows[-1] == ["all", "5", "0", "100.0%"]
    assert summary.next_command is None


def test_other_settings_want_another_folder(config: FilterConfig) -> None:
    run(config)
    with pytest.raises(InputError, match=r"other settings \(max_repetition: then 0\.3, now 0\.4\)"):
        run(replace(config, max_repetition=0.4))
    other = pytest.raises(InputError, match=r"other settings \(judge: then None, now {'model': 'tiny'")
    with FaultyServer(answer=says_yes) as server, other:
        run(replace(config, model="tiny", server=[server.address]))


def test_a_row_that_is_no_conversation_is_refused_with_its_line(config: FilterConfig) -> None:
    write_rows(Path(config.conversations) / "00001.jsonl", [CAT, {"id": "c", "question": "?"}])
    with pytest.raises(InputError, match=r"00001\.jsonl, line 2: a conversation has `prompt` and `completion`, or"):
        run(config)


def test_the_number_of_workers_changes_no_byte(config: FilterConfig, tmp_path: Path) -> None:
    run(config)
    run(replace(config, output=str(tmp_path / "two"), workers=2))
    assert content(tmp_path / "two") == content(config.output)
    assert {"00002.jsonl", "dropped/00001.jsonl", "filter.json"} <= content(config.output).keys()


def test_ray_writes_the_same_files_as_one_process(config: FilterConfig, tmp_path: Path) -> None:
    run(config)
    run(replace(config, output=str(tmp_path / "ray"), workers=2, ray="local"))
    assert content(tmp_path / "ray") == content(config.output)


@pytest.mark.parametrize("last", [1, 2, 3, 4, 6])  # settings, and shards of kept and of dropped rows
def test_killed_anywhere_and_started_again_it_ends_with_the_same_files(config: FilterConfig, last: int) -> None:
    run(config)
    whole = content(config.output)
    killed = replace(config, output=str(Path(config.output).with_name("killed")))
    run_until_killed("data_builders.filter", killed, last)
    assert content(killed.output) != whole
    run(killed)
    assert content(killed.output) == whole


# With models


def says_yes(body: Body) -> Body:
    """Yes to cats, with P(Yes) 0.9, and No to everything else, with P(Yes) 0.2, if it is asked."""
    yes = "A cat." in question(body)
    probabilities = {"Yes": 0.9, "No": 0.1} if yes else {"No": 0.8, "Yes": 0.1, " Yes": 0.1}
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    answer = choice("Yes" if yes else "No")
    if body.get("logprobs"):
        answer["logprobs"] = {"content": [{**top[0], "top_logprobs": top[: body["top_logprobs"]]}]}
    return {"choices": [answer]}


@pytest.fixture
def served() -> Iterator[FaultyServer]:
    with FaultyServer(answer=says_yes) as server:
        yield server


def test_a_model_on_a_server_judges_and_its_certainty_is_kept(config: FilterConfig, served: FaultyServer) -> None:
    config = replace(config, model="tiny", server=[served.address])
    summary = run(config)
    (kept,) = read_stage(Path(config.output))
    assert kept == {**CAT, "filter": {"model": "tiny", "prompt": filter_prompt("filter").id, "p_yes": 0.9}}
    assert [line["judge"]["p_yes"] for line in aside(config.output) if "judge" in line] == [0.2, 0.2]
    assert len(served.calls) == 3
    assert {(call["temperature"], call["max_tokens"], call["top_logprobs"]) for call in served.calls} == {(0, 16, 20)}
    assert summary.rows[-1] == ["all", "5", "1", "80.0%"]
    judge = {"model": "tiny", "prompt": [prompt.id for prompt in prompts_for("filter")], "min_p_yes": None}
    assert json.loads((Path(config.output) / "filter.json").read_text(encoding="utf-8"))["judge"] == judge


def test_a_threshold_on_a_server_counts_instead_of_the_word(config: FilterConfig, served: FaultyServer) -> None:
    run(replace(config, model="tiny", server=[served.address], min_p_yes=0.2))
    assert [row["id"] for row in read_stage(Path(config.output))] == ["cat", "dog", "chart"]


def without_logprobs(body: Body) -> Body:
    return says_yes({**body, "logprobs": False})


def refuses_logprobs(body: Body) -> object:
    return refuses("logprobs")(body) if "logprobs" in body else says_yes(body)


@pytest.mark.parametrize("answer", [without_logprobs, refuses_logprobs])
def test_a_server_without_log_probabilities_is_refused_only_for_a_threshold(
    config: FilterConfig, answer: Callable[[Body], object]
) -> None:
    with FaultyServer(answer=answer) as server:
        config = replace(config, model="tiny", server=[server.address])
        with pytest.raises(InputError, match="`transformers serve` has not. Leave `min_p_yes` out"):
            run(replace(config, min_p_yes=0.5, output=f"{config.output}-threshold"))
        run(config)
    assert not list(Path(f"{config.output}-threshold").glob("*.jsonl"))
    assert ["p_yes" in row["filter"] for row in read_stage(Path(config.output))] == [False]


def test_replies_that_are_no_verdict_are_counted_and_said(config: FilterConfig) -> None:
    with FaultyServer(answer=lambda _: {"choices": [choice("It is fine.")]}) as server:
        summary = run(replace(config, model="tiny", server=[server.address]))
    assert drop_reasons(Path(config.output))["the judge gave no verdict"] == 3
    where = Path(config.output) / "dropped"
    assert f"3 replies were neither Yes nor No: they are under `judge` in {where}." in summary.notes


def test_a_model_in_this_process_judges_pictures_and_its_p_yes_is_that_of_its_logits(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has learned nothing: two of its likeliest first tokens are taken for Yes and for no."""
    image = "images/known-00000.png"
    row = conversation("seen", "What is the sum?", "Seven.", images=[image])
    write_rows(tmp_path / "in.jsonl", [row, {**row, "id": "cut off", "images": ["images/none.png"]}])
    sampler = HFSampler(str(task / "model"), image_root=task, device="cpu")
    with torch.no_grad():
        logits = sampler.model(**sampler._encode([Request(_asked(row), (image,))])).logits[0, -1].double()
    logits[sampler.image_tokens] = -torch.inf
    yes, _, no = logits.topk(3).indices.tolist()
    spelled = {yes: "Yes", no: " no"}
    monkeypatch.setattr(HFSampler, "_decode", lambda _, ids: "".join(spelled.get(id, "?") for id in ids))
    settings = {"conversations": str(tmp_path / "in.jsonl"), "image_root": str(task), "min_side": 0, "device": "cpu"}
    run(config_of(model=str(task / "model"), output=str(tmp_path / "out"), max_new_tokens=1, **settings))
    (kept,) = read_stage(tmp_path / "out")
    expected = float(1 / (1 + (logits[no] - logits[yes]).exp()))
    assert kept["filter"]["p_yes"] == pytest.approx(expected, abs=1e-4)
    assert [line["reason"] for line in aside(tmp_path / "out")] == ["image not found"]


def _asked(row: Row) -> str:
    judge = Judge("Yes")
    judge_conversations([row], judge, GREEDY, prompts=prompts_for("filter"))
    return judge.requests[0].prompt
