"""`mpo rewrite`: replies in five grammars, images in usable sizes, answers that stay, and sheets to decide by."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from faulty_server import FaultyServer, choice
from killed_runs import run_until_killed
from PIL import Image

from data_builders.conversations import Turn, turns
from data_builders.engine import drop_reasons
from data_builders.mix import MixConfig
from data_builders.mix import run as run_mix
from data_builders.records import Conversation, InputError, Row
from data_builders.rewrite import CONFIGS, RewriteConfig, run
from data_builders.rewriting.asking import MAX_SHOWN_CHARS, known_answer, request_for, rewrite_prompt
from data_builders.rewriting.datasets import GRAMMARS, Category, read_sources
from data_builders.rewriting.grammars import (
    MAX_REPLY_CHARS,
    Grammar,
    parse,
    parse_caption,
    parse_chart,
    parse_general,
    parse_math,
    parse_ocr,
)
from data_builders.rewriting.pictures import Limits, normal_size
from data_builders.rewriting.rows import MAX_SHOWN_REPLY, Writer, keep_rows, rewrite_rows
from data_builders.samplers import Completion, Request, SamplingSettings
from data_builders.shards import read_stage, write_rows
from mpo.data import sft_dataset
from mpo.settings import read_settings

ROOT = Path(__file__).parent.parent


def said(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


GENERAL = [
    ("<Instruction: Why two?> <Response: One, and one more.>", said("Why two?", "One, and one more.")),
    ("<Instruction: Why?>\n\n<Response: First line.\n\nLast line.>\n", said("Why?", "First line.\n\nLast line.")),
    ("<instruction:why?><RESPONSE:so>", said("why?", "so")),
    ("< Instruction : Why? > <Response\uff1a So. >", said("Why?", "So.")),
    ("Sure, here it is:\n<Instruction: Why?>\n<Response: So.>", said("Why?", "So.")),
    ("```\n<Instruction: Why?>\n<Response: So.>\n```", said("Why?", "So.")),
    ("**<Instruction: Why?>**\n**<Response: So.>**", said("Why?", "So.")),
    ("<think>An <Instruction: x> maybe.</think>\n<Instruction: Why?>\n<Response: So.>", said("Why?", "So.")),
    ("<Instruction: 3 > 2?> <Response: Yes, and <b>2 < 3</b>.>", said("3 > 2?", "Yes, and <b>2 < 3</b>.")),
    ("<Instruction: 有几只猫？> <Response: 两只，一大一小。>", said("有几只猫？", "两只，一大一小。")),
    ("<Instruction: Why?> <Response: " + "because " * 9000 + ">", said("Why?", ("because " * 9000).strip())),
    ("", "no Instruction"),
    (" \n", "no Instruction"),
    ("I'm sorry, I can't see the picture.", "no Instruction"),
    ("<Instruction: Why?>", "no Response"),
    ("<Response: So.>", "no Instruction"),
    ("Instruction: Why?\nResponse: So.", "no Instruction"),
    ("<Instruction: Why?> <Response: So", "Response not closed"),
    ("<Instruction: Why?> <Response: If 3 > 2 then", "Response not closed"),
    ("<Instruction: Why?> <Response: So.> I hope this helps!", "Response not closed"),
    ("<Instruction: Why? <Response: So.>", "Instruction not closed"),
    ("<Instruction: Why?> and then <Response: So.>", "Instruction not closed"),
    ("<Response: So.> <Instruction: Why?>", "wrong order"),
    ("<Instruction: a> <Response: b> <Instruction: c> <Response: d>", "Instruction twice"),
    ("<Instruction: a> <Response: b> <Response: c>", "Response twice"),
    ("<Instruction: ...> <Response: ...>", "empty Instruction"),
    ("<Instruction: Why?> <Response: >", "empty Response"),
    ("<Instruction: Why?> <Response: <image> shows two.>", "markup of a picture or a chat template"),
    ("<Instruction: Why?> <Response: So.<|im_end|>\n<|im_start|>user>", "markup of a picture or a chat template"),
    ("<Instruction: Why? [INST]> <Response: So.>", "markup of a picture or a chat template"),
    ("<think><Instruction: Why?> <Response: So", "Response not closed"),
    ("<Instruction: Why?> <Response: " + "a" * MAX_REPLY_CHARS + ">", "too long"),
]  # fmt: skip

CHART = [
    ("##Instruction##: Which is higher? ##Response##: The left one.", said("Which is higher?", "The left one.")),
    ("##Instruction##: a\n##Response##: 3 > 2\n- **b**", said("a", "3 > 2\n- **b**")),
    ("## instruction ## : a\n##RESPONSE##\uff1ab", said("a", "b")),
    ("Of course.\n\n##Instruction##: a\n##Response##: b", said("a", "b")),
    ("##Instruction##: 哪一年最高？\n##Response##: 2019年，为 42%。", said("哪一年最高？", "2019年，为 42%。")),
    ("", "no Instruction"),
    ("##Instruction##: a", "no Response"),
    ("##Instruction## a ##Response## b", "no Instruction"),
    ("# Instruction: a\n# Response: b", "no Instruction"),
    ("##Instruction##: a ##Respo", "no Response"),
    ("##Response##: b ##Instruction##: a", "wrong order"),
    ("##Instruction##: a ##Response##: b ##Instruction##: c ##Response##: d", "Instruction twice"),
    ("##Instruction##: ##Response##: b", "empty Instruction"),
    ("##Instruction##: a ##Response##: ", "empty Response"),
    ("##Instruction##: a ##Response##: <image>b", "markup of a picture or a chat template"),
    ("<Instruction: a> <Response: b>", "no Instruction"),
]

MATH = [
    ("<response: 2 + 2 = 4.\nFinal answer: 4>", [Turn("assistant", "2 + 2 = 4.\nFinal answer: 4")]),
    ("<Response : x > 1, so x = 2. Final answer: 2>", [Turn("assistant", "x > 1, so x = 2. Final answer: 2")]),
    ("Here:\n```\n<response: 4>\n```", [Turn("assistant", "4")]),
    ("<response: 二加二等于四。最终答案：4>", [Turn("assistant", "二加二等于四。最终答案：4")]),
    ("", "no response"),
    ("2 + 2 = 4", "no response"),
    ("<response 4>", "no response"),
    ("<response: 2 + 2 = 4", "response not closed"),
    ("<response: 4> It is 4.", "response not closed"),
    ("<response: 3> <response: 4>", "response twice"),
    ("<response: >", "empty response"),
    ("<response: 4 </s>>", "markup of a picture or a chat template"),
]  # fmt: skip


def rounds(num: int) -> str:
    return "Scenario: A shop.\n" + "".join(f"Human: q{i}\nAssistant: a{i}\n" for i in range(num))


OCR = [
    (rounds(1), said("q0", "a0")),
    (rounds(5), said(*(text for i in range(5) for text in (f"q{i}", f"a{i}")))),
    ("scenario : A shop.\n  HUMAN: q\nassistant\uff1a a", said("q", "a")),
    ("**Scenario:** A shop.\n\n**Human:** q\n\n**Assistant**: **a** and b", said("q", "**a** and b")),
    ("Sure!\nScenario: A shop.\nHuman: What does\nit say?\nAssistant: It says\nHuman resources: 3.",
     said("What does\nit say?", "It says\nHuman resources: 3.")),
    ("Scenario: 一家商店。\nHuman: 招牌上写着什么？\nAssistant: 写着“鞋”。", said("招牌上写着什么？", "写着“鞋”。")),
    ("", "no Scenario"),
    ("Human: q\nAssistant: a", "no Scenario"),
    ("Scenario: A shop.", "no Human"),
    ("Scenario: A shop. Human: q Assistant: a", "no Human"),
    (rounds(6), "more than 5 rounds"),
    (rounds(500), "more than 5 rounds"),
    ("Scenario: A shop.\nHuman: q", "Human without Assistant"),
    (rounds(1) + "Human: q", "Human without Assistant"),
    (rounds(5) + "Human: q", "more than 5 rounds"),
    ("Scenario: A shop.\nHuman: q\nHuman: r\nAssistant: a", "Human twice in a row"),
    ("Scenario: A shop.\nHuman: q\nAssistant: a\nAssistant: b", "Assistant twice in a row"),
    ("Scenario: A shop.\nAssistant: a\nHuman: q", "wrong order"),
    ("Human: q\nScenario: A shop.\nAssistant: a", "wrong order"),
    (rounds(1) + rounds(1), "Scenario twice"),
    ("Scenario:\nHuman: q\nAssistant: a", "empty Scenario"),
    ("Scenario: A shop.\nHuman: q\nAssistant:", "empty Assistant"),
    ("Scenario: A shop.\nHuman: ?\nAssistant: a", "empty Human"),
    (rounds(1) + "Human: <|image_pad|>\nAssistant: a", "markup of a picture or a chat template"),
    ("Scenario: A shop.\nHuman: q\nAssistant: " + "a" * MAX_REPLY_CHARS, "too long"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "expected"), GENERAL)
def test_a_general_reply_is_one_instruction_and_one_response(reply: str, expected: list[Turn] | str) -> None:
    assert parse_general(reply) == expected
    assert parse_caption(reply) == expected


@pytest.mark.parametrize(("reply", "expected"), CHART)
def test_a_chart_reply_is_under_two_headings(reply: str, expected: list[Turn] | str) -> None:
    assert parse_chart(reply) == expected


@pytest.mark.parametrize(("reply", "expected"), MATH)
def test_a_math_reply_is_a_response_alone(reply: str, expected: list[Turn] | str) -> None:
    assert parse_math(reply) == expected


@pytest.mark.parametrize(("reply", "expected"), OCR)
def test_an_ocr_reply_is_a_scenario_and_up_to_five_rounds(reply: str, expected: list[Turn] | str) -> None:
    assert parse_ocr(reply) == expected


PIECES = ["<Instruction:", "<Response:", "##Response##:", "<response:", "\nHuman:", "\nAssistant:", "Scenario:"]


@pytest.mark.parametrize("grammar", get_args(Grammar))
def test_no_text_makes_a_parser_raise_and_each_gives_whole_turns_or_a_reason(grammar: str) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices([*PIECES, ">", "a", "\n", "**", "```\n", " "], k=12)) for _ in range(2000)]
    texts += [piece * 20_000 for piece in ("<", "#", " ", "\n", "*", "< ", "## ", "\n ", "</think>", ">")]
    for text in texts:
        found = parse(grammar, text)
        assert isinstance(found, str) or (found[-1].role == "assistant" and all(turn.text for turn in found))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (224, 224)), ((4096, 4096), (4096, 4096)), ((640, 480), (640, 480)),
        ((223, 223), (224, 224)), ((1, 1), (224, 224)), ((1, 7), (224, 1568)), ((7, 1), (1568, 224)),
        ((1, 8), None), ((1568, 224), (1568, 224)), ((1569, 224), None), ((100, 701), None),
        ((4097, 4096), (4096, 4096)), ((8192, 4096), (4096, 2048)), ((100_000, 100_000), (4096, 4096)),
        ((7000, 1000), (4096, 586)), ((7001, 1000), None), ((1000, 7000), (586, 4096)),
        ((4096, 586), (4096, 586)), ((4096, 585), None), ((5000, 200), None), ((0, 0), None), ((0, 5), None),
    ],
)  # fmt: skip
def test_images_are_scaled_into_the_limits_and_long_ones_are_left_out(
    size: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    assert normal_size(*size, Limits()) == expected


def test_a_scaled_size_is_within_the_limits_and_needs_no_scaling() -> None:
    draw = random.Random(0)
    for _ in range(5000):
        width, height = int(10 ** draw.uniform(0, 5)), int(10 ** draw.uniform(0, 5))
        size = normal_size(width, height, Limits())
        if size is not None:
            assert min(size) >= 224
            assert max(size) <= 4096
            assert max(size) <= 7 * min(size)
            assert normal_size(*size, Limits()) == size
        else:
            assert max(width, height) > 7 * min(width, height)


def test_limits_that_no_long_image_can_keep_are_refused() -> None:
    with pytest.raises(InputError, match="`max_side` \\(1000\\) at least their product"):
        Limits(max_side=1000)


def test_every_category_has_a_grammar_and_all_five_are_used() -> None:
    assert list(GRAMMARS) == list(get_args(Category))
    assert set(GRAMMARS.values()) == set(get_args(Grammar))
    assert len(GRAMMARS) == 10


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"path": "a", "category": "Maths"}, "source 'x': `category` is 'Maths': input should be 'General', 'OCR'"),
        ({"path": "a", "category": "OCR", "group": "D"}, "`group` is 'D'"),
        ({"path": "a"}, "`category` is missing"),
        ({"category": "OCR"}, "has no `path`"),
        ({"path": "a", "category": "OCR", "gruop": "A"}, "`gruop` is no setting of a source"),
        ({"path": "a", "category": "OCR", "image_folder": "../x"}, "must be a folder below the image root"),
        ("a.jsonl", "give it `{path, category, group}`"),
    ],
)
def test_a_source_that_makes_no_sense_is_named(fields: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        read_sources({"x": fields})


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a b", "a" * 101])
def test_a_source_whose_name_can_name_no_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="needs another name"):
        read_sources({name: {"path": "a", "category": "OCR"}})


def test_the_recipe_has_the_papers_numbers_and_each_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (recipe,) = read_settings("rewrite", CONFIGS, ["--config", "configs/mammoth_vl/rewrite.yaml"])
    assert (recipe.screen_rows, recipe.limits()) == (1000, Limits(224, 4096, 7))
    assert {source.reads for source in recipe.spec().values()} == set(get_args(Grammar))
    assert {source.group for source in recipe.spec().values()} == {"A", "B", "C"}
    assert recipe.asks(blind=True).model != recipe.asks(blind=False).model


def conversation(name: str, question: str, answer: str, *images: str, **more: object) -> Row:
    row = {"id": name, "images": list(images), "prompt": [{"role": "user", "content": question}]}
    return {**row, "completion": [{"role": "assistant", "content": answer}], **more}


REPLIES = {
    "general": "<Instruction: What follows?> <Response: From the first the second.>",
    "caption": "<Instruction: What does the man do?> <Response: He sleeps.>",
    "chart": "##Instruction##: Which is higher? ##Response##: The left one.",
    "math": "<response: Two and two make four.\nFinal answer: 4>",
    "ocr": rounds(2),
}


def reply_to(prompt: str) -> str:
    """What a well-behaved model writes: the form that it was shown says which grammar is wanted."""
    if "BROKEN" in prompt:
        return "I cannot do that. " * 400
    marks = {"Scenario:": "ocr", "##Instruction##": "chart", "<response:": "math", "You do not see": "caption"}
    return REPLIES[next((grammar for mark, grammar in marks.items() if mark in prompt), "general")]


class Model:
    """Answers by `reply`, and keeps what it was asked."""

    def __init__(self, reply: Callable[[str], str] = reply_to, reason: str = "stop", error: str | None = None) -> None:
        self.name, self.reply, self.reason, self.error = "model-7b", reply, reason, error
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        assert num == 1
        self.requests += requests
        return [[Completion(self.reply(request.prompt), self.reason, self.error)] for request in requests]

    def token_ends(self, text: str) -> list[int]:
        return list(range(1, len(text) + 1))


def rewritten(row: Row, category: str, model: Model, **more: object) -> tuple[list[Row], list[Row]]:
    sources = read_sources({"set": {"path": "a", "category": category, "group": "B", **more}})
    writer = Writer(model, SamplingSettings(), {"model": "model-7b", "temperature": 0.5})
    return rewrite_rows([{"source": "set", "row": row}], sources, lambda name: name, lambda blind: writer)


def test_a_rewritten_row_says_what_it_was_and_who_rewrote_it() -> None:
    row = conversation("7", "How many?", "2", "a.png", source="vqa", kept={"by": "me"}, as_read={"format": "mmpr"})
    model = Model()
    (done,), dropped = rewritten(row, "Detection", model)
    assert dropped == []
    assert done == {
        "id": "set/7",
        "images": ["a.png"],
        "source": "vqa",
        "kept": {"by": "me"},
        "category": "Detection",
        "prompt": [{"role": "user", "content": "What follows?"}],
        "completion": [{"role": "assistant", "content": "From the first the second."}],
        "rewritten": True,
        "rewrite": {
            "model": "model-7b",
            "temperature": 0.5,
            "prompt": rewrite_prompt("general").id,
            "grammar": "general",
            "with_image": True,
        },
        "original": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2"}],
    }
    assert re.fullmatch("general@[0-9a-f]{8}", done["rewrite"]["prompt"])
    (request,) = model.requests
    assert request.images == ("a.png",)
    assert "user: How many?\nassistant: 2\n</exchange>" in request.prompt


def test_all_turns_are_shown_and_a_dialogue_comes_back_as_messages() -> None:
    messages = [Turn("user", "Who?"), Turn("assistant", "Ann."), Turn("user", "Where?"), Turn("assistant", "Rome.")]
    row = {"id": "7", "images": ["a.png"], "messages": [{"role": one.role, "content": one.text} for one in messages]}
    model = Model()
    (done,), _ = rewritten(row, "OCR", model)
    assert "user: Who?\nassistant: Ann.\nuser: Where?\nassistant: Rome.\n" in model.requests[0].prompt
    assert turns(done) == said("q0", "a0", "q1", "a1")
    assert done.keys().isdisjoint({"prompt", "completion"})
    assert done["original"] == row["messages"]
    (done,), _ = rewritten(row, "OCR", Model(lambda _: rounds(1)))
    assert (done["prompt"][0]["content"], done["completion"][0]["content"]) == ("q0", "a0")
    assert "messages" not in done


def test_a_caption_is_rewritten_without_its_picture_and_by_its_text_alone() -> None:
    model = Model()
    (done,), _ = rewritten(conversation("7", "Describe it.", "A man in a bed.", "a.png"), "Caption", model)
    assert model.requests[0].images == ()
    assert "A man in a bed." in model.requests[0].prompt
    assert "Describe it." not in model.requests[0].prompt
    assert done["images"] == ["a.png"]
    assert done["rewrite"]["with_image"] is False


@pytest.mark.parametrize("mark", ["<image>", "<|im_end|>", "</exchange>", "[INST]", "</description>"])
@pytest.mark.parametrize("grammar", get_args(Grammar))
def test_nothing_in_a_row_stands_for_a_picture_or_ends_what_is_shown(grammar: str, mark: str) -> None:
    row = conversation("7", f"How many {mark}?", f"Two {mark} three.")
    prompt = request_for(row, grammar, rewrite_prompt(grammar)).prompt
    assert f"Two {mark[0]} {mark[1:]} three." in prompt
    assert f"Two {mark}" not in prompt
    assert f"How many {mark}" not in prompt


def test_a_row_without_picture_is_not_asked_about_one() -> None:
    row = conversation("7", "How many?", "Two.")
    assert "picture" not in request_for(row, "general", rewrite_prompt("general")).prompt
    with_two = request_for({**row, "images": ["a", "b"]}, "general", rewrite_prompt("general"))
    assert "2 pictures above" in with_two.prompt


def test_the_grammar_and_the_prompt_can_be_a_sources_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ turns[-1].text }}|{{ num_images }}|##Instruction##", encoding="utf-8")
    model = Model()
    (done,), _ = rewritten(conversation("7", "?", "2", "a"), "Code&Math", model, grammar="chart", prompt=str(path))
    assert model.requests[0].prompt == "2|1|##Instruction##"
    assert done["rewrite"]["prompt"].startswith("own@")
    path.write_text("{{ answer }}", encoding="utf-8")
    rewrite_prompt.cache_clear()
    with pytest.raises(InputError, match="'answer' is undefined.*variables are `turns` and `num_images`"):
        rewrite_prompt(str(path))


@pytest.mark.parametrize(
    ("question", "answer", "reply", "reason"),
    [
        ("2 + 2?", "4", "So it is.\nFinal answer: 4", None),
        ("2 + 2?", "We add them. The answer is 4.", "So it is.\nFinal answer: four", None),
        ("2 + 2?", "We add them.\n#### 4", "Final answer: 4.0", None),
        ("2 + 2?", "1 + 3 = 2 + 2 = 4", "Final answer: 4", None),
        ("2 + 2?", "2 + 2 = 4", "Final answer: 5", "final answer changed"),
        ("Which line?", "y = 2x + 1", "Final answer: y = 2x + 1", None),
        ("Half?", r"Half of it: \boxed{\frac{1}{2}}", "Final answer: 0.5", None),
        ("Which?\nA. cat\nB. dog", "B", "It barks.\nFinal answer: dog", None),
        ("二加二？", "答案：4", "二加二等于四。\n最终答案：4", None),
        ("2 + 2?", "4", "So it is.\nFinal answer: 5", "final answer changed"),
        ("Which?\nA. cat\nB. dog", "B", "It purrs.\nFinal answer: A", "final answer changed"),
        ("2 + 2?", "4", "It is found by adding the two numbers, as we have seen.", "final answer missing"),
        ("2 + 2?", "Two apples and two apples are as many as you have fingers without the thumb.", "Final answer: 4",
         "final answer of the original unclear"),
    ],
)  # fmt: skip
def test_a_solution_keeps_its_question_and_its_final_answer(
    question: str, answer: str, reply: str, reason: str | None
) -> None:
    model = Model(lambda _: f"<response: {reply}>")
    done, dropped = rewritten(conversation("7", question, answer), "Code&Math", model)
    assert [row["reason"] for row in dropped] == ([reason] if reason else [])
    assert [turns(row) for row in done] == ([] if reason else [said(question, reply)])


def test_the_answer_of_a_row_is_known_where_it_says_so() -> None:
    row = conversation("7", "2 + 2?", "Two apples and two apples, as anybody knows, are these.") | {"answer": "4"}
    assert known_answer(row) == "4"
    (done,), _ = rewritten(row, "Code&Math", Model())
    assert done["answer"] == "4"


def test_earlier_turns_of_a_solution_stay() -> None:
    messages = [Turn("system", "Be brief."), *said("1 + 1?", "2", "And 2 + 2?", "4")]
    row = {"id": "7", "images": [], "messages": [{"role": one.role, "content": one.text} for one in messages]}
    (done,), _ = rewritten(row, "Code&Math", Model())
    assert turns(done) == [*messages[:-1], Turn("assistant", "Two and two make four.\nFinal answer: 4")]
    assert len(done["completion"]) == 1


def test_a_reply_that_cannot_be_read_is_kept_in_part_with_the_reason() -> None:
    (), (dropped,) = rewritten(conversation("7", "How many? BROKEN", "2"), "General", Model())
    assert dropped == {
        "id": "set/7",
        "source": "set",
        "reason": "reply: no Instruction",
        "reply": ("I cannot do that. " * 400)[:MAX_SHOWN_REPLY],
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(reason="error", error="server gone"), {"reason": "failed", "error": "server gone"}),
        (Model(reason="length"), {"reason": "reply cut off", "reply": REPLIES["general"]}),
    ],
)
def test_a_reply_that_failed_or_was_cut_off_is_none_even_if_it_reads_well(model: Model, expected: Row) -> None:
    assert rewritten(conversation("7", "How many?", "2"), "General", model) == (
        [],
        [{"id": "set/7", "source": "set", **expected}],
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation("7", "How many?", " "), "no answer to rewrite"),
        ({"id": "7", "messages": [{"role": "user", "content": "How many?"}]}, "no answer to rewrite"),
        (conversation("7", "?" * MAX_SHOWN_CHARS, "2"), "too long to be rewritten"),
        ({"id": "7", "messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "no answer to rewrite"),
    ],
)
def test_what_cannot_be_rewritten_is_not_asked_about(row: Row, reason: str) -> None:
    model = Model()
    (), (dropped,) = rewritten(row, "General", model)
    assert dropped["reason"] == reason
    assert model.requests == []


def test_rows_that_are_kept_keep_their_shape() -> None:
    row = {"id": "7", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sources = read_sources({"set": {"path": "a", "category": "Language", "group": "A"}})
    (kept,), _ = keep_rows([{"source": "set", "row": row}], sources, lambda name: name)
    assert kept == {**row, "id": "set/7", "images": [], "source": "set", "category": "Language", "rewritten": False}


def save(path: Path, width: int, height: int, **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 30, 30)).save(path, **more)


SETS = {
    "cot": ("General", "A"), "vqa": ("General", "B"), "web": ("Caption", "B"), "bars": ("Chart", "B"),
    "sums": ("Code&Math", "B"), "signs": ("OCR", "B"), "noise": ("Video", "C"),
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> RewriteConfig:
    """Seven sets of five rows, in two shards each; one reply is broken, and two pictures are."""
    for name, size in {"fit": (300, 300), "small": (20, 100), "large": (4200, 700), "long": (40, 320)}.items():
        save(tmp_path / "data" / "pictures" / f"{name}.png", *size)
    (tmp_path / "data" / "pictures" / "broken.png").write_bytes(b"not a picture")
    pictures = ("fit.png", "small.png", "long.png", "broken.png", "fit.png")
    for name in SETS:
        rows = [conversation(str(n), "2 + 2?", "The answer is 4.", pictures[n], source="own") for n in range(5)]
        if name == "vqa":
            rows[4]["prompt"][0]["content"] = "2 + 2? BROKEN"
        if name == "sums":
            rows[1]["completion"][0]["content"] = "The answer is 5."
        write_rows(tmp_path / "data" / name / "00000.jsonl", rows[:2])
        write_rows(tmp_path / "data" / name / "00001.jsonl", rows[2:])
    sources = {
        name: {"path": str(tmp_path / "data" / name), "category": category, "group": group}
        for name, (category, group) in SETS.items()
    }
    for source in sources.values():
        source["image_folder"] = "data/pictures"
    return RewriteConfig(
        sources=sources, output=str(tmp_path / "out"), image_root=str(tmp_path), model="tiny", shard_size=3
    )


def text_of(body: Row) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def answer(body: Row) -> Row:
    return {"choices": [choice(reply_to(text_of(body)))]}


def other(config: RewriteConfig, **changes: object) -> RewriteConfig:
    return RewriteConfig(**{**vars(config), **changes})


def content(folder: str | Path) -> dict[str, bytes]:
    """All files of a run, hidden ones too."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_sets_are_kept_rewritten_and_dropped(config: RewriteConfig) -> None:
    with FaultyServer(answer=answer) as server:
        summary = run(other(config, server=[server.address]))
    assert summary.rows == [
        ["cot", "General", "A keep", "5", "3", "", "2"],
        ["vqa", "General", "B rewrite", "5", "", "2", "3"],
        ["web", "Caption", "B rewrite", "5", "", "3", "2"],
        ["bars", "Chart", "B rewrite", "5", "", "3", "2"],
        ["sums", "Code&Math", "B rewrite", "5", "", "2", "3"],
        ["signs", "OCR", "B rewrite", "5", "", "3", "2"],
        ["noise", "Video", "C drop", "5", "", "", "5"],
    ]
    reasons = {(source, reason): count for source, reason, count in summary.also[0].rows}
    assert reasons["vqa", "reply: no Instruction"] == "1"
    assert reasons["sums", "final answer changed"] == "1"
    assert reasons["cot", "image longer than 7 times its width"] == "1"
    assert reasons["noise", "group C"] == "5"
    output = Path(config.output)
    assert summary.next_command == f"mpo filter --conversations {output / 'rewritten'} --output filtered"
    rows = list(read_stage(output / "rewritten", Conversation))
    assert len({row["id"] for row in rows}) == len(rows) == 13
    assert Counter(row["category"] for row in rows)["OCR"] == 3
    assert {row["source"] for row in rows} == {"own"}
    assert {row["rewritten"] for row in read_stage(output / "original")} == {False}
    assert drop_reasons(output / "rewritten")["image missing or broken"] == 5
    assert sum(len(body["messages"]) for body in server.calls) == 15
    blind = [body for body in server.calls if "You do not see" in text_of(body)]
    assert len(blind) == 3
    assert "image_url" not in json.dumps(blind)
    assert all("image_url" in json.dumps(body) for body in server.calls if body not in blind)


def test_captions_go_to_a_model_of_their_own(config: RewriteConfig) -> None:
    with FaultyServer(answer=answer) as server, FaultyServer(answer=answer) as texts:
        texts.models = ["llm"]
        run(other(config, server=[server.address], caption_model="llm", caption_server=[texts.address]))
    assert {body["model"] for body in texts.calls} == {"llm"}
    assert [("You do not see" in text_of(body)) for body in texts.calls] == [True] * 3
    assert not any("You do not see" in text_of(body) for body in server.calls)
    rows = read_stage(Path(config.output) / "rewritten")
    assert {row["rewrite"]["model"] for row in rows if row["category"] == "Caption"} == {"llm"}


def test_pictures_are_scaled_where_needed_and_found_under_one_root(config: RewriteConfig, tmp_path: Path) -> None:
    sources = {"cot": config.sources["cot"]}
    run(other(config, sources=sources, model=None))
    rows = {row["id"]: row for row in read_stage(Path(config.output) / "original")}
    assert rows["cot/0"]["images"] == ["data/pictures/fit.png"]
    (scaled,) = rows["cot/1"]["images"]
    assert re.fullmatch(r"out/images/data/pictures/small-[0-9a-f]{8}\.png", scaled)
    with Image.open(tmp_path / scaled) as picture:
        assert picture.size == (224, 1120)
    dataset = sft_dataset([str(Path(config.output) / "original")], tmp_path)
    assert [row["images"][0].size for row in dataset] == [(300, 300), (224, 1120), (300, 300)]


def test_a_turned_photograph_is_scaled_the_right_way_up_and_stays_a_jpeg(
    config: RewriteConfig, tmp_path: Path
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    save(tmp_path / "data" / "pictures" / "photo.jpg", 4200, 700, exif=turned)
    save(tmp_path / "data" / "pictures" / "photo.webp", 40, 100)
    save(tmp_path / "data" / "pictures" / "photo.png", 40, 100)
    names = ["photo.jpg", "photo.webp", "photo.png"]
    write_rows(tmp_path / "rows.jsonl", [conversation("1", "?", "a", *names)])
    source = {**config.sources["cot"], "path": str(tmp_path / "rows.jsonl")}
    run(other(config, sources={"photos": source}))
    (row,) = read_stage(Path(config.output) / "original")
    found = {}
    for name in row["images"]:
        with Image.open(tmp_path / name) as picture:
            found[name] = (picture.format, picture.size, dict(picture.getexif()))
    assert list(found.values()) == [
        ("JPEG", (683, 4096), {}), ("PNG", (224, 560), {}), ("PNG", (224, 560), {}),
    ]  # fmt: skip


def test_both_folders_are_sources_of_a_mixture(config: RewriteConfig, tmp_path: Path) -> None:
    with FaultyServer(answer=answer) as server:
        run(other(config, server=[server.address]))
    made = {"rewritten": True, "original": False}
    sources = {name: {"path": str(tmp_path / "out" / name), "rewritten": one} for name, one in made.items()}
    run_mix(MixConfig(mixture="mammoth_vl", sources=sources, total=10, output=str(tmp_path / "mixed")))
    assert Counter(row["rewritten"] for row in read_stage(tmp_path / "mixed")) == {True: 7, False: 3}


def test_workers_change_nothing(config: RewriteConfig, tmp_path: Path) -> None:
    with FaultyServer(answer=answer) as server:
        run(other(config, server=[server.address]))
        expected = content(config.output)
        Path(config.output).rename(tmp_path / "alone")
        run(other(config, server=[server.address], workers=2))
    assert content(config.output) == expected


@pytest.mark.parametrize("last", [1, 2, 3, 5, 9])  # settings, the set that is dropped, a picture, two shards
def test_a_run_that_is_killed_anywhere_and_started_again_ends_with_the_same_files(
    config: RewriteConfig, tmp_path: Path, last: int
) -> None:
    with FaultyServer(answer=answer) as server:
        served = other(config, server=[server.address])
        run(served)
        expected = content(config.output)
        Path(config.output).rename(tmp_path / "whole")
        run_until_killed("data_builders.rewrite", served, last)
        assert content(config.output) != expected
        summary = run(served)
    assert content(config.output) == expected
    assert len(summary.rows) == 7


def test_a_finished_rewriting_asks_nobody(config: RewriteConfig) -> None:
    with FaultyServer(answer=answer) as server:
        first = run(other(config, server=[server.address]))
        server.calls.clear()
        assert run(other(config, server=[server.address])) == first
    assert server.calls == []


def test_another_group_prompt_or_temperature_wants_another_folder(config: RewriteConfig) -> None:
    with FaultyServer(answer=answer) as server:
        served = other(config, server=[server.address])
        run(served)
        with pytest.raises(InputError, match=r"other settings \(models"):
            run(other(served, temperature=0.0))
        sources = {**config.sources, "noise": {**config.sources["noise"], "group": "A"}}
        with pytest.raises(InputError, match=r"other settings \(sources"):
            run(other(served, sources=sources))


def test_a_model_in_this_process_stammers_and_every_row_says_so(
    config: RewriteConfig, task: Path, tmp_path: Path
) -> None:
    save(tmp_path / "data" / "pictures" / "tiny.png", 32, 32)
    write_rows(tmp_path / "rows.jsonl", [conversation(str(number), "?", "a", "tiny.png") for number in range(3)])
    sources = {
        name: {**config.sources[name], "path": str(tmp_path / "rows.jsonl"), "image_folder": "data/pictures"}
        for name in ("vqa", "web")
    }
    summary = run(
        other(config, sources=sources, model=str(task / "model"), device="cpu", max_new_tokens=4, min_side=32)
    )
    assert [row[3:] for row in summary.rows] == [["3", "", "0", "3"]] * 2
    assert drop_reasons(tmp_path / "out" / "rewritten").keys() <= {"reply cut off", "reply: no Instruction"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sources": {}}, "`sources` is empty"),
        ({"model": None}, "needs a `model`"),
        ({"caption_server": ["http://x"]}, "`caption_server` needs `caption_model`"),
        ({"max_side": 300}, "at least their product"),
        ({"screen_rows": 0}, "`screen_rows` must be at least 1"),
        ({"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config: RewriteConfig, changes: Row, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        other(config, **changes)


def test_a_set_that_nobody_decided_about_sends_the_user_to_its_sheet(config: RewriteConfig) -> None:
    undecided = {**config.sources["vqa"], "group": None}
    with pytest.raises(InputError, match="source 'vqa' has no `group`: look at its sheet"):
        other(config, sources={"vqa": undecided})
    other(config, sources={"vqa": undecided}, screen=True)


def test_a_wrong_image_root_and_an_output_outside_of_it_are_found_before_the_work(
    config: RewriteConfig, tmp_path: Path
) -> None:
    sources = {"cot": {**config.sources["cot"], "image_folder": "pictures"}}
    with pytest.raises(InputError, match=r"source 'cot', row '0': image 'pictures/fit\.png' does not exist"):
        run(other(config, sources=sources))
    with pytest.raises(InputError, match="is not below the image root"):
        run(other(config, image_root=str(tmp_path / "data")))
    assert not Path(config.output).exists()


def test_a_picture_outside_the_root_is_never_read(config: RewriteConfig, tmp_path: Path) -> None:
    save(tmp_path.parent / "secret.png", 300, 300)
    names = ["fit.png", "../../../secret.png", "/etc/passwd", "a\0b"]
    rows = [conversation(str(number), "?", "a", name) for number, name in enumerate(names)]
    write_rows(tmp_path / "rows.jsonl", rows)
    run(other(config, sources={"cot": {**config.sources["cot"], "path": str(tmp_path / "rows.jsonl")}}))
    output = Path(config.output) / "original"
    assert [row["id"] for row in read_stage(output)] == ["cot/0"]
    assert drop_reasons(output) == {"image missing or broken": 3}


class Tags(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


def test_a_sheet_shows_rows_and_pictures_and_asks_no_model(config: RewriteConfig, tmp_path: Path) -> None:
    summary = run(other(config, screen=True, model=None))
    assert summary.rows[0] == ["cot", "General", "A keep", "5", "100%", "1.0", "6", "16"]
    assert summary.notes[1] == f"cot: {tmp_path / 'out' / 'screen' / 'cot.html'}"
    page = (tmp_path / "out" / "screen" / "cot.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert (tags.tags["article"], tags.tags["img"], tags.tags["script"]) == (5, 4, 0)
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert "20 x 100, would be scaled" in page
    assert "40 x 320, too long: left out" in page
    assert "cannot be decoded" in page
    assert "<dt>rows</dt><dd>5</dd>" in page
    assert "default-src &#39;none&#39;" not in page
    assert "default-src 'none'; img-src data:" in page


def test_what_data_hold_is_text_on_a_sheet(config: RewriteConfig, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \u202e \x00"
    write_rows(tmp_path / "rows.jsonl", [conversation(bad, bad, bad + "a" * 9000, bad)])
    run(other(config, sources={"cot": {"path": str(tmp_path / "rows.jsonl"), "category": "OCR"}}, screen=True))
    page = (tmp_path / "out" / "screen" / "cot.html").read_text(encoding="utf-8")
    assert (Tags(page).tags["script"], Tags(page).links) == (0, [])
    assert "{{ 7 * 7 }}" in page
    assert "[U+202E] ␀" in page
    assert len(page) < 12_000


def test_the_rows_of_a_sheet_depend_on_the_seed_and_not_on_where_they_lie(
    config: RewriteConfig, tmp_path: Path
) -> None:
    def drawn(paths: list[str], seed: int) -> list[str]:
        source = {"path": paths, "category": "Language"}
        run(other(config, sources={"words": source}, screen=True, screen_rows=20, seed=seed))
        page = (tmp_path / "out" / "screen" / "words.html").read_text(encoding="utf-8")
        return re.findall(r'<p class="id"><span>(\w+)</span>', page)

    rows = [conversation(f"r{number}", "?", "a") for number in range(200)]
    write_rows(tmp_path / "one.jsonl", rows)
    write_rows(tmp_path / "a.jsonl", rows[:150:-1])
    write_rows(tmp_path / "b.jsonl", rows[:151])
    one = drawn([str(tmp_path / "one.jsonl")], 0)
    assert len(set(one)) == 20
    assert drawn([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], 0) == one
    assert drawn([str(tmp_path / "one.jsonl")], 1) != one


def test_a_source_that_is_not_there_is_named(config: RewriteConfig) -> None:
    missing = {"gone": {"path": "nowhere", "category": "OCR", "group": "A"}}
    for screen in (True, False):
        with pytest.raises(InputError, match="source 'gone': nowhere does not exist"):
            run(other(config, sources=missing, screen=screen))
