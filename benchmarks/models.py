"""What `benchmarks/step.py` measures on: preference rows of exact lengths, untrained models, and their trainers.

A word is a token, so the lengths of a workload are those that a model sees. Nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import DPOConfig, DPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mpo import MPOConfig, MPOTrainer
from mpo.scores import REF_COLUMNS

PAD, END, PICTURE = "<pad>", "<end>", "<image>"
FILLER = 3  # a token that is none of these
PATCH = 14  # pixels; CLIP's
HEAD_TILE, METRICS = 32_768, ("entropy", "mean_logits", "is_top1")  # of the fused head as DPOTrainer sets it up
SETTINGS: dict[str, Any] = {
    "loss_type": ["sigmoid", "bco_pair", "sft"],
    "loss_weights": [0.8, 0.2, 1.0],
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"share_prefixes": False},
    "grouped": {"group_by_question": True},
    "cached": {"precompute_ref_log_probs": True},
}


class Sizes(NamedTuple):
    """A LLaVA in numbers: its language model, and the CLIP tower in front of it.

    Attributes:
        vocabulary: Tokens, special ones included.
        width: Of the language model's hidden states.
        inner: Of its feed-forward layers.
        layers: Its layers; the tower has as many.
        heads: Its attention heads; half as many for keys and values.
        tower: Width of the tower, whose feed-forward layers are four times as wide.
        side: Patches along each side of a picture; a picture becomes side * side tokens.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    tower: int
    side: int = 16


TOY = Sizes(vocabulary=8192, width=256, inner=704, layers=4, heads=4, tower=256)  # a laptop's CPU: about 8M weights
LARGE = Sizes(vocabulary=65_536, width=2048, inner=5632, layers=8, heads=16, tower=1024)  # a GPU: about 0.6B


@dataclass(frozen=True)
class Workload:
    """Pairs of one kind; lengths are numbers of tokens.

    Attributes:
        name: What they are like.
        prompt: Longest prompt, picture tokens included.
        response: Longest response.
        pictures: Pictures of each question.
        questions: How many there are.
        responses: Chosen responses of each question, and rejected ones; all combinations are pairs, up to `pairs`.
        pairs: Pairs of a question, at most: MMPR has up to 15.
        common: Tokens at the start of a response that are those of its partner, as in a DropoutNTP pair.
        shortest: Share of the longest length that prompts and responses have at least.
        target: How many times as fast as TRL's a step has to be.
    """

    name: str
    prompt: int
    response: int
    pictures: int = 1
    questions: int = 1
    responses: int = 1
    pairs: int = 1
    common: int = 0
    shortest: float = 1.0
    target: float = 1.0

    @property
    def num_pairs(self) -> int:
        """Of all questions."""
        return self.questions * min(self.pairs, self.responses**2)


def workloads(prompt: int, response: int, pictures: int) -> list[Workload]:
    """Pairs with pictures of these lengths, and text with short prompts."""
    with_pictures = {"prompt": prompt, "response": response, "pictures": pictures}
    return [
        Workload("pair", **with_pictures, target=1.6),
        Workload("dropout_ntp", **with_pictures, common=response // 2, target=1.8),
        Workload("15_pairs", **with_pictures, responses=4, pairs=15, target=9.0),
        Workload("text", prompt=32, response=56, pictures=0, questions=8, shortest=0.5, target=0.95),
    ]


def preference_rows(workload: Workload, sizes: Sizes, *, seed: int = 0) -> Dataset:
    """The pairs as TRL takes them: texts, and pictures as encoded bytes.

    Args:
        workload: What to make.
        sizes: Of the model that shall take them.
        seed: Of words and pixels.
    """
    generator = np.random.default_rng(seed)
    rows = [row for _ in range(workload.questions) for row in _rows_of_a_question(workload, sizes, generator)]
    texts = dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
    if not workload.pictures:
        rows = [{name: row[name] for name in texts} for row in rows]
        return Dataset.from_list(rows, features=Features(texts))
    return Dataset.from_list(rows, features=Features({"images": List(ImageFeature(mode="RGB")), **texts}))


def _rows_of_a_question(workload: Workload, sizes: Sizes, generator: np.random.Generator) -> list[dict[str, Any]]:
    pixels = (sizes.side * PATCH, sizes.side * PATCH, 3)
    images = [Image.fromarray(generator.integers(0, 256, pixels, dtype=np.uint8)) for _ in range(workload.pictures)]

    def words(most: int) -> list[str]:
        count = generator.integers(max(1, int(workload.shortest * most)), most + 1)
        return [f"w{word}" for word in generator.integers(0, sizes.vocabulary - 3, count)]

    question = [PICTURE] * workload.pictures + words(workload.prompt - workload.pictures * sizes.side**2)
    start = words(workload.common) if workload.common else []
    chosen, rejected = (
        [start + words(workload.response - len(start)) for _ in range(workload.responses)] for _ in "cr"
    )
    pairs = [(a, b) for a in chosen for b in rejected][: workload.pairs]
    texts = [{"chosen": " " + " ".join(a), "rejected": " " + " ".join(b)} for a, b in pairs]
    return [{"images": images, "prompt": " ".join(question), **text} for text in texts]


def build(
    sizes: Sizes, *, pictures: bool, seed: int, attention: str = "sdpa"
) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerFast]:
    """An untrained model and its processor: a LLaVA, or its language model alone with a tokenizer.

    Args:
        sizes: Of the model.
        pictures: Whether it takes any.
        seed: Of its weights.
        attention: `attn_implementation`.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer(sizes.vocabulary)
    text = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": max(1, sizes.heads // 2),
        "max_position_embeddings": 8192,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    if not pictures:
        return LlamaForCausalLM(LlamaConfig(**text, attn_implementation=attention)), tokenizer
    config = LlavaConfig(
        vision_config=_tower(sizes),
        text_config={"model_type": "llama", **text},
        image_token_id=tokenizer.image_token_id,
        image_seq_length=sizes.side**2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return LlavaForConditionalGeneration(config), _processor(sizes, tokenizer)


def _tower(sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": sizes.tower,
        "intermediate_size": 4 * sizes.tower,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.side * PATCH,
        "patch_size": PATCH,
        "projection_dim": sizes.tower,
    }


def _processor(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    side = sizes.side * PATCH
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word, and no other words than w0, w1, and so on."""
    words = [PAD, END, PICTURE, *(f"w{index}" for index in range(vocabulary - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, END, PICTURE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens={"image_token": PICTURE}
    )


class Method:
    """A trainer with its batches of one optimizer step; `benchmarks/step.py` says what each name stands for.

    Args:
        name: `trl`, or another one for `MPOTrainer`, with its settings in `OPTIONS` if it has any.
        workload: What to train on.
        sizes: Of the model.
        pairs: In a micro-batch.
        folder: For what a trainer wants to write.
    """

    def __init__(self, name: str, workload: Workload, sizes: Sizes, pairs: int, folder: Path) -> None:
        rows = preference_rows(workload, sizes)
        if name == "cached":
            for column in REF_COLUMNS:
                rows = rows.add_column(column, [-9.0 * workload.response] * len(rows))
        self.pairs, self.num_rows = pairs, len(rows)
        self.trainer = _trainer(name, rows, sizes, pairs, folder)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.batches = send_to_device(self.collate(), self.trainer.args.device)

    def collate(self) -> list[dict[str, Tensor]]:
        """The micro-batches, from rows as the data set holds them."""
        rows, collator = self.trainer.train_dataset, self.trainer.data_collator
        starts = range(0, self.num_rows, self.pairs)
        return [collator([rows[row] for row in range(start, start + self.pairs)]) for start in starts]

    def step(self, num_batches: int | None = None) -> None:
        """One step without its optimizer.

        Args:
            num_batches: Micro-batches of it; None: all.
        """
        trainer, chosen = self.trainer, self.batches[:num_batches]
        batches, num_items = trainer.get_batch_samples(iter(chosen), len(chosen), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(self.model, batch, num_items)
        trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
        self.model.zero_grad()

    def reference_pass(self) -> None:
        """The reference's forward over all micro-batches."""
        for batch in self.batches:
            self.trainer.compute_ref_log_probs(self.trainer.ref_model, batch)

    def floor(self) -> Callable[[], None]:
        """What computes this method's tokens and nothing else, as often as a step does."""
        passes = [self._bare(batch) for batch in self.batches]
        model, reference = self.trainer.model, self.trainer.ref_model

        def compute() -> None:
            with self.trainer.accelerator.autocast():
                for inputs, labels in passes:
                    with torch.no_grad():
                        _score(reference, inputs, labels)
                    _score(model, inputs, labels).sum().backward()
            model.zero_grad()

        return compute

    def _bare(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Causal rows of a forest's tokens without its padding, as many rows as it has, and what they predict."""
        ids, labels = batch["input_ids"], batch["shift_labels"]
        real = ids != self._pad_id
        num_tokens = int(real.sum())
        length = -(-num_tokens // len(ids))
        tokens, scored = ids.new_full((len(ids) * length,), FILLER), labels.new_full((len(ids) * length,), -100)
        tokens[:num_tokens], scored[:num_tokens] = ids[real], labels[real]
        pixels = {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}
        return {"input_ids": tokens.view(-1, length), "use_cache": False, **pixels}, scored.view(-1, length)

    @property
    def _pad_id(self) -> int:
        return self.trainer.model.config.get_text_config().pad_token_id

    def num_tokens(self) -> int:
        """Tokens that the language model computes in a step, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def num_unique(self) -> int:
        """The same without padding."""
        return sum(int((batch["input_ids"] != self._pad_id).sum()) for batch in self.batches)

    def weight_bytes(self) -> int:
        """Of policy and reference."""
        models = [model for model in (self.trainer.model, self.trainer.ref_model) if model is not None]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _trainer(name: str, rows: Dataset, sizes: Sizes, pairs: int, folder: Path) -> DPOTrainer:
    has_gpu = torch.cuda.is_available()
    kind = {
        "pictures": "images" in rows.column_names,
        "attention": "flex_attention" if name == "flex" else "sdpa",
    }
    model, processor = build(sizes, seed=0, **kind)
    trainer_class, config_class = (DPOTrainer, DPOConfig) if name == "trl" else (MPOTrainer, MPOConfig)
    args = config_class(
        str(folder),
        use_cpu=not has_gpu,
        bf16=has_gpu,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=len(rows) // pairs,
        **SETTINGS,
        **OPTIONS.get(name, {}),
    )
    reference = None if name == "cached" else build(sizes, seed=1, **kind)[0]  # other weights, or rewards would be 0
    return trainer_class(model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=processor)


def _score(model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Log-probabilities of the labels that are not -100, by TRL's head with what TRL's metrics need."""
    scored = labels != -100
    hidden = model.base_model(**inputs).last_hidden_state[scored]
    weight = model.get_output_embeddings().weight
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels[scored], 1.0, HEAD_TILE, None, 1.0, METRICS)[0]
