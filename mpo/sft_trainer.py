"""SFTTrainer: `trl.SFTTrainer` with packing for pictures, assistants' turns of any chat template, and loss weights.

Where none of these is asked for, everything is TRL's. Where one is, batches are those of `mpo.sft_collators`, and the
loss is the weighted mean over all learned tokens of an optimizer step, however ranks and micro-batches cut it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor

from mpo.collators import stand_in
from mpo.config import SFTConfig
from mpo.forest_attention import use_forest_attention
from mpo.forest_inputs import FLEX_BLOCK, why_not
from mpo.losses import response_weights
from mpo.models import LoadsItsCheckpoints, base_of, name_of
from mpo.optimizers import LearnsByPart
from mpo.scores import lengths_of, score_tokens
from mpo.segments import Segmenter
from mpo.sft_collators import ConversationCollator

_COLUMNS = ("messages", "prompt", "completion", "image", "images", "input_ids", "labels", "tools")
_COLUMNS += ("completion_mask", "assistant_masks", "chat_template_kwargs", "id")

logger = logging.getLogger(__name__)


class SFTTrainer(LoadsItsCheckpoints, LearnsByPart, trl.SFTTrainer):
    """Supervised fine-tuning; takes exactly what `trl.SFTTrainer` takes.

    Attributes:
        notes: What a user should know of how the data are read, one line each.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        """Builds the trainer; see `trl.SFTTrainer` for the arguments.

        Raises:
            TypeError: `args` is not an `SFTConfig`.
            ValueError: Settings contradict each other.
        """
        args = args or SFTConfig(f"{name_of(model).split('/')[-1]}-SFT")
        if not isinstance(args, SFTConfig):
            raise TypeError(f"`args` must be `mpo.SFTConfig`, got {type(args).__name__}: it has all of TRL's fields.")
        self.notes: list[str] = []
        self._weighs = self._chooses_weights(args, data_collator, train_dataset, kwargs)
        hidden = {"packing": False, "padding_free": False, "assistant_only_loss": False} if self._weighs else {}
        with _set(args, **{"assistant_only_loss": bool(args.assistant_only_loss), **hidden}):
            super().__init__(model, args, data_collator, train_dataset, *others, **kwargs)
        if self._weighs:
            self.model_accepts_loss_kwargs = True  # the step's weights are in the loss: nothing else divides by steps
            self.data_collator = self._collator()

    def _chooses_weights(self, args: SFTConfig, collator: Any, dataset: Any, given: dict[str, Any]) -> bool:
        """Whether batches and loss are ours; TRL's where nothing asks for it, or something cannot do without TRL's."""
        turns = "messages" in _columns(dataset)
        asked = args.packing or args.padding_free or args.loss_reduction != "token" or args.assistant_only_loss
        if not (asked or turns):
            return False
        reasons = {
            "a `data_collator` of your own": collator is not None,
            "`compute_metrics`, which gets the logits of whole rows": given.get("compute_metrics") is not None,
            "`compute_loss_func`": given.get("compute_loss_func") is not None,
            "`formatting_func`": given.get("formatting_func") is not None,
            f"`loss_type={args.loss_type!r}`": args.loss_type != "nll",
            "`label_smoothing_factor`": bool(args.label_smoothing_factor),
            "`truncation_mode='keep_end'`": args.truncation_mode != "keep_start",
        }
        reason = next((what for what, holds in reasons.items() if holds), None)
        if reason is not None and (asked or (args.assistant_only_loss is None and collator is None)):
            raise ValueError(
                f"`packing`, `loss_reduction` and learning the assistant's turns only (of `messages`, unless "
                f"`assistant_only_loss` is false) cannot be used with {reason}: leave one of them out."
            )
        return reason is None

    def _collator(self) -> ConversationCollator:
        base, vision = base_of(self.model), self._is_vision_dataset
        packed = self.args.packing or self.args.padding_free
        if packed and (reason := self._why_padded()) is not None:
            packed = False
            self._note(f"Rows are not packed: {reason}. They are padded, with the same numbers.")
        if packed:
            use_forest_attention(base)
        flex = packed and base.config.get_text_config()._attn_implementation == "flex_attention"
        multiple_of = FLEX_BLOCK if flex else 1 if packed else self.args.pad_to_multiple_of or 1
        begins = not vision and self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        return ConversationCollator(
            Segmenter(
                self.processing_class,
                assistant_only=self.args.assistant_only_loss,
                completion_only=self.args.completion_only_loss is not False,
                text_field=self.args.dataset_text_field,
                begin=self._tokenizer.bos_token if begins else "",
                end="" if vision else self._tokenizer.eos_token or "",
            ),
            packed=packed,
            max_length=self.args.max_length,
            max_forest_tokens=self.args.max_forest_tokens,
            multiple_of=multiple_of,
            image_token_id=getattr(base.config, "image_token_id", None),
            stand_in=stand_in(self.args, self.train_dataset) if vision else None,
        )

    def _why_padded(self) -> str | None:
        if self.aux_loss_enabled:
            return "the load-balancing loss counts tokens row by row"
        if is_peft_model(self.model) and any(c.is_prompt_learning for c in self.model.peft_config.values()):
            return "prompt-learning adapters put virtual tokens in front of rows"
        return why_not(base_of(self.model))

    def _note(self, line: str) -> None:
        self.notes.append(line)
        if PartialState().is_main_process:
            logger.warning(line)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, *others: Any) -> Any:
        """TRL's seam for text, which it tokenizes ahead; our batches are tokenized as they are made."""
        if not self._weighs:
            return super()._prepare_dataset(dataset, processing_class, args, *others)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._weighs:
            self._signature_columns = [*_COLUMNS, self.args.dataset_text_field]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Transformers' seam for what the loss of a whole optimizer step is divided by: the weights of its tokens."""
        if not (self._weighs and batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([self._weighed(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices:
            total = self.accelerator.reduce(total, reduction="sum")
        return total / self.get_tp_size()

    def _weighed(self, batch: Any) -> Tensor:
        """What the learned tokens of each row weigh together, (N,)."""
        num_tokens = batch["completion_mask"][:, 1:].sum(dim=1)
        return num_tokens * response_weights(num_tokens, self.args.loss_reduction)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's seam for the loss of a micro-batch."""
        if not self._weighs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        scores = score_tokens(model, base_of(self.accelerator.unwrap_model(model)), inputs, **extra)
        mask = inputs["completion_mask"][:, 1:]  # (N, T)
        summed = -scores.logps.float().masked_fill(mask == 0, 0.0).sum(dim=1)  # (N,)
        weights = response_weights(mask.sum(dim=1), self.args.loss_reduction)
        total = self._weighed(inputs).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (weights * summed).sum() / torch.as_tensor(total).clamp(min=1e-9)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP takes the mean over ranks
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / steps
        self._record(inputs, scores, mask)
        if return_outputs:
            raise ValueError("logits are asked for, and packed or weighted batches have none: set `packing: false`.")
        return loss

    def _record(self, inputs: dict[str, Any], scores: Any, mask: Tensor) -> None:
        """TRL's metrics of this micro-batch over all ranks, in one exchange."""
        mode = "train" if self.model.training else "eval"
        sums = [mask.sum(), (scores.entropy * mask).sum(), (scores.is_top1 * mask).sum(), lengths_of(inputs).sum()]
        sums = torch.stack([value.detach().float() for value in sums])
        learned, entropy, right, num_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics[mode]["entropy"].append(entropy / max(learned, 1))
        self._metrics[mode]["mean_token_accuracy"].append(right / max(learned, 1))
        if self.aux_loss_enabled:
            aux_loss = self.accelerator.reduce(scores.aux_loss.detach(), reduction="mean")
            self._metrics[mode]["aux_loss"].append(aux_loss.item())
        if mode == "train":
            self._total_train_tokens += int(num_tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


@contextmanager
def _set(args: SFTConfig, **values: Any) -> Iterator[None]:
    """Other values for some settings, while TRL builds itself."""
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _columns(dataset: Any) -> Sequence[str]:
    if not isinstance(dataset, Dataset | IterableDataset):
        return ()
    return dataset.column_names or list(next(iter(dataset), {}))
