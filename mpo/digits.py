"""The quickstart's task and model: questions about handwritten digits, and a model small enough to learn them.

A picture holds four scans in a 2 x 2 grid, each moved about in its cell, with noise. Three kinds of question need all
four to be read and reasoned over in turn; the rationales read one digit at a time and carry the running result along.
The model has 0.9 million parameters and learns on a laptop.
Scans: scikit-learn's `load_digits` (1,797 scans of 8 x 8, from UCI's Optical Recognition of Handwritten Digits).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_builders.prompts import prompt_style
from data_builders.records import Row
from data_builders.shards import write_rows

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

CELL, SIZE = 16, 32  # pixels: a digit's cell, the picture's side
PLACES = ("first", "second", "third", "fourth")  # in reading order
KINDS = ("sum", "largest", "count")
COT, DIRECT = "final_answer", "direct"
NUM_SFT_SCANS, NUM_DEVELOPMENT_SCANS, NUM_TEST_SCANS = 60, 237, 500
_SPLIT_SEED = 2024  # development and test scans are the same in every run, whatever its seed


@dataclass(frozen=True)
class Scans:
    """Handwritten digits.

    Attributes:
        pixels: Brightness in [0, 1], (N, 8, 8).
        labels: Which digit it is, (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "Scans":
        """The scans at these places."""
        return Scans(self.pixels[indices], self.labels[indices])


def split_scans(seed: int) -> dict[str, Scans]:
    """All scans in four parts that share none: `sft`, `preference`, `development` and `test`.

    Development and test scans never change. Which of the others get rationales (`sft`, six of each digit) depends on
    the seed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = Scans(data.images.astype(np.float32) / 16.0, data.target)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(scans.labels))
    held_out = NUM_TEST_SCANS + NUM_DEVELOPMENT_SCANS
    rest = np.random.default_rng([_SPLIT_SEED, seed]).permutation(order[held_out:])
    per_digit = NUM_SFT_SCANS // 10
    sft = np.concatenate([rest[scans.labels[rest] == digit][:per_digit] for digit in range(10)])
    return {
        "sft": scans.take(sft),
        "preference": scans.take(np.setdiff1d(rest, sft)),
        "development": scans.take(order[NUM_TEST_SCANS:held_out]),
        "test": scans.take(order[:NUM_TEST_SCANS]),
    }


Compose = Callable[[Scans, int, np.random.Generator], np.ndarray]  # scans, pictures -> which scans, (pictures, 4)


def any_scans(scans: Scans, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which scans stand in each picture: any four, whatever stands beside them, (count, 4)."""
    return rng.integers(0, len(scans.labels), (count, 4))


def draw_pictures(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Four scans to a picture: enlarged, moved about in their cells, of varying brightness, with noise.

    Args:
        pixels: Brightness in [0, 1], (N, 4, 8, 8).
        rng: Where the jitter comes from.

    Returns:
        Grey values 0 to 255, (N, 32, 32).
    """
    count = len(pixels)
    digit = pixels.repeat(3, axis=-1).repeat(3, axis=-2)  # (N, 4, 24, 24)
    digit = digit.reshape(count, 4, 12, 2, 12, 2).mean(axis=(3, 5))  # (N, 4, 12, 12)
    digit *= rng.uniform(0.7, 1.0, (count, 4, 1, 1))
    canvas = np.zeros((count, 4, CELL, CELL), np.float32)
    shifts = rng.integers(0, CELL - 12 + 1, (count, 4, 2))
    for row in range(CELL - 12 + 1):
        for column in range(CELL - 12 + 1):
            here = (shifts == (row, column)).all(axis=-1)
            canvas[here, row : row + 12, column : column + 12] = digit[here]
    canvas += rng.normal(0.0, 0.12, canvas.shape)
    grid = canvas.reshape(count, 2, 2, CELL, CELL).swapaxes(2, 3).reshape(count, SIZE, SIZE)
    return (grid.clip(0.0, 1.0) * 255).astype(np.uint8)


def ask(kind: str, digits: Iterable[int], threshold: int) -> tuple[str, str, str]:
    """A question about four digits, its rationale and its answer.

    Args:
        kind: One of `KINDS`.
        digits: The four digits in the order of `PLACES`.
        threshold: k of "how many digits are larger than k".

    >>> ask("sum", [3, 5, 8, 1], 0)[1]
    'first is 3. second is 5, sum 8. third is 8, sum 16. fourth is 1, sum 17. Final answer: 17'
    """
    questions = {
        "sum": "What is the sum of the digits?",
        "largest": "What is the largest digit?",
        "count": f"How many digits are larger than {threshold}?",
    }
    steps, result = [], 0
    for position, (place, digit) in enumerate(zip(PLACES, digits, strict=True)):
        before = result
        if kind == "sum":
            result = before + digit
            step = f", sum {result}" if position else ""
        elif kind == "largest":
            result = max(before, digit)
            step = f", largest {result}"
        else:
            result = before + (digit > threshold)
            step = f", count {result}"
        steps.append(f"{place} is {digit}{step}.")
    return questions[kind], " ".join([*steps, f"Final answer: {result}"]), str(result)


@dataclass(frozen=True)
class _Item:
    digits: list[int]
    kind: str
    question: str
    rationale: str
    answer: str


def _make_items(
    scans: Scans, count: int, rng: np.random.Generator, compose: Compose
) -> tuple[np.ndarray, list[_Item]]:
    """Pictures (count, 32, 32) and what is asked about them; the kinds of question take turns."""
    chosen = compose(scans, count, rng)
    pictures = draw_pictures(scans.pixels[chosen], rng)
    items = []
    for index, digits in enumerate(scans.labels[chosen].tolist()):
        kind = KINDS[index % len(KINDS)]
        items.append(_Item(digits, kind, *ask(kind, digits, int(rng.integers(2, 8)))))
    return pictures, items


def _save_pictures(pictures: np.ndarray, folder: Path, prefix: str) -> list[str]:
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{prefix}-{index:05d}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return names


def write_questions(
    path: Path,
    scans: Scans,
    count: int,
    *,
    prefix: str,
    seed: int,
    with_answers: bool = True,
    compose: Compose = any_scans,
) -> None:
    """Writes a questions file with its pictures beside it; `digits` of a row says what its picture holds.

    Args:
        path: The JSONL file; pictures go to `images/` in the same folder.
        scans: What the pictures are made of.
        count: How many questions.
        prefix: Start of every row's id.
        seed: Of composition, jitter and noise.
        with_answers: False leaves every answer unknown (null), as for free-form questions.
        compose: Which scans stand together.
    """
    pictures, items = _make_items(scans, count, np.random.default_rng(seed), compose)
    names = _save_pictures(pictures, path.parent, prefix)
    rows = [
        {
            "id": f"{prefix}-{index:05d}",
            "images": [name],
            "question": item.question,
            "answer": item.answer if with_answers else None,
            "source": item.kind,
            "digits": item.digits,
        }
        for index, (name, item) in enumerate(zip(names, items, strict=True))
    ]
    write_rows(path, rows)


def write_sft_rows(path: Path, scans: Scans, count: int, *, seed: int, compose: Compose = any_scans) -> None:
    """Writes conversations with rationales for supervised fine-tuning, in TRL's prompt-completion format.

    Three in four ask for a rationale, the others for the bare answer. One in five has no picture and the digits in the
    question instead, so that the model knows how to go on when it sees no picture. `compose` says which scans stand
    together.
    """
    rng = np.random.default_rng(seed)
    pictures, items = _make_items(scans, count, rng, compose)
    names = _save_pictures(pictures, path.parent, "sft")
    rows: list[Row] = []
    for index, (name, item) in enumerate(zip(names, items, strict=True)):
        without_picture, direct = rng.random() < 0.2, rng.random() < 0.25
        question = f"The digits are {', '.join(map(str, item.digits))}. " if without_picture else ""
        prompt = prompt_style(DIRECT if direct else COT).render(question + item.question)
        rows.append(
            {
                "id": f"sft-{index:05d}",
                "images": [] if without_picture else [name],
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": item.answer if direct else item.rationale}],
            }
        )
    write_rows(path, rows)


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of a few hundred tokens, trained on these texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    one_digit = pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated")  # 27 is two tokens: sums are learned by place
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([one_digit, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        padding_side="left",
        extra_special_tokens={"image_token": special[3]},
    )


def build_model(
    tokenizer: "PreTrainedTokenizerFast", *, seed: int
) -> tuple["LlavaProcessor", "LlavaForConditionalGeneration"]:
    """An untrained LLaVA: CLIP tower 128 wide with 2 layers and 4 patches, Llama 128 wide with 3 layers."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    image_processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.25] * 3, image_std=[0.35] * 3
    )
    processor = transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
            "image_size": SIZE,
            "patch_size": CELL,
            "projection_dim": 128,
            **wide,
        },
        text_config={
            "model_type": "llama",
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **wide,
        },
        image_token_id=tokenizer.image_token_id,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def write_model(
    folder: Path, texts: Iterable[str], scans: Scans, *, seed: int, vision_seed: int, vision_steps: int = 300
) -> None:
    """Writes the model that SFT starts from: a language model that knows nothing, and a tower that has seen digits.

    Args:
        folder: Gets the model and its processor.
        texts: What the tokenizer is trained on.
        scans: What the tower sees: the SFT scans.
        seed: Of the weights.
        vision_seed: Of the tower's pictures.
        vision_steps: Batches of 64 that the tower sees.
    """
    processor, model = build_model(train_tokenizer(texts), seed=seed)
    pretrain_vision(model, processor, scans, steps=vision_steps, seed=vision_seed)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def conversation_texts(rows: Iterable[Row]) -> Iterator[str]:
    """What prompts and completions of SFT rows say."""
    return (message["content"] for row in rows for message in row["prompt"] + row["completion"])


def pretrain_vision(
    model: "LlavaForConditionalGeneration", processor: "LlavaProcessor", scans: Scans, *, steps: int, seed: int
) -> float:
    """Trains vision tower and projector to tell digits and places apart, as ready-made ones would be able to.

    Args:
        model: Changed in place, but for its language model.
        processor: Scales pixels as later in training.
        scans: The SFT scans alone; jitter makes new pictures of them.
        steps: Batches of 64 pictures.
        seed: Of the pictures.

    Returns:
        Share of digits that were told apart in the last ten batches.
    """
    import torch
    import torch.nn.functional as F

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    head = torch.nn.Linear(tower.config.hidden_size, 10 + len(PLACES))
    places = torch.arange(len(PLACES)).expand(64, -1)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *projector.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    hits: list[float] = []
    for _ in range(steps):
        chosen = rng.integers(0, len(scans.labels), (64, 4))
        pictures = torch.from_numpy(draw_pictures(scans.pixels[chosen], rng)).float() / 255
        labels = torch.from_numpy(scans.labels[chosen])  # (64, 4)
        pixels = ((pictures - mean) / std)[:, None].expand(-1, 3, -1, -1)
        logits = head(projector(tower(pixel_values=pixels).last_hidden_state[:, 1:]))  # (64, 4, 14)
        digit_logits, place_logits = logits.split([10, len(PLACES)], dim=-1)
        loss = F.cross_entropy(digit_logits.flatten(0, 1), labels.flatten())
        loss = loss + F.cross_entropy(place_logits.flatten(0, 1), places.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits.append((digit_logits.argmax(-1) == labels).float().mean().item())
    return float(np.mean(hits[-10:]))
