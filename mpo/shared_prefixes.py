"""Lets a trainer compute what the sequences of a micro-batch share once: `share_prefixes` and `group_by_question`."""

from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetInfo, Features, Image, IterableDataset, List

from mpo.forest_attention import use_forest_attention
from mpo.forest_collators import ForestCollator, TextForestCollator
from mpo.forest_inputs import FLEX_BLOCK, why_not
from mpo.groups import GroupedSampler, question_keys
from mpo.models import base_of


class SharesPrefixes:
    """For `trl.DPOTrainer`: forests for batches where the model can take them, plain rows where it cannot.

    Attributes:
        shares_prefixes: Whether batches are forests.
    """

    shares_prefixes = False

    def _plant_forests(self, own_collator: bool) -> None:
        """Puts a collator of forests in the place of TRL's; says so where it cannot.

        Args:
            own_collator: Whether the user gave a collator, which then stays.
        """
        if not self.args.share_prefixes:
            return
        reason = "the collator is not ours" if own_collator else self._why_plain()
        if reason is not None:
            self._note(f"Prefixes are not shared: {reason}. Rows are computed one by one, with the same numbers.")
            return
        self.shares_prefixes, self._row_collator = True, self.data_collator
        base = base_of(self.model)
        use_forest_attention(base)
        if self.ref_model is not None:
            use_forest_attention(base_of(self.accelerator.unwrap_model(self.ref_model)))
        flex = base.config.get_text_config()._attn_implementation == "flex_attention"
        rows = {"max_forest_tokens": self.args.max_forest_tokens, "multiple_of": FLEX_BLOCK if flex else 1}
        if self._has_pictures:
            self.data_collator = ForestCollator(
                processor=self.processing_class,
                max_length=self.args.max_length,
                **rows,
                image_token_id=base.config.image_token_id,
                stand_in=self.data_collator.stand_in,
                decoder=_picture_feature(self.train_dataset) or Image(mode="RGB"),
            )
        else:
            self.data_collator = TextForestCollator(
                pad_token_id=self._tokenizer.pad_token_id,
                max_length=self.args.max_length,
                truncation_mode=self.args.truncation_mode,
                **rows,
            )

    def _why_plain(self) -> str | None:
        if self.compute_metrics is not None:
            return "`compute_metrics` gets the logits of whole rows"
        if self.args.pad_to_multiple_of is not None:
            return "`pad_to_multiple_of` pads rows, and a forest has none"
        asked = getattr(base_of(self.model).config.get_text_config(), "output_router_logits", False)
        if self.aux_loss_enabled or asked:
            return "the load-balancing loss counts tokens row by row"
        if is_peft_model(self.model) and any(c.is_prompt_learning for c in self.model.peft_config.values()):
            return "prompt-learning adapters put virtual tokens in front of rows"
        return why_not(base_of(self.model))

    def _get_dataloader(self, dataset: Any, *others: Any, **kwargs: Any) -> Any:
        """Transformers' seam for what all loaders read."""
        return super()._get_dataloader(self._for_collator(dataset), *others, **kwargs)

    def _for_collator(self, dataset: Any) -> Any:
        """The rows as the collator in use takes them best: closed files of pictures for forests."""
        return undecoded(dataset) if isinstance(self.data_collator, ForestCollator) else dataset

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Transformers' seam for `predict`, which returns the logits of plain rows."""
        if not self.shares_prefixes:
            return super().get_test_dataloader(test_dataset)
        shared, self.data_collator = self.data_collator, self._row_collator
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self.data_collator = shared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Transformers' seam for the order of rows."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_question:
            return super()._get_train_sampler(train_dataset)
        if isinstance(dataset, IterableDataset):
            raise ValueError("`group_by_question` needs a data set that can be looked through, and this is a stream.")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self.args.per_device_train_batch_size
        return GroupedSampler(question_keys(dataset), size, seed, lambda: int(self.state.epoch or 0))


def undecoded(dataset: Any) -> Any:
    """The same rows with pictures as `datasets` stores them, so that one of many rows is decoded once."""
    names = [name for name in ("image", "images") if name in (dataset.column_names or [])]
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset
    features = Features(dataset.features)
    for name in names:
        if isinstance(features[name], Image):
            features[name] = Image(decode=False)
        elif isinstance(features[name], List) and isinstance(features[name].feature, Image):
            features[name] = List(Image(decode=False))
    return Dataset(
        dataset.data.cast(features.arrow_schema),
        info=DatasetInfo(features=features),
        indices_table=dataset._indices,
        fingerprint=dataset._fingerprint,
    )


def _picture_feature(dataset: Any) -> Image | None:
    found = [feature for name, feature in (dataset.features or {}).items() if name in ("image", "images")]
    found = [getattr(feature, "feature", feature) for feature in found]
    return next((feature for feature in found if isinstance(feature, Image)), None)
