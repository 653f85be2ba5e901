"""Prompt styles: their names, what they ask, and what is said about a template that does not work."""

import hashlib
import time
from pathlib import Path
from typing import Literal

import pytest

import data_builders.prompts
from data_builders import extract_answer
from data_builders.prompts import STYLES, is_chinese, prompt_style
from data_builders.prompts.instructions import strip_instructions
from data_builders.records import InputError

FOLDER = Path(data_builders.prompts.__file__).parent


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


ENGLISH = {
    "plain": "How many?",
    "direct": "How many?\nAnswer with a single word, number or letter.",
    "final_answer": 'How many?\nThink step by step, then write "Final answer: ..." at the end.',
    "boxed": 'How many?\nThink step by step. The last line of your response must be "Answer: \\boxed{...}", '
    "with nothing but the answer in the box.",
    "think": "How many?\nFirst think step by step between <think> and </think>. After that, write "
    '"Final answer: ..." on a line of its own.',
}
CHINESE = {
    "plain": "有几只猫？",
    "direct": "有几只猫？\n请只用一个词语、数字或选项字母回答。",
    "final_answer": "有几只猫？\n请一步一步地思考，最后写出“最终答案：……”。",
    "boxed": "有几只猫？\n请一步一步地思考。回答的最后一行必须是“答案：\\boxed{...}”，方框里只写答案。",
    "think": "有几只猫？\n请先在 <think> 和 </think> 之间一步一步地思考，然后另起一行写出“最终答案：……”。",
}


@pytest.mark.parametrize("name", ENGLISH)
def test_a_style_asks_in_these_words(name: str) -> None:
    assert prompt_style(name).render("How many?") == ENGLISH[name]
    assert prompt_style(name).name == name


@pytest.mark.parametrize("name", CHINESE)
def test_a_style_asks_a_chinese_question_in_chinese(name: str) -> None:
    style = prompt_style(name).for_question("有几只猫？")
    assert style.render("有几只猫？") == CHINESE[name]
    assert style.name == ("plain" if name == "plain" else f"{name}_zh")
    assert prompt_style(name, "zh").for_question("How many?") == style
    assert prompt_style(name, "en").for_question("有几只猫？") == prompt_style(name, "en")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("图中有几只猫？", True),
        ("如图，在△ABC中，AB=AC，∠B=70°，求∠A", True),
        (r"\frac{\sqrt{3}}{2} 等于多少", True),
        ("哪个是对的？\nA. Apple juice\nB. Banana bread", True),
        ("A. 苹果\nB. 香蕉", True),
        ("图中有几只猫？\nAnswer the question using a single word or phrase.", True),
        ("How many cats are there?", False),
        ("How many cats are there?\n请直接回答选项字母。", False),
        ("What does 你好 mean?", False),
        ("画像に何が見えますか", False),
        ("이 사진에는 무엇이 있습니까?", False),
        ("12 + 5 = ?", False),
        ("", False),
    ],
)
def test_the_script_of_what_is_asked_tells_the_language(question: str, answer: bool) -> None:
    assert is_chinese(question) is answer


def test_rows_of_both_languages_say_which_file_they_were_asked_with() -> None:
    style = prompt_style("final_answer")
    english, chinese = style.for_question("How many?"), style.for_question("有几只猫？")
    assert english.id == f"final_answer@{sha256(FOLDER / 'final_answer.jinja')}"
    assert chinese.id == f"final_answer_zh@{sha256(FOLDER / 'final_answer_zh.jinja')}"
    assert style.ids == [english.id, chinese.id]
    assert prompt_style("final_answer", "en").ids == [english.id]


def test_a_users_own_translation_stands_beside_the_template(tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text("{{ question }} Be short.", encoding="utf-8")
    path = str(tmp_path / "short.jinja")
    assert prompt_style(path).ids == [prompt_style(path).id]
    with pytest.raises(InputError, match=r"short.jinja' has no Chinese wording: write one to .*short_zh\.jinja"):
        prompt_style(path, "zh")
    (tmp_path / "short_zh.jinja").write_text("{{ question }}请简短。", encoding="utf-8")
    assert prompt_style(path, "zh").render("几只猫？") == "几只猫？请简短。"


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("final_answer", "2 and 1.\nFinal answer: 3"),
        ("final_answer_zh", "两只加一只。\n最终答案：3"),
        ("boxed", "2 and 1.\nAnswer: \\boxed{3}"),
        ("boxed_zh", "两只加一只。\n答案：\\boxed{3}"),
        ("think", "<think>2 and 1.</think>\nFinal answer: 3"),
        ("think_zh", "<think>两只加一只。</think>\n最终答案：3"),
        ("direct", "3"),
        ("direct_zh", "3"),
    ],
)
def test_the_answer_is_found_where_the_style_asks_for_it(name: str, response: str) -> None:
    assert prompt_style(name)
    assert extract_answer(response, style=name.removesuffix("_zh")) == extract_answer(response) == "3"


def test_every_style_is_listed_and_has_both_wordings() -> None:
    words = {f"{name}{end}" for name in STYLES for end in ("", "_zh")} - {"plain_zh"}
    assert {path.stem for path in FOLDER.glob("*.jinja") if not path.stem.startswith("judge")} == words


# Instructions of the source

STRIPPED = [
    "Answer the question using a single word or phrase.",
    "Answer the question using a single word or phrase",
    "please answer the question using a single word or phrase .",
    "Answer with a single word.",
    "Answer in one word.",
    "Answer the question with a short phrase.",
    "Answer with a single word, number or letter.",
    "Answer with the option's letter from the given choices directly.",
    "Answer with the option\u2019s letter from the given choices directly.",
    "Answer with the option letter from the given choices directly.",
    "Please answer directly with only the letter of the correct option and nothing else.",
    "Please answer with the letter of the correct option.",
    "Please select the correct answer from the options above.",
    "Please answer yes or no.",
    "Answer the question with Yes or No.",
    "Please answer with 'yes' or 'no'.",
    "(Answer with yes or no.)",
    "put your final answer in \\boxed{}",
    "Please put your final answer in $\\boxed{}$.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Let's think step by step and output the final answer within \\boxed{}.",
    "Let's think step by step.",
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
    "at the end.",
    "Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
    "[1, 2, 3], [1.2, 1.3, 1.4], at the end.",
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.",
    "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags.",
    "Give a short answer.",
    "Answer the question directly and concisely.",
    "Only give the final answer.",
    "Answer yes or no.\nAnswer the question using a single word or phrase.\n",
    "请直接回答选项字母。",
    "请用一个词或短语回答问题。",
    "请使用单个词或短语回答这个问题。",
    "请回答是或否。",
    "请用“是”或“否”回答。",
    "（请回答是或否）",
    "请直接用给定选项中的选项字母作答。",
    "请直接给出答案。",
    "请把最终答案放在\\boxed{}中。",
    "请逐步推理，并将最终答案写在\\boxed{}内。",
    "请一步一步思考。",
    "提示：请回答问题并在最后给出正确的选项字母，例如 A、B、C、D。",
]


@pytest.mark.parametrize("instruction", STRIPPED)
def test_an_instruction_at_the_end_is_taken_off(instruction: str) -> None:
    for question in ("Is it red?", "How many\nA. 2\nB. 3", "图中有猫吗？"):
        assert strip_instructions(f"{question}\n{instruction}") == question
    assert strip_instructions(f"Is it red? {instruction}") == "Is it red?"
    assert strip_instructions(f"图中有猫吗？{instruction}") == "图中有猫吗？"


@pytest.mark.parametrize(
    "question",
    [
        "Answer the question in the picture.",
        "Answer the question that the woman asks.",
        "Answer the question using a single word or phrase.",
        "<image>\nAnswer the question using a single word or phrase.",
        "Please answer yes or no.",
        "请直接回答选项字母。",
        "How would you answer with a single word?",
        "Is the cat black, yes or no?",
        "Did they answer yes or no?",
        "Which is it?\nA. red\nB. blue",
        "Which is it? (A) a single word (B) a phrase",
        "What does the sign say about how to answer yes or no",
        "Please answer yes or no. Is it red?",
        "Let's think step by step. How many are there?",
        "What is in the box?",
        "Write the answer that stands in the box.",
        "Describe the image in one sentence.",
        "What do you see when you think step by step",
        "Why does the text say 'Final answer: 3'?",
        "If the image does not tell, respond with 'unanswerable'.",
        "Give the ratio as a fraction, and a short reason.",
        "他直接回答了什么？",
        "图中的人在思考什么？",
        "  \n",
        "",
    ],
)
def test_what_is_asked_stays(question: str) -> None:
    assert strip_instructions(question) == question


def test_instructions_are_taken_off_before_another_style_is_put_around() -> None:
    question = "How many?\nAnswer the question using a single word or phrase."
    assert prompt_style("final_answer").render(question) == ENGLISH["final_answer"]
    assert prompt_style("plain").render(question) == question


@pytest.mark.parametrize("name", ["direct", "final_answer", "boxed", "think"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_wrapped_question_can_be_wrapped_again(name: str, language: Literal["en", "zh"]) -> None:
    for question in ("How many?", "有几只猫？"):
        wrapped = prompt_style(name, language).render(question)
        assert strip_instructions(wrapped) == question
        assert prompt_style("direct").render(wrapped) == prompt_style("direct").render(question)


@pytest.mark.parametrize(
    "question",
    [
        "Answer yes or no. " * 50_000,
        "(" * 200_000,
        "a single word, " * 20_000,
        "think step by step " * 9_000,
        "是" * 99_999,
    ],
)
def test_a_hostile_question_costs_next_to_nothing(question: str) -> None:
    start = time.perf_counter()
    strip_instructions(question)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("question", ["{{ 7 * 7 }}", "{% raw %}<b> & \"c\" 'd'", "图中有几只猫？", "a\n\nb\t{# c #}"])
def test_a_question_is_text_and_never_a_template(question: str) -> None:
    assert prompt_style("plain").render(question) == question
    assert prompt_style("direct").render(question).startswith(question + "\n")


def test_a_users_own_template_is_a_style_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "polite.jinja"
    path.write_text("Please: {{ question }}{% if '?' not in question %}?{% endif %}\n\n", encoding="utf-8")
    style = prompt_style(str(path))
    assert (style.name, style.render("How many"), style.render("Why?")) == (
        "polite",
        "Please: How many?",
        "Please: Why?",
    )


def test_the_version_follows_the_wording_and_not_the_name(tmp_path: Path) -> None:
    for name, text in {"a": "{{ question }}", "b": "{{ question }}", "c": "{{ question }}!"}.items():
        (tmp_path / f"{name}.jinja").write_text(text, encoding="utf-8")
    a, b, c = (prompt_style(str(tmp_path / f"{name}.jinja")).version for name in "abc")
    assert a == b == "ef6fb466"  # sha256("{{ question }}")
    assert c != a


@pytest.mark.parametrize("name", ["cot", "", "Plain", "../prompts/plain", "/etc/passwd", "no_such.jinja", "plain.txt"])
def test_an_unknown_style_is_refused_with_the_ones_there_are(name: str) -> None:
    with pytest.raises(InputError) as error:
        prompt_style(name)
    assert str(error.value) == (
        f"there is no prompt style {name!r}: choose one of boxed, direct, final_answer, plain, think, or give a path "
        "to a .jinja file."
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ question ", "unexpected end of template"),
        ("{% if %}", "Expected an expression"),
        ("{{ Question }}", "'Question' is undefined"),
        ("{{ question }} {{ options }}", "'options' is undefined"),
        ("{{ question.__class__.__mro__ }}", "unsafe"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_with_the_reason(
    tmp_path: Path, template: str, reason: str
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text(template, encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"broken\.jinja cannot be rendered \(.*{reason}.* only variable is `questio"
    ):
        prompt_style(str(path))


def test_a_template_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.jinja").write_bytes("où: {{ question }}".encode("latin-1"))
    with pytest.raises(InputError, match=r"old\.jinja cannot be rendered .* a Jinja template in UTF-8"):
        prompt_style(str(tmp_path / "old.jinja"))
