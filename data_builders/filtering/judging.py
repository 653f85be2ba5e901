"""A model as judge of a conversation: is it relevant, consistent and accurate? It says Yes or No, and nothing else.

It is shown the pictures and every turn. Markup in the turns is broken up before it sees them, so that nothing in there
can stand for a picture, for another turn or for the end of the message.
Source: the self-filter of https://arxiv.org/abs/2412.05237 (MAmmoTH-VL); the wording is our own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_builders.conversations import Turn, turns
from data_builders.prompts import is_chinese
from data_builders.prompts.templates import PromptTemplate, defused, load_template
from data_builders.records import InputError, Row
from data_builders.samplers import Completion, Request, Sampler, SamplingSettings

MAX_REPLY_CHARS = 200

_FOLDER = Path(__file__).parent.parent / "prompts" / "filter"
_NAMES = ("filter", "filter_zh")
_EXAMPLE = {"turns": [Turn("user", "?"), Turn("assistant", "1")], "num_images": 1}
_VERDICTS = {"Yes": True, "Yes.": True, "No": False, "No.": False}
_DRESS = " \t\r\n\u2581\u0120"  # also how SentencePiece and byte-level tokenizers write a space
_PROBABILITY_DIGITS = 4  # what is behind depends on what shares a batch

Prompts = tuple[PromptTemplate, PromptTemplate]


@dataclass(frozen=True)
class Opinion:
    """What a judge made of a conversation.

    Attributes:
        is_good: Its word; None if it said anything but Yes or No, or nothing.
        p_yes: See `yes_probability`; None where it is not known.
        said: For the row: its name, the prompt's version, `p_yes` if known, and the reply, or why there is none.
    """

    is_good: bool | None
    p_yes: float | None
    said: Row

    @property
    def failed(self) -> bool:
        """Whether there is no reply."""
        return "error" in self.said


@cache
def filter_prompt(name: str) -> PromptTemplate:
    """The prompt of that name (`filter`, `filter_zh`), or of a `.jinja` file with the variables `turns`, `num_images`.

    Raises:
        InputError: There is no such prompt, or its template cannot be rendered.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file() or (not name.endswith(".jinja") and name not in _NAMES):
        raise InputError(
            f"there is no filter prompt {name!r}: choose filter or filter_zh, or a path to a .jinja file."
        )
    return load_template(path, _EXAMPLE, "filter prompt")


def prompts_for(name: str) -> Prompts:
    """The prompt for conversations in general and the one for Chinese ones, which differ for `filter` alone."""
    return filter_prompt(name), filter_prompt("filter_zh" if name == "filter" else name)


def judge_conversations(
    rows: Sequence[Row], sampler: Sampler, settings: SamplingSettings, *, prompts: Prompts, need_p_yes: bool = False
) -> list[Opinion]:
    """What a model thinks of each conversation; the same one is asked about once.

    Args:
        rows: Conversation rows, whose pictures can be opened.
        sampler: The model.
        settings: How its tokens are drawn, and how many log-probabilities it is asked for.
        prompts: For conversations in general, and for Chinese ones.
        need_p_yes: Whether there is no going on without log-probabilities.

    Raises:
        InputError: They are needed, and the sampler gives none.
    """
    asked_by = [prompts[is_chinese(_first_question(row))] for row in rows]
    requests = [
        Request(_rendered(prompt, row), tuple(row.get("images") or ()))
        for row, prompt in zip(rows, asked_by, strict=True)
    ]
    distinct = list(dict.fromkeys(requests))
    found = [group[0] for group in (sampler.sample(distinct, 1, settings) if distinct else [])]
    if need_p_yes and any(reply.first_logps is None for reply in found if not reply.error):
        raise InputError(
            f"`min_p_yes` needs log-probabilities, and {sampler.name} answers without any: servers need "
            "`top_logprobs`, which vLLM and SGLang have and `transformers serve` has not. Leave `min_p_yes` out, or "
            "let the model run elsewhere, as in this process."
        )
    replies = dict(zip(distinct, found, strict=True))
    return [
        _opinion(replies[request], {"model": sampler.name, "prompt": prompt.id})
        for request, prompt in zip(requests, asked_by, strict=True)
    ]


def _first_question(row: Row) -> str:
    return next((turn.text for turn in turns(row) if turn.role == "user"), "")


def _rendered(prompt: PromptTemplate, row: Row) -> str:
    shown = [Turn(turn.role, defused(turn.text)) for turn in turns(row)]
    return prompt.render(turns=shown, num_images=len(row.get("images") or ()))


def _opinion(reply: Completion, origin: Row) -> Opinion:
    if reply.error:
        return Opinion(None, None, {**origin, "error": reply.error[:MAX_REPLY_CHARS]})
    thought = "</think>" in reply.text  # then the first token is no verdict
    p_yes = None if thought or reply.first_logps is None else yes_probability(reply.first_logps)
    known = {} if p_yes is None else {"p_yes": p_yes}
    return Opinion(read_verdict(reply.text), p_yes, {**origin, **known, "reply": reply.text[:MAX_REPLY_CHARS]})


def read_verdict(text: str) -> bool | None:
    r"""The judge's word: exactly `Yes` or `No`, None for all else.

    Spaces around it, one full stop behind it and `<think>...</think>` before it are passed over.

    >>> [read_verdict(text) for text in ("Yes", " No.\n", "<think>hm</think>Yes", "yes", "Yes, but", "")]
    [True, False, True, None, None, None]
    """
    return _VERDICTS.get(text.rpartition("</think>")[2].strip())


def yes_probability(first_logps: Sequence[tuple[str, float]]) -> float | None:
    """How much of what a judge gives to Yes and to No as its first token it gives to Yes, to 4 digits.

    All spellings of a word count: in any case, with a space before it or without.

    Args:
        first_logps: The likeliest first tokens and their log-probabilities.

    Returns:
        P(Yes) / (P(Yes) + P(No)); None if neither word is among the tokens.

    >>> yes_probability([("Yes", math.log(0.5)), (" yes", math.log(0.1)), ("No", math.log(0.2)), ("I", -3.0)])
    0.75
    """
    weights = {"yes": 0.0, "no": 0.0}
    for token, logp in first_logps:
        word = token.strip(_DRESS).casefold()
        if word in weights:
            weights[word] += math.exp(logp)
    total = weights["yes"] + weights["no"]
    return round(weights["yes"] / total, _PROBABILITY_DIGITS) if total else None
