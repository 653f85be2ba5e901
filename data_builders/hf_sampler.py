"""Answers with a transformers model in this process; torch is imported when a sampler is made, not before."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders import decoding, drawing
from data_builders.images import image_size, load_image
from data_builders.records import InputError
from data_builders.samplers import Completion, Request, SamplingSettings
from data_builders.tiling.views import load_tiling, tile_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

logger = logging.getLogger(__name__)


def load_processor(model: str | Path, *, trust_remote_code: bool = False) -> "ProcessorMixin":
    """The processor of a vision-language model.

    Raises:
        InputError: There is no such model, or it has no processor.
    """
    from transformers import AutoProcessor, ProcessorMixin

    _check_folder(model)
    try:
        processor = AutoProcessor.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        _check_found(model, error)
        raise InputError(_no_processor(model, f"{error!s:.300}")) from error
    if not isinstance(processor, ProcessorMixin):
        raise InputError(_no_processor(model, f"found only a {type(processor).__name__}"))
    return processor


def _no_processor(model: str | Path, reason: str) -> str:
    return (
        f"{model} has no processor for text and images ({reason}). A vision-language model's folder needs "
        "`processor_config.json`, tokenizer files and a chat template: copy them from the model it was trained from, "
        "or call `processor.save_pretrained(...)` where you save the model."
    )


def load_model(model: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> "PreTrainedModel":
    """A vision-language model with its own dtype, from safetensors only.

    Args:
        model: A folder or a name on the Hub.
        trust_remote_code: Whether Python code that comes with the model may run.
        settings: More arguments of `from_pretrained`.

    Raises:
        InputError: There is no such model, or it is not one that takes images and text.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    _check_folder(model)
    try:
        return AutoModelForImageTextToText.from_pretrained(
            str(model), trust_remote_code=trust_remote_code, use_safetensors=True, **{"dtype": "auto", **settings}
        )
    except (OSError, ValueError, SafetensorError) as error:
        _check_found(model, error)
        raise InputError(
            f"{model} cannot be loaded as a vision-language model ({error!s:.500}). It must be a whole model folder "
            "of a family that takes images and text, with weights in safetensors."
        ) from error


def _check_found(model: str | Path, error: Exception) -> None:
    """Says so when it is not the model that is wrong but its name, or the way to the Hub."""
    if not Path(model).exists():
        raise InputError(
            f"there is no model folder {model}, and it could not be taken from the Hub either ({error!s:.200}). Check "
            "the path or the name, and the connection."
        ) from error


def _check_folder(model: str | Path) -> None:
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(
            f"{model} is not a model folder (it has no config.json): the step that writes it has not run."
        )
    if not path.exists() and (path.is_absolute() or len(path.parts) != 2):
        raise InputError(f"there is no model folder {model}, and it is not a Hub name (`owner/name`) either.")


class HFSampler:
    """Answers with a transformers model in this process.

    The prompt and the pictures of a request are computed once for all its completions, where the model's cache can be
    copied (found out by trying, and said where not). Tokens are drawn with random numbers that depend on the seed and
    the request alone. Of the model's own generation config only its special tokens and `drawing.CONSTRAINTS` count.
    Pictures are cut as those of its training were, where its folder says so (`tiling.json`).

    Args:
        model: A model folder or Hub name.
        image_root: The folder that image paths are relative to.
        batch_size: How many sequences are generated at a time; halved when memory runs out.
        device: Where the model runs; None takes a GPU where there is one.
        dtype: "auto" takes the model's own.

    Raises:
        InputError: There is no such model, or it is one that answers cannot be begun for.
    """

    def __init__(
        self,
        model: str,
        *,
        image_root: Path,
        batch_size: int = 64,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        import torch

        self.name = model
        self.image_root = image_root
        self.batch_size = batch_size
        self.processor = load_processor(model, trust_remote_code=trust_remote_code)
        self.tokenizer = self.processor.tokenizer
        self.tiling = load_tiling(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(model, trust_remote_code=trust_remote_code, dtype=dtype).to(device).eval()
        if self.model.config.is_encoder_decoder:
            raise InputError(
                f"{model} has an encoder and a decoder: the beginning of an answer cannot be put behind its prompt. "
                "Take a model that reads and writes one text, as those that chat do."
            )
        self.image_tokens = image_tokens(self.processor, self.model)
        self.image_marks = [mark for mark in self.tokenizer.convert_ids_to_tokens(self.image_tokens) if mark]
        self._shares: dict[tuple[bool, bool], bool] = {}  # see `_can_share`
        self._set_generation_config()

    def _set_generation_config(self) -> None:
        shipped = self.model.generation_config
        if constraints := drawing.constraints_of(shipped):
            logger.warning("%s: tokens are drawn under its generation config's %s", self.name, constraints)
        tokenizer = self.tokenizer
        ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        self.model.generation_config = drawing.generation_config(
            shipped, ends=ends, never=self.image_tokens, pad=tokenizer.pad_token_id
        )

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        """`num` completions for each request; requests of similar length share a batch.

        A request that alone is too large for the memory is answered with errors.

        Raises:
            InputError: A prompt contains an image token, or a picture is missing or broken.
        """
        each = num if settings.temperature > 0 else min(num, 1)  # greedy ones are all the same
        found: list[list[Completion]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            if self._image_mark(request.prefix):
                found[index] = [Completion(request.prefix, "error", "the prefix contains an image token")] * each
        waiting = self._by_length(requests, [i for i in range(len(requests)) if len(found[i]) < each], each)
        while waiting:
            kind = bool(requests[waiting[0]].images)
            batch = [i for i in waiting if bool(requests[i].images) == kind][: max(1, self.batch_size // each)]
            done = len(found[batch[0]])  # of a request that takes several batches, which has one to itself
            numbers = range(done, min(each, done + self.batch_size))
            for index, group in zip(
                batch, self._answer([requests[i] for i in batch], numbers, settings), strict=False
            ):
                found[index] += group
            waiting = [i for i in waiting if len(found[i]) < each]
        return [group * (num // max(1, each)) for group in found]

    def _by_length(self, requests: Sequence[Request], chosen: list[int], each: int) -> list[int]:
        """The shortest first, in tokens; those without pictures before those with."""
        if self.batch_size < 2 * each:
            return chosen
        return sorted(chosen, key=lambda i: (bool(requests[i].images), self._num_tokens(requests[i]), i))

    def _num_tokens(self, request: Request) -> int:
        """Of the prompt with its pictures, which most processors can count by their sizes alone."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if request.images and (count is None or self.tiling):
            return self._encode([request])["input_ids"].shape[1]
        text = self._text(chat_messages(request.prompt, len(request.images)), request.prefix)
        num = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(request.images)
        sizes = [self._size(name) for name in request.images]
        return num + sum(count(image_sizes=sizes)["num_image_tokens"]) if sizes else num

    def _size(self, name: str) -> tuple[int, int]:
        try:
            return image_size(self.image_root, name)
        except InputError:
            return 1, 1  # it is refused with advice when it is loaded

    def _answer(self, requests: list[Request], numbers: range, settings: SamplingSettings) -> list[list[Completion]]:
        """The completions with these numbers; none at all if memory ran out, and the next batch is smaller."""
        import torch

        try:
            with torch.inference_mode():
                return self._generate(requests, numbers, settings)
        except (RuntimeError, MemoryError) as error:
            if not decoding.is_out_of_memory(error):
                raise
            reason = f"{error!s:.120}"
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        num_sequences = len(requests) * len(numbers)
        if num_sequences > 1:
            self.batch_size = num_sequences // 2
            logger.warning(
                "memory ran out with %d sequences at a time (%s): going on with `batch_size` %d",
                num_sequences,
                reason,
                self.batch_size,
            )
            return []
        logger.warning("the prompt %r is too large for the memory (%s)", f"{requests[0].prompt:.80}", reason)
        return [[Completion(requests[0].prefix, "error", "memory ran out for this request alone")]]

    def _generate(self, requests: list[Request], numbers: range, settings: SamplingSettings) -> list[list[Completion]]:
        num = len(numbers)
        inputs = self._encode(requests).to(self.model.device, dtype=self.model.dtype)
        share = self._can_share(requests)
        draw = self._draw(requests, numbers, settings)
        rows = decoding.decode(self.model, inputs, num, draw, settings.max_new_tokens, share=share)
        last, broken = inputs["input_ids"][:, -1].tolist(), draw.broken.tolist()
        completions = [
            self._completion(None if broken[row] else ids, last[row // num], requests[row // num].prefix)
            for row, ids in enumerate(rows)
        ]
        if settings.top_logprobs:
            completions = [self._with_logps(*pair) for pair in zip(completions, draw.likeliest, strict=True)]
        return [completions[start : start + num] for start in range(0, len(rows), num)]

    def _draw(self, requests: list[Request], numbers: range, settings: SamplingSettings) -> drawing.Draw:
        import torch

        num_rows = len(requests) * len(numbers)
        if settings.temperature == 0:
            return drawing.Draw(num_rows, None, num_likeliest=settings.top_logprobs)
        keys, steps = [(settings.seed, request) for request in requests], settings.max_new_tokens
        uniforms = torch.cat([drawing.random_numbers(key, numbers.stop, steps)[numbers.start :] for key in keys])
        device = "cpu" if self.model.device.type == "mps" else self.model.device  # MPS has no float64
        kept = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        kept["num_likeliest"] = settings.top_logprobs
        return drawing.Draw(num_rows, uniforms.to(device), **kept)

    def _can_share(self, requests: list[Request]) -> bool:
        """Tried once for each of: with pictures or without, one prompt or several."""
        kind = bool(requests[0].images), len(requests) > 1
        if kind not in self._shares:
            inputs = self._encode(requests[:2]).to(self.model.device, dtype=self.model.dtype)
            reason = decoding.why_not_shared(self.model, inputs)
            self._shares[kind] = reason is None
            if reason and list(self._shares.values()).count(False) == 1:
                logger.warning(
                    "%s: each completion computes its prompt anew, as the model's cache cannot be copied (%s)",
                    self.name,
                    reason,
                )
        return self._shares[kind]

    def _text(self, messages: list[dict[str, Any]], prefix: str) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=True) + prefix

    def _shown(self, request: Request) -> tuple[list[dict[str, Any]], list[Any]]:
        """The messages of a request, and the pictures that they have places for."""
        messages, load = chat_messages(request.prompt, len(request.images)), partial(load_image, self.image_root)
        if self.tiling is None or not request.images:
            return messages, [load(name) for name in request.images]
        row = tile_row({"images": request.images, "prompt": messages}, load, self.tiling)
        return row["prompt"], row["images"]

    def _encode(self, requests: list[Request]) -> Any:
        for request in requests:
            if mark := self._image_mark(request.prompt):
                raise InputError(
                    f"the prompt {request.prompt!r:.80} contains {mark}, which stands for a picture: take it out of "
                    "the question; pictures go before the text and are named in `images` alone."
                )
        shown = [self._shown(request) for request in requests]
        images = [images for _, images in shown]
        return self.processor(
            images=images if any(images) else None,
            text=[self._text(messages, r.prefix) for (messages, _), r in zip(shown, requests, strict=True)],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )

    def _image_mark(self, text: str) -> str | None:
        return next((mark for mark in self.image_marks if mark in text), None)

    def _completion(self, ids: list[int] | None, last: int, prefix: str) -> Completion:
        """What stands behind a prompt that ends with the token `last`."""
        if ids is None:
            return Completion(prefix, "error", "the model's scores are not numbers")
        has_ended = bool(ids) and ids[-1] in (self.model.generation_config.eos_token_id or [])
        # some tokenizers drop the space before the first token of a text, so a prefix is decoded with its last token
        before = [last] if prefix else []
        text = prefix + self._decode(before + (ids[:-1] if has_ended else ids))[len(self._decode(before)) :]
        if self._image_mark(text):
            return Completion(text, "error", "the response contains an image token")
        return Completion(text, "stop" if has_ended else "length")

    def _with_logps(self, completion: Completion, likeliest: list[tuple[int, float]]) -> Completion:
        if completion.error:
            return completion
        return replace(completion, first_logps=tuple((self._decode([id]), logp) for id, logp in likeliest))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chat_messages(prompt: str, num_images: int) -> list[dict[str, Any]]:
    """The user's turn in the form that chat templates take: images first, then the text."""
    return [
        {
            "role": "user",
            "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": prompt}],
        }
    ]


def image_tokens(processor: "ProcessorMixin", model: "PreTrainedModel") -> list[int]:
    """Ids of the tokens that stand for pictures in a prompt: no response may contain them."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {getattr(model.config, name, None) for name in (*names, "boi_token_id", "eoi_token_id")}
    ids.add(getattr(processor.tokenizer, "image_token_id", None))
    return sorted(id for id in ids if isinstance(id, int))
