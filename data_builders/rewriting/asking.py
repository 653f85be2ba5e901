"""What a model is asked about a row, and what of the row may be asked about at all.

Whoever rewrites sees all turns of a row and its pictures; whoever rewrites a caption sees the caption alone, never a
picture. Markup in the turns is broken up, so that nothing in there stands for a picture or ends the message.
"""

import re
from functools import cache
from pathlib import Path

from data_builders.conversations import Turn, turns
from data_builders.formats.protocol import RefusedError
from data_builders.prompts.templates import PromptTemplate, defused, load_template
from data_builders.records import InputError, Row
from data_builders.rewriting.grammars import Grammar
from data_builders.rules.extract import MAX_ANSWER_CHARS, extract_answer
from data_builders.samplers import Request
from data_builders.verify import judge_response

MAX_SHOWN_CHARS = 32_000

_FOLDER = Path(__file__).parent.parent / "prompts" / "rewrite"
_EXAMPLE = {"turns": [Turn("user", "How many?"), Turn("assistant", "3")], "num_images": 1}
_SUM = re.compile(r"[\d\s.,+\-*/^%()$×÷·−]{1,200}=")  # a side of an equation that is arithmetic alone
_GSM8K = re.compile(r"^#### *(\S.*)$", re.MULTILINE)  # how that data set, and those after it, mark a final answer


@cache
def rewrite_prompt(name: str) -> PromptTemplate:
    """The prompt of a grammar, or a `.jinja` file of the user's own.

    Raises:
        InputError: There is no such file, or it cannot be rendered.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file():
        raise InputError(
            f"there is no rewriting prompt {name!r}: give a path to a .jinja file, or leave `prompt` out."
        )
    return load_template(path, _EXAMPLE, "rewriting prompt")


def request_for(row: Row, grammar: Grammar, prompt: PromptTemplate) -> Request:
    """What is asked about a row; a caption's pictures stay out of it."""
    blind = grammar == "caption"
    images = () if blind else tuple(row.get("images") or ())
    shown = [Turn(turn.role, defused(turn.text).strip()) for turn in turns(row)]
    return Request(prompt.render(turns=shown, num_images=len(images)), images)


def check_rewritable(row: Row, grammar: Grammar) -> None:
    """Lets pass what can be rewritten.

    Raises:
        RefusedError: Nothing was answered, the row is too long to be shown, or its final answer, which a rewritten
            solution must keep, cannot be made out.
    """
    said = turns(row)
    if said[-1].role != "assistant" or not said[-1].text.strip() or (grammar != "caption" and not _question(said)):
        raise RefusedError("no answer to rewrite")
    if (num_chars := sum(len(turn.text) for turn in said)) > MAX_SHOWN_CHARS:
        raise RefusedError("too long to be rewritten", f"{num_chars:,} characters, of {MAX_SHOWN_CHARS:,} at most")
    if grammar == "math" and known_answer(row) is None:
        raise RefusedError("final answer of the original unclear", said[-1].text[-200:])


def check_same_answer(row: Row, response: str) -> None:
    """Lets pass a rewritten solution with the final answer of the original.

    Raises:
        RefusedError: It has another one, or none that is clear.
    """
    answer = known_answer(row)
    assert answer is not None, f"{row['id']} was not to be rewritten"
    judgement = judge_response(response, answer, question=_question(turns(row)))
    if judgement.verdict == "no_answer":
        raise RefusedError("final answer missing", f"it was {answer}")
    if judgement.verdict == "wrong":
        raise RefusedError("final answer changed", f"from {answer} to {judgement.prediction}")


def known_answer(row: Row) -> str | None:
    r"""The final answer of a row: its `answer`, or what its last turn states; None where that is unclear.

    >>> row = {"prompt": [{"role": "user", "content": "2 + 2?"}]}
    >>> [known_answer({**row, "completion": [{"role": "assistant", "content": text}]})
    ...  for text in ("4", "2 + 2 = 4", "We add.\nThe answer is 4.", "We add.\n#### 4", "Found by adding the two.")]
    ['4', '4', '4', '4', None]
    """
    if isinstance(row.get("answer"), str) and row["answer"].strip():
        return row["answer"]
    text = turns(row)[-1].text
    marked = _GSM8K.findall(text[-2 * MAX_ANSWER_CHARS :])
    answer = marked[-1].strip() if marked else extract_answer(text)
    while answer and (worked_out := _SUM.match(answer)):
        answer = answer[worked_out.end() :].strip() or None
    return answer


def _question(said: list[Turn]) -> str:
    return next((turn.text for turn in reversed(said) if turn.role == "user" and turn.text.strip()), "")
