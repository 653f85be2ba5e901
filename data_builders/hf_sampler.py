"""Answers with a transformers model in this process; torch is imported when a sampler is made, not before."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.images import load_image
from data_builders.records import InputError
from data_builders.samplers import Completion, Request, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


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

    Args:
        model: A model folder or Hub name.
        image_root: The folder that image paths are relative to.
        batch_size: How many sequences are generated at a time; a request's completions stay together.
        device: Where the model runs; None takes a GPU where there is one.
        dtype: "auto" takes the model's own.
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
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(model, trust_remote_code=trust_remote_code, dtype=dtype).to(device).eval()
        self.image_tokens = image_tokens(self.processor, self.model)
        self.image_marks = [mark for mark in self.tokenizer.convert_ids_to_tokens(self.image_tokens) if mark]

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        """`num` completions for each request; requests of similar length share a batch."""
        order = sorted(
            (i for i, request in enumerate(requests) if not self._image_mark(request.prefix)),
            key=lambda i: (bool(requests[i].images), len(requests[i].prompt) + len(requests[i].prefix), i),
        )
        completions = [[Completion(r.prefix, "error", "the prefix contains an image token")] * num for r in requests]
        per_batch = max(1, self.batch_size // num)
        for with_images in (False, True):
            group = [i for i in order if bool(requests[i].images) == with_images]
            for start in range(0, len(group), per_batch):
                batch = group[start : start + per_batch]
                outputs = self._generate([requests[i] for i in batch], num, settings)
                for position, index in enumerate(batch):
                    completions[index] = outputs[position * num : (position + 1) * num]
        return completions

    def _generate(self, requests: list[Request], num: int, settings: SamplingSettings) -> list[Completion]:
        import torch

        inputs = self._encode(requests).to(self.model.device, dtype=self.model.dtype)
        greedy = settings.temperature == 0
        drawing = (
            {} if greedy else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        )
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(_batch_seed(settings.seed, requests))
            output = self.model.generate(
                **inputs,
                do_sample=not greedy,
                num_return_sequences=1 if greedy else num,
                max_new_tokens=settings.max_new_tokens,
                suppress_tokens=self.image_tokens or None,
                **drawing,
            )
        if greedy:
            output = output.repeat_interleave(num, dim=0)
        width = inputs["input_ids"].shape[1]
        prefixes = [request.prefix for request in requests for _ in range(num)]
        return [self._completion(row.tolist(), width, prefix) for row, prefix in zip(output, prefixes, strict=True)]

    def _encode(self, requests: list[Request]) -> Any:
        for request in requests:
            if mark := self._image_mark(request.prompt):
                raise InputError(
                    f"the prompt {request.prompt!r:.80} contains {mark}, which stands for a picture: take it out of "
                    "the question; pictures go before the text and are named in `images` alone."
                )
        texts = [
            self.processor.apply_chat_template(chat_messages(r.prompt, len(r.images)), add_generation_prompt=True)
            + r.prefix
            for r in requests
        ]
        images = [[load_image(self.image_root, name) for name in r.images] for r in requests]
        return self.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )

    def _image_mark(self, text: str) -> str | None:
        return next((mark for mark in self.image_marks if mark in text), None)

    def _completion(self, row: list[int], width: int, prefix: str) -> Completion:
        ids = row[width:]
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        ids = ids if stop is None else ids[:stop]
        # some tokenizers drop the space before the first token of a text, so a prefix is decoded with its last token
        before = row[width - 1 : width] if prefix else []
        text = prefix + self._decode(before + ids)[len(self._decode(before)) :]
        if self._image_mark(text):
            return Completion(text, "error", "the response contains an image token")
        return Completion(text, "length" if stop is None else "stop")

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


def _batch_seed(seed: int, requests: list[Request]) -> int:
    """A seed that depends on what is asked and not on what was asked before, so that resuming changes nothing."""
    digest = hashlib.sha256(repr((seed, requests)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
