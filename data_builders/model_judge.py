"""A model decides where rules cannot: is this answer to an open question the known one, yes or no?

It is asked about the final answer of a response, or about its end where no final answer stands out, and is shown the
picture only if wanted. Whatever it says beyond a plain yes or no is no verdict. Markup in questions and answers is
broken up before it sees them, so that nothing in there can stand for a picture or end the message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_builders.prompts import is_chinese
from data_builders.prompts.templates import PromptTemplate, defused, load_template
from data_builders.records import InputError, Row
from data_builders.rules.text import clean
from data_builders.samplers import Completion, Request, Sampler, SamplingSettings
from data_builders.verify import accepted_answers

OPEN_RULES = ("text", "anls")
MAX_RESPONSE_CHARS = 2_000
MAX_ANSWERS = 20
MAX_REPLY_CHARS = 200

_FOLDER = Path(__file__).parent / "prompts"
_EXAMPLE = {"question": "?", "answers": ["1"], "answer_given": "1"}
_YES = {"yes", "是", "是的"}
_NO = {"no", "否", "不是"}


@dataclass(frozen=True)
class JudgePrompt:
    """The question that a judge is asked.

    Attributes:
        template: Jinja text with the variables `question`, `answers` (a list) and `answer_given`.
    """

    template: PromptTemplate

    @property
    def id(self) -> str:
        """Name and version, as in `judge@0123abcd`."""
        return self.template.id

    def render(self, row: Row) -> str:
        """What the model is given for a verdict row, images aside."""
        given = row["prediction"] or row["response"][-MAX_RESPONSE_CHARS:]
        return self.template.render(
            question=defused(row["question"]),
            answers=[defused(answer) for answer in accepted_answers(row)[:MAX_ANSWERS]],
            answer_given=defused(given),
        )


@cache
def judge_prompt(name: str) -> JudgePrompt:
    """The judge's prompt of that name (`judge`, `judge_zh`), or of a `.jinja` file.

    Raises:
        InputError: There is no such prompt, or its template cannot be rendered.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file() or (not name.endswith(".jinja") and name not in ("judge", "judge_zh")):
        raise InputError(f"there is no judge prompt {name!r}: choose judge or judge_zh, or a path to a .jinja file.")
    return JudgePrompt(load_template(path, _EXAMPLE, "judge prompt"))


def prompts_for(name: str) -> tuple[JudgePrompt, JudgePrompt]:
    """The prompt for questions in general and the one for Chinese ones, which differ for `judge` alone."""
    return judge_prompt(name), judge_prompt("judge_zh" if name == "judge" else name)


def needs_model(row: Row, *, open_only: bool) -> bool:
    """Whether a verdict row of the rules is put to the model.

    Args:
        row: A verdict row; failed responses and answers without any text are never asked about.
        open_only: Ask only where rules compare wordings (the kinds `text` and `anls`) and found two different ones.
    """
    if open_only:
        return row["verdict"] == "wrong" and row["rule"] in OPEN_RULES
    return row["rule"] not in ("failed", "empty_answer")


def judge_by_model(
    rows: Sequence[Row],
    sampler: Sampler,
    settings: SamplingSettings,
    *,
    prompts: tuple[JudgePrompt, JudgePrompt],
    with_image: bool = False,
) -> list[Row]:
    """The verdicts of a model on rows that rules have judged; the same question is asked once.

    Args:
        rows: Verdict rows with a response.
        sampler: The model.
        settings: How its tokens are drawn.
        prompts: For questions in general, and for Chinese ones.
        with_image: Show it the pictures too.

    Returns:
        The rows with the rule `model`, the model's verdict (`no_answer` where it gave none), and under `judge` its
        name, the prompt's version, its reply, and the verdict and rule that its own replaces.
    """
    asked_by = [prompts[is_chinese(row["question"])] for row in rows]
    requests = [
        Request(prompt.render(row), tuple(row.get("images", ())) if with_image else ())
        for row, prompt in zip(rows, asked_by, strict=True)
    ]
    distinct = list(dict.fromkeys(requests))
    replies = dict(zip(distinct, sampler.sample(distinct, 1, settings) if distinct else [], strict=True))
    return [
        {**row, **_outcome(row, replies[request][0], {"model": sampler.name, "prompt": prompt.id})}
        for row, request, prompt in zip(rows, requests, asked_by, strict=True)
    ]


def _outcome(row: Row, reply: Completion, origin: Row) -> Row:
    is_yes = None if reply.error else read_reply(reply.text)
    verdict = "no_answer" if is_yes is None else "correct" if is_yes else "wrong"
    said = {"error": reply.error} if reply.error else {"reply": reply.text[:MAX_REPLY_CHARS]}
    return {
        "verdict": verdict,
        "rule": "model",
        "judge": {**origin, **said, "rules": {"verdict": row["verdict"], "rule": row["rule"]}},
    }


def read_reply(text: str) -> bool | None:
    """What a judge said, None for all but one word; case, punctuation and thoughts before it aside.

    >>> [read_reply(text) for text in ("Yes", "**no.**", "是。", "<think>hm</think> NO!", "Yes, but", "")]
    [True, False, True, False, None, None]
    """
    word = clean(text.rpartition("</think>")[2][:MAX_REPLY_CHARS]).strip(" .!?。()[]").casefold()
    return word in _YES if word in _YES | _NO else None
