"""Prompt styles: their names, what they ask, and what is said about a template that does not work."""

from pathlib import Path

import pytest

from data_builders.prompts import prompt_style
from data_builders.records import InputError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "How many?"),
        ("direct", "How many?\nAnswer with a single word, number or letter."),
        ("final_answer", 'How many?\nThink step by step, then write "Final answer: ..." at the end.'),
        (
            "boxed",
            'How many?\nThink step by step. The last line of your response must be "Answer: \\boxed{...}", '
            "with nothing but the answer in the box.",
        ),
    ],
)
def test_a_style_asks_in_these_words(name: str, text: str) -> None:
    assert prompt_style(name).render("How many?") == text
    assert prompt_style(name).name == name


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
        f"there is no prompt style {name!r}: choose one of boxed, direct, final_answer, plain, or give a path to a "
        ".jinja file."
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
