"""Samplers: what turns prompts into responses.

A sampler is anything with the methods of `Sampler`: `data_builders.hf_sampler` runs a model in this process,
`data_builders.server_sampler` asks OpenAI-compatible servers.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from data_builders.records import InputError, Row

_WORD = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+?(?=[\u3040-\u30ff\u3400-\u9fff])|\w+|[^\w\s])"
)


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        prompt: The user's turn, images aside.
        images: Paths relative to the sampler's image root.
        prefix: The beginning of the answer, to be continued as if the model had written it.
    """

    prompt: str
    images: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Completion:
    """One answer. `text` is what was generated, with the prefix before it; `error` says why there is none.

    `first_logps` are the likeliest first tokens and their log-probabilities, where they were asked for and the sampler
    knows them.
    """

    text: str
    finish_reason: str
    error: str | None = None
    first_logps: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: Nucleus sampling; 1 keeps every token.
        top_k: Keeps the k likeliest tokens; 0 keeps every token.
        max_new_tokens: Generated tokens, at most; a response that reaches it ends with finish_reason "length".
        seed: The same seed, model and requests give the same answers.
        top_logprobs: Likeliest first tokens that a completion says the log-probabilities of, those before temperature,
            `top_k` and `top_p`; 0 asks for none. It changes no answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Refuses what nothing can be drawn with.

        Raises:
            InputError: A setting is out of its range.
        """
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "top_logprobs": (0 <= self.top_logprobs <= 20, "between 0 and 20, which is what servers give"),
        }
        for name, (holds, words) in ranges.items():
            if not holds:
                raise InputError(f"`{name}` must be {words}, got {getattr(self, name)}.")

    def provenance(self) -> Row:
        """What answers depend on."""
        return {name: value for name, value in asdict(self).items() if name != "top_logprobs"}


def word_ends(text: str) -> list[int]:
    """Where each word, each Chinese or Japanese character and each punctuation mark ends, in characters.

    >>> word_ends("two words, 三只")
    [3, 9, 10, 12, 13]
    """
    return [match.end() for match in _WORD.finditer(text)]


class Sampler(Protocol):
    """What a step needs of a model."""

    name: str

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        """`num` completions for each request, in the order of the requests."""

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
