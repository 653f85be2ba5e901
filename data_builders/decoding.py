"""Many continuations of each prompt from one prefill, for any decoder that transformers can generate with.

`generate` prepares what differs between families (positions, masks, the vision tower's output, the cache) and hands
over to the loop here in place of its own: one forward of the prompts, a copy of their cache for each continuation, and
then token by token. Rows that have ended leave the batch once they are half of it.

Nothing here knows requests or texts, or how tokens are chosen (`data_builders.drawing`). Torch is imported when
something is decoded, not before.

Shapes: R prompts, `num` continuations of each, B = R * num rows, those of one prompt side by side; V tokens to choose
from.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel

    Choose = Callable[[Tensor, Tensor, int], Tensor]  # see `decode`

# Of a check's scores. Rounding in bfloat16 moves them by about 0.02 of their spread, a wrong prompt by 0.4 and more.
_TOLERANCE = 0.1
_CHECKED_STEPS = 2  # the first token comes from the prompts' forward, the second from the copied cache


class CannotShareError(Exception):
    """The model keeps its past in a way that cannot be copied row by row."""


def decode(
    model: "PreTrainedModel",
    inputs: dict[str, Any],
    num: int,
    choose: "Choose",
    max_new_tokens: int,
    *,
    share: bool = True,
) -> list[list[int]]:
    """Continues each prompt `num` times.

    Args:
        model: A decoder with a generation config that samples by nothing of its own (`drawing.generation_config`).
        inputs: What its processor made of R prompts, padded on the left, on its device.
        num: Continuations of each prompt.
        choose: Takes scores (b, V), the rows that they are of (b,), and how many tokens these have by now; gives the
            next ones (b,).
        max_new_tokens: Of a continuation, at most.
        share: Whether prompts are computed once and not `num` times; see `why_not_shared`.

    Returns:
        New tokens of each row, with the one that ended it if any did.
    """
    if not share:
        return list(_generated(model, inputs, num, choose, max_new_tokens))
    loop = _Loop(num, choose, max_new_tokens)
    model.generate(**inputs, custom_generate=loop.run, do_sample=False, max_new_tokens=max_new_tokens)
    return loop.tokens()


class _Loop:
    """Takes the place of `generate`'s own loop; see `decode`."""

    def __init__(self, num: int, choose: "Choose", max_new_tokens: int) -> None:
        self.num, self.choose, self.max_new_tokens = num, choose, max_new_tokens

    def run(
        self,
        model: "PreTrainedModel",
        input_ids: "Tensor",
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: "GenerationConfig",
        **state: Any,
    ) -> "Tensor":
        """What `generate` calls, with everything prepared; its processors are of R rows and so are made anew."""
        import torch

        if state.get("inputs_embeds") is not None:
            raise CannotShareError("it generates from embeddings that it computes itself")
        self.model, self.config, self.width = model, generation_config, input_ids.shape[1]
        outputs = model(
            **model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state), return_dict=True
        )
        logits = outputs.logits[:, -1].float()
        copies = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(self.num)
        state = _rows_of(state, copies, input_ids.shape)
        self.state = model._update_model_kwargs_for_generation(outputs, state, is_encoder_decoder=False)
        del outputs
        self.cache = _cache_of(self.state)
        self.cache.reorder_cache(copies)
        self.ids = input_ids[copies]
        self.written = self.ids.new_zeros(len(copies), self.max_new_tokens)
        self.lengths = self.ids.new_zeros(len(copies))
        with getattr(model, "_optimize_model_for_decode", nullcontext)():
            self._continue(logits[copies])
        return self.ids

    def _continue(self, logits: "Tensor") -> None:
        """Writes token after token until all rows have ended."""
        import torch

        ends = self.lengths.new_tensor(self.config.eos_token_id or [])
        live = torch.arange(len(logits), device=logits.device)
        going = logits.isfinite().any(dim=-1)  # of the live rows: those that have not ended
        processors = self._processors()
        for step in range(self.max_new_tokens):
            tokens = self.choose(processors(self.ids, logits), live, step)
            self.written[live, step] = tokens
            self.lengths[live] += going
            going &= ~torch.isin(tokens, ends)
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
            num_going = int(going.sum())
            if not num_going or step + 1 == self.max_new_tokens:
                return
            if 2 * num_going <= len(live):
                live, going = live[going], self._keep(going.nonzero()[:, 0])
                processors = self._processors()
            logits = self._forward()

    def _forward(self) -> "Tensor":
        """Logits of the next token; takes the last one into the cache."""
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.state)
        outputs = self.model(**inputs, return_dict=True)
        self.state = self.model._update_model_kwargs_for_generation(outputs, self.state, is_encoder_decoder=False)
        return outputs.logits[:, -1].float()

    def _keep(self, rows: "Tensor") -> "Tensor":
        """Goes on with these rows alone, none of which has ended."""
        import torch

        # the newest tokens are not in the cache yet, and the state is as long as the tokens with them
        self.state = _rows_of(self.state, rows, self.ids.shape)
        self.cache.reorder_cache(rows)
        self.ids = self.ids[rows]
        return torch.ones_like(rows, dtype=torch.bool)

    def _processors(self) -> "LogitsProcessorList":
        """The model's `CONSTRAINTS` for the rows as they are: repetition penalties know each row's padding."""
        return self.model._get_logits_processor(
            self.config, self.width, self.ids[:, : self.width], device=self.ids.device, model_kwargs=self.state
        )

    def tokens(self) -> list[list[int]]:
        """New tokens of each row."""
        lengths = self.lengths.tolist()
        return [row[:length] for row, length in zip(self.written.tolist(), lengths, strict=True)]


def _rows_of(state: dict[str, Any], rows: "Tensor", shape: tuple[int, int]) -> dict[str, Any]:
    """The state of some rows, or of copies of them: what is as long as their tokens, and what is no tensor.

    The rest belongs to pictures, which the prompts' forward has used up.
    """
    from torch import Tensor
    from transformers import Cache

    kept = {}
    for name, value in state.items():
        if name == "position_ids" and value is not None:
            dim = value.ndim - 2  # M-RoPE has one row of positions for time, height and width each, in front
            kept[name] = value if value.shape[dim] < shape[0] else value.index_select(dim, rows)
        elif isinstance(value, Tensor) and value.shape[:2] == tuple(shape):
            kept[name] = value.index_select(0, rows)
        elif value is None or isinstance(value, bool | int | float | str | Cache):
            kept[name] = value
    return kept


def _cache_of(state: dict[str, Any]) -> "Cache":
    from transformers import Cache

    caches = [value for value in state.values() if isinstance(value, Cache)]
    if len(caches) != 1:
        raise CannotShareError(f"it keeps {len(caches)} caches and not one")
    return caches[0]


def _generated(
    model: "PreTrainedModel", inputs: dict[str, Any], num: int, choose: "Choose", max_new_tokens: int
) -> Iterator[list[int]]:
    """By transformers' own loop, with the same tokens: it is left no choice."""
    import torch
    from transformers import LogitsProcessorList

    step = 0

    def leave_one(input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        nonlocal step
        tokens = choose(scores, torch.arange(len(scores), device=scores.device), step)
        step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    with torch.random.fork_rng():  # it draws from the process-wide numbers, though from one token
        output = model.generate(
            **inputs,
            do_sample=num > 1,
            num_return_sequences=num,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([leave_one]),
        )
    prompts = inputs["input_ids"].repeat_interleave(num, dim=0)
    width = prompts.shape[1]
    has_prompts = output.shape[1] >= width and torch.equal(output[:, :width], prompts)
    ends = set(model.generation_config.eos_token_id or [])
    for row in output[:, width if has_prompts else 0 :].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        yield row[: stop + 1]


def why_not_shared(model: "PreTrainedModel", inputs: dict[str, Any]) -> str | None:
    """Whether copies of a prompt's cache go on as the prompt itself does, found out by trying.

    Args:
        model: As for `decode`.
        inputs: As for `decode`, of two prompts if there are two: mixing rows up shows with these only.

    Returns:
        Why not, or None if they do.
    """
    import torch

    length = {"min_new_tokens": _CHECKED_STEPS, "max_new_tokens": _CHECKED_STEPS, "do_sample": False}
    found = []
    try:
        reference = model.generate(**inputs, **length, output_scores=True, return_dict_in_generate=True)
        tokens = reference.sequences[:, -_CHECKED_STEPS:].repeat_interleave(2, dim=0)

        def repeat(scores: "Tensor", rows: "Tensor", step: int) -> "Tensor":
            found.append(scores)
            return tokens[rows, step]

        model.generate(**inputs, **length, custom_generate=_Loop(2, repeat, _CHECKED_STEPS).run)
        expected = torch.stack(reference.scores, dim=1).repeat_interleave(2, dim=0)
        return _difference(torch.stack(found, dim=1), expected)
    except (
        CannotShareError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error!s:.200}"


def _difference(found: "Tensor", expected: "Tensor") -> str | None:
    found, expected = found.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0)  # -inf: tokens that are ruled out
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    relative = ((found - expected).norm(dim=-1) / spread).nan_to_num(0.0).max()
    if relative <= _TOLERANCE:
        return None
    return f"its scores are {float(relative):.0%} of their spread away from those of `generate`"


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU or of this machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)
