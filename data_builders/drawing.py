"""What decides each token: a model's constraints, the sampling settings, and random numbers of each row's own.

Nothing here runs a model. Torch is imported when something is drawn, not before.

Shapes: B rows, V tokens to choose from.
"""

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, LogitsProcessorList

# What a model's own generation config may still say about tokens. Its temperature, top_k, min_p and the like may not:
# rows say what they were drawn with.
CONSTRAINTS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_new_tokens",
)


def generation_config(
    shipped: "GenerationConfig", *, ends: set[int], never: list[int], pad: int | None
) -> "GenerationConfig":
    """What is left of a model's generation config, so that it changes nothing that rows do not say.

    Args:
        shipped: The model's own: its `CONSTRAINTS` and its special tokens are kept.
        ends: Further tokens that end a response.
        never: Further tokens that no response contains.
        pad: Fills rows up; None takes the model's own.
    """
    from transformers import GenerationConfig

    own = shipped.eos_token_id if isinstance(shipped.eos_token_id, list) else [shipped.eos_token_id]
    kept = {name: getattr(shipped, name, None) for name in (*CONSTRAINTS, "bos_token_id", "decoder_start_token_id")}
    kept["suppress_tokens"] = sorted({*(kept["suppress_tokens"] or []), *never}) or None
    eos = sorted(ends | {token for token in own if token is not None}) or None
    pad = shipped.pad_token_id if pad is None else pad
    return GenerationConfig(**kept, eos_token_id=eos, pad_token_id=eos[0] if pad is None and eos else pad)


def constraints_of(shipped: "GenerationConfig") -> dict[str, Any]:
    """Which of `CONSTRAINTS` a model's own generation config makes use of."""
    found = {name: getattr(shipped, name, None) for name in CONSTRAINTS}
    nothing = {"repetition_penalty": 1.0}
    return {name: value for name, value in found.items() if value and value != nothing.get(name)}


def random_numbers(key: object, num: int, steps: int) -> "Tensor":
    """Numbers that depend on a key alone, (num, steps), from 0 up to 1; the first rows are the same for any `num`.

    Args:
        key: Anything whose `repr` says all of it.
        num: Of rows.
        steps: Of each row.
    """
    import torch

    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(num, steps, generator=generator, dtype=torch.float64)


class Draw:
    """Chooses the next token of each row: the likeliest, or the one that the row's own random number points at.

    Args:
        num_rows: B.
        uniforms: Random numbers in [0, 1) for each row and step, (B, steps), on a device that has float64; None is
            greedy.
        temperature: Above 0; it, `top_k` and `top_p` are applied as transformers does and in its order.
        top_k: Keeps the k likeliest tokens; 0 keeps every token.
        top_p: Nucleus sampling; 1 keeps every token.
        num_likeliest: Likeliest first tokens that are kept with their log-probabilities.

    Attributes:
        broken: Rows for which the model gave NaN or infinity, (B,).
        likeliest: Of each row's first step: ids of tokens and log-probabilities before temperature, `top_k` and
            `top_p`, the likeliest first; empty if none were asked for.
    """

    def __init__(
        self,
        num_rows: int,
        uniforms: "Tensor | None",
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_likeliest: int = 0,
    ) -> None:
        import torch

        self.uniforms = uniforms
        self.broken = torch.zeros(num_rows, dtype=torch.bool, device=None if uniforms is None else uniforms.device)
        self.warpers = None if uniforms is None else _warpers(temperature, top_k, top_p)
        self.num_likeliest = num_likeliest
        self.likeliest: list[list[tuple[int, float]]] = []

    def __call__(self, scores: "Tensor", rows: "Tensor", step: int) -> "Tensor":
        """Tokens of some rows.

        Args:
            scores: Their logits, (b, V).
            rows: Which rows they are of, (b,).
            step: Tokens that each of them has by now.
        """
        if step == 0 and self.num_likeliest:
            self.likeliest = _likeliest(scores, self.num_likeliest)
        highest, tokens = scores.max(dim=-1)
        self.broken = self.broken.to(scores.device)
        self.broken[rows] |= ~highest.isfinite()
        if self.uniforms is None:
            return tokens
        numbers = self.uniforms[rows.to(self.uniforms.device), step]
        pointed_at = _pointed_at(self.warpers(None, scores).to(numbers.device), numbers).to(tokens.device)
        # a temperature too small for division leaves no probabilities, and means the likeliest
        return pointed_at.where(pointed_at < scores.shape[-1], tokens)


def _likeliest(scores: "Tensor", num: int) -> list[list[tuple[int, float]]]:
    logps, ids = scores.float().log_softmax(dim=-1).topk(min(num, scores.shape[-1]))
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logps.tolist(), strict=True)]


def _warpers(temperature: float, top_k: int, top_p: float) -> "LogitsProcessorList":
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _pointed_at(scores: "Tensor", numbers: "Tensor") -> "Tensor":
    """Where cumulative probabilities (b, V) pass numbers (b,): no token of probability 0, and V where all is NaN."""
    import torch

    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    thresholds = numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
