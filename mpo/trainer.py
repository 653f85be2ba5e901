"""MPOTrainer: `trl.DPOTrainer` with the loss of the Mixed Preference Optimization paper.

What it changes in TRL's trainer: the loss (`mpo.losses`, with the reward shift that TRL dropped in 0.29), the reward
shift's upkeep at the end of every optimizer step and its place in checkpoints, data that are checked before training,
and diagnoses in words. Reference log-probabilities come from `mpo.reference_cache`; PEFT, DeepSpeed, metrics and
logging are TRL's.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import ProcessorMixin, TrainerCallback
from trl import DPOTrainer

from data_builders.shards import write_rows, write_text
from mpo.collators import PreferenceCollator, has_pictures, picture_collator
from mpo.config import MPOConfig
from mpo.diagnoses import (
    Blame,
    ZeroRewards,
    check_finite,
    check_gradients,
    check_responses,
    check_saved,
    check_terms,
    find_blame,
)
from mpo.lengths import Lengths, measure_rows, measure_tokenized
from mpo.liger import apply_liger_kernels
from mpo.losses import MPOLoss, generation_loss, mpo_loss
from mpo.models import LoadsItsCheckpoints, base_of, name_of, processor_of
from mpo.optimizers import LearnsByPart
from mpo.overlong import fit_to_length
from mpo.reference_cache import CachesItsReference
from mpo.reward_shift import RewardShift
from mpo.scores import (
    NUM_PAIRS,
    REF_COLUMNS,
    Scores,
    is_forest,
    lengths_of,
    model_inputs,
    num_counted,
    num_pairs,
    score_tokens,
    sequence_logps,
    size_of,
)
from mpo.shared_prefixes import SharesPrefixes

REWARD_SHIFT_FILE = "reward_shift.json"

logger = logging.getLogger(__name__)


class MPOTrainer(LoadsItsCheckpoints, LearnsByPart, CachesItsReference, SharesPrefixes, DPOTrainer):
    """Trains with Mixed Preference Optimization; takes exactly what `trl.DPOTrainer` takes.

    Besides TRL's metrics it logs `loss/preference`, `loss/quality`, `loss/generation` and `reward_shift`.

    Source: Wang et al. 2024, https://arxiv.org/abs/2411.10442.
    """

    _tag_names = ["trl", "mpo"]
    _name = "MPO"
    _paper = {
        "title": "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
        "Optimization",
        "id": "2411.10442",
        "citation": (
            "@article{wang2024mpo,\n    title   = {Enhancing the Reasoning Ability of Multimodal Large Language "
            "Models via "
            "Mixed Preference Optimization},\n    author  = {Weiyun Wang and others},\n    year    = 2024,\n"
            "    journal = {arXiv preprint arXiv:2411.10442},\n}"
        ),
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: MPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        """Builds the trainer; see `trl.DPOTrainer` for the arguments.

        Raises:
            TypeError: `args` is not an `MPOConfig`.
            InputError: A row of the data does not fit into `max_length`.
        """
        args = args or MPOConfig(f"{name_of(model).split('/')[-1]}-MPO")
        if not isinstance(args, MPOConfig):
            raise TypeError(
                f"`args` must be an `MPOConfig`, got {type(args).__name__}: it has all fields of `DPOConfig`."
            )
        self.notes: list[str] = []  # what a user should know of how data and model were prepared, one line each
        self.reward_shift = RewardShift(args.reward_shift_decay)
        self._step_rewards: list[Tensor] = []
        self._step_batches: list[Any] = []
        self._step_size: Tensor | None = None
        self._last_logged: tuple[float, int] | None = None  # when, and how many tokens there were
        self._zero_rewards = ZeroRewards()
        self._learned = self._step_learning_rate = 0.0
        self._hides_pictures = args.precompute_ref_log_probs
        self._is_settled, self._own_collator = False, data_collator is not None
        if has_pictures(train_dataset):
            processing_class = processing_class or processor_of(model, args)
            if not isinstance(processing_class, ProcessorMixin):
                raise ValueError(
                    f"the data have pictures, but `processing_class` ({type(processing_class).__name__}) takes only "
                    "text: pass the processor of a vision-language model, or remove the column of pictures."
                )
            if args.dataset_num_proc:
                self._note(
                    "`dataset_num_proc` does nothing for pictures, which are read with each batch: set "
                    "`dataloader_num_workers` instead."
                )
            data_collator = data_collator or picture_collator(processing_class, args, train_dataset)
            train_dataset = self._fit_pictures(train_dataset, processing_class, args, "train")
            eval_dataset = _each(
                eval_dataset, lambda dataset, name: self._fit_pictures(dataset, processing_class, args, name)
            )
        super().__init__(
            model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, *others, **kwargs
        )
        self._hides_pictures = False
        self._settle()
        if self.precompute_ref_logps:
            self.ref_model = None
        if isinstance(self.data_collator, PreferenceCollator):
            self.data_collator.image_token_id = getattr(base_of(self.model).config, "image_token_id", None)
        self.add_callback(_StepEnd(self))

    @property
    def _is_vision_dataset(self) -> bool:
        """TRL's flag. Hidden while TRL builds itself to precompute, which it refuses for pictures."""
        return self._has_pictures and not self._hides_pictures

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, value: bool) -> None:
        self._has_pictures = value

    def _note(self, line: str) -> None:
        self.notes.append(line)
        if PartialState().is_main_process:
            logger.warning(line)

    def _settle(self) -> None:
        """What needs a built trainer and comes before a model is asked anything: kernels, and the collator."""
        if self._is_settled:
            return
        self._is_settled = True
        if self.args.use_liger:
            self._note(apply_liger_kernels(base_of(self.model)))
            if self.ref_model is not None:
                apply_liger_kernels(base_of(self.accelerator.unwrap_model(self.ref_model)))
        self._plant_forests(self._own_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: MPOConfig, dataset_name: str) -> Any:
        """TRL's seam for text: tokenizes; what `max_length` leaves nothing of is an error, not dropped unseen."""
        if self._has_pictures:
            return dataset
        max_length, args.max_length = args.max_length, None
        try:
            tokenized = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            args.max_length = max_length
        return self._fit(tokenized, args, dataset_name, measure_tokenized)

    def _fit_pictures(self, dataset: Any, processor: Any, args: MPOConfig, name: str) -> Any:
        if args.max_length is not None and args.truncation_mode == "keep_end":
            raise ValueError(
                "`truncation_mode='keep_end'` would cut pictures, which stand in front of the responses: leave it at "
                "'keep_start', or set `max_length` to None."
            )
        quiet = bool(args.disable_tqdm or args.process_index)

        def measure(rows: Dataset) -> Lengths:
            """Every rank counts its part."""
            rank, num_ranks = args.process_index, args.world_size
            start, stop = len(rows) * rank // num_ranks, len(rows) * (rank + 1) // num_ranks
            part = rows.select(range(start, stop)) if num_ranks > 1 else rows
            lengths = measure_rows(part, processor, first_row=start, disable_progress=quiet)
            return Lengths.join(gather_object([lengths]))

        return self._fit(dataset, args, name, measure)

    def _fit(self, dataset: Any, args: MPOConfig, name: str, measure: Callable[[Dataset], Lengths]) -> Any:
        """The rows that `max_length` leaves whole enough to learn from; says what it does to the others."""
        if args.max_length is None:
            return dataset
        if isinstance(dataset, IterableDataset):
            if args.overlong == "drop":
                raise ValueError(
                    "`overlong: drop` needs a data set that can be counted before training, and this one is a stream: "
                    "filter it yourself, or leave `overlong` at 'error', which looks at each batch."
                )
            return dataset
        kept, report = fit_to_length(
            dataset,
            measure(dataset),
            max_length=args.max_length,
            overlong=args.overlong,
            truncation_mode=args.truncation_mode,
            name=name,
        )
        if report.dropped or report.num_cut:
            self._note(str(report))
        if report.dropped and args.process_index == 0:
            path = Path(args.output_dir) / f"dropped_{name}.jsonl"
            write_rows(path, report.dropped)
            self._note(f"The dropped rows are listed in {path}.")
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *REF_COLUMNS]))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `trl.DPOTrainer.evaluate`; new data with pictures are checked and given their reference columns too."""
        if self._is_vision_dataset and eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = _each(eval_dataset, self._ready_to_evaluate)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _ready_to_evaluate(self, dataset: Any, name: str) -> Any:
        dataset = self._fit_pictures(dataset, self.processing_class, self.args, name)
        if not self.precompute_ref_logps:
            return dataset
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(dataset, name, size)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's seam for the loss: one forward of policy and reference over a micro-batch."""
        mode = "train" if self.model.training else "eval"
        counted = num_counted(inputs) if mode == "train" else self._counted_of_last(inputs)
        check_responses(inputs, counted, self._tokenizer, self.args.max_length)
        scores = self._score(model, inputs)
        rewards = self.beta * (scores.logps - scores.ref_logps)
        in_step = mode == "train" and self._step_size is not None  # not where a user calls `compute_loss`
        pair_share, token_share = self._shares(inputs) if in_step else (1.0, 1.0)
        terms = self._terms(scores, rewards, counted, token_share / pair_share if pair_share else 1.0)
        check_terms(terms, scores.logps, scores.ref_logps, inputs, self._tokenizer, step=self.state.global_step)
        loss = terms.loss * pair_share
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.tokens.aux_loss
        rewards = torch.stack([half[:counted] for half in rewards.detach().chunk(2)])  # (2, B)
        if in_step:
            self._step_rewards.append(rewards.flatten())
        self._record(mode, inputs, scores, terms, rewards)
        if return_outputs:
            if is_forest(inputs):
                raise ValueError(
                    "logits of whole rows are asked for, and batches share prefixes: pass `compute_metrics` when the "
                    "trainer is made, or set `share_prefixes=False`."
                )
            with torch.no_grad():
                return loss, model(**model_inputs(inputs))
        return loss

    def _score(self, model: Any, inputs: dict[str, Any]) -> Scores:
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        mask = inputs["completion_mask"][:, 1:]
        tokens = score_tokens(model, base_of(self.accelerator.unwrap_model(model)), inputs, **extra)
        if self.precompute_ref_logps:
            ref_logps = torch.cat(_ref_columns(inputs))
        else:
            ref_logps = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        return Scores(sequence_logps(tokens.logps, mask, self.ld_alpha), ref_logps.float(), mask, tokens)

    def _terms(self, scores: Scores, rewards: Tensor, counted: int, token_weight: float) -> MPOLoss:
        """The loss of the pairs that count; where none does, of all, to be weighed with 0."""
        counted = counted or rewards.size(0) // 2
        chosen_rewards, rejected_rewards = (half[:counted] for half in rewards.chunk(2))
        generation = None
        if self.args.term_weights[2]:
            token_logps, mask = scores.tokens.logps[:counted], scores.mask[:counted]
            generation = generation_loss(token_logps.float(), mask, reduction=self.args.sft_reduction)
            if self.args.sft_reduction == "token":
                generation = generation * token_weight
        return mpo_loss(
            chosen_rewards,
            rejected_rewards,
            generation,
            reward_shift=self.reward_shift.mean,
            weights=self.args.term_weights,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Transformers' seam for what has to be known of a whole optimizer step: its pairs and chosen tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            batches[-1][NUM_PAIRS] = self._counted_of_last(batches[-1], self.train_dataset)
        sizes = [size_of(batch) for batch in batches] or [torch.zeros(2, dtype=torch.long)]
        self._step_size = self.accelerator.reduce(torch.stack(sizes).sum(dim=0).to(device), reduction="sum")
        self._step_batches, self._step_rewards = batches, []  # a step that ran out of memory may have left some
        self._step_learning_rate = self._get_learning_rate()
        return batches, num_items

    def _counted_of_last(self, batch: dict[str, Any], dataset: Any = None) -> int:
        """Pairs that count of the batch taken last: an epoch's last ones repeat pairs to even out the ranks.

        Accelerate loses count of an epoch's rows where a resumed run skips its first ones; the data set has them.
        """
        size, state = num_counted(batch), self.accelerator.gradient_state
        ranks, remainder = self.accelerator.num_processes, state.remainder
        if remainder < 0 and isinstance(dataset, Dataset):
            remainder = len(dataset) % (self._train_batch_size * ranks)
        evened = ranks > 1 and state.end_of_dataloader and remainder > 0
        return min(size, max(0, remainder - size * self.accelerator.process_index)) if evened else size

    def _shares(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """What this micro-batch's means weigh in the step, by pairs and by chosen tokens; 1 where all are of one size.

        Transformers divides by the number of micro-batches, and DDP and DeepSpeed by the number of ranks, later on.
        """
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        shares = size_of(inputs).to(self._step_size.device) * parts / self._step_size.clamp(min=1)
        return tuple(shares.tolist())

    def _record(self, mode: str, inputs: dict[str, Any], scores: Scores, terms: MPOLoss, rewards: Tensor) -> None:
        """Adds this micro-batch, over all ranks, to TRL's metrics, in one exchange: each is a sum over a count."""
        values = _values_of(inputs, scores, terms, rewards)
        if self.aux_loss_enabled:
            values["aux_loss"] = scores.tokens.aux_loss
        widest = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        sums = torch.stack([value.detach().sum(dtype=widest) for value in values.values()])
        counts = torch.tensor([value.numel() for value in values.values()], dtype=widest, device=sums.device)
        local = torch.stack([sums, counts], dim=1)
        totals = dict(zip(values, self.accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        num_tokens, _ = totals.pop("num_tokens")
        for name, (total, count) in totals.items():
            self._metrics[mode][name].append(total / count if count else 0.0)
        self._metrics[mode]["reward_shift"].append(self.reward_shift.mean)
        if mode == "train":
            self._total_train_tokens += int(num_tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with `tokens_per_second`: growth of `num_tokens`, of all ranks, since training was last logged."""
        if "loss" in logs and "train_loss" not in logs:
            now, tokens = time.perf_counter(), self._total_train_tokens
            if self._last_logged:
                then, before = self._last_logged
                logs["tokens_per_second"] = (tokens - before) / (now - then)
            self._last_logged = (now, tokens)
        super().log(logs, start_time)

    def end_step(self) -> None:
        """Takes the rewards of one optimizer step, all micro-batches and ranks, into the reward shift."""
        local = torch.cat(self._step_rewards).tolist() if self._step_rewards else []
        self._step_rewards, self._step_batches, self._step_size = [], [], None
        rewards = gather_object(local) if self.accelerator.num_processes > 1 else local
        self.reward_shift.update(rewards)
        if not self.args.sync_ref_model:
            self._zero_rewards.take_step(rewards, learned=self._learned)
        if not self.accelerator.optimizer_step_was_skipped:  # by fp16's scaler
            self._learned += self._step_learning_rate / (self.args.learning_rate or 1.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Transformers' seam between the backward pass and the step: nothing that is no number goes into weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16:  # fp16's scaler leaves such steps out by itself
            step = self.state.global_step
            check_gradients(self.model, float(norm), self._step_batches, self._tokenizer, self._find_blame, step=step)
        return norm

    def _find_blame(self) -> Blame:
        """Which terms of which micro-batches of this step have broken gradients: each is run once more."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return {}
        found = {}
        for number, batch in enumerate(self._step_batches):
            scores, counted = self._score(self.model, self._prepare_inputs(batch)), num_counted(batch)
            terms = self._terms(scores, self.beta * (scores.logps - scores.ref_logps), counted, 1.0)
            if blamed := find_blame(self.model, terms):
                found[number] = blamed
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves, and looks at what was written: weights that are not finite, empty or zero are an error.

        Raises:
            TrainingError: Names the weights.
        """
        check_finite(self.model)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            check_saved(Path(output_dir or self.args.output_dir), self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_text(Path(output_dir) / REWARD_SHIFT_FILE, json.dumps(self.reward_shift.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` cannot be resumed: the reference model has moved with the policy and is not "
                "part of a checkpoint, so the run would go on with another one. Start a new run from the checkpoint's "
                "weights, or train with a fixed reference."
            )
        path = Path(checkpoint) / REWARD_SHIFT_FILE
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {REWARD_SHIFT_FILE}: it was not saved by MPOTrainer, or with "
                "`save_only_model=True`, so the reward shift cannot be restored. Start from its weights instead: pass "
                "the folder as the model."
            )
        self.reward_shift.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


class _StepEnd(TrainerCallback):
    """Calls the trainer at the end of every optimizer step, before anything is logged or saved."""

    def __init__(self, trainer: MPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.end_step()


def _each(data: Any, do: Callable[[Any, str], Any]) -> Any:
    """Does it to a data set, called "eval", or to each of a mapping of data sets, with its name; None stays None."""
    if isinstance(data, dict):
        return {name: do(part, name) for name, part in data.items()}
    return None if data is None else do(data, "eval")


def _ref_columns(inputs: dict[str, Any]) -> list[Tensor]:
    if missing := [name for name in REF_COLUMNS if name not in inputs]:
        raise ValueError(
            f"a batch has no {missing[0]!r}, which `precompute_ref_log_probs=True` needs: either `data_collator` "
            "leaves it out, as TRL's own for pictures does (pass none, and MPO's is taken), or these rows are new to "
            "the trainer (`evaluate` computes it for them, `predict` does not)."
        )
    return [inputs[name] for name in REF_COLUMNS]


def _values_of(inputs: dict[str, Any], scores: Scores, terms: MPOLoss, rewards: Tensor) -> dict[str, Tensor]:
    """What TRL's metrics are means of, for the pairs that count; `rewards` is theirs, (2, B)."""
    tokens, size, counted = scores.tokens, num_pairs(inputs), rewards.size(1)
    rows = [*range(counted), *range(size, size + counted)]
    chosen, rejected = torch.zeros_like(scores.mask).bool(), torch.zeros_like(scores.mask).bool()
    chosen[:counted] = scores.mask[:counted].bool()
    rejected[size : size + counted] = scores.mask[size : size + counted].bool()
    chosen_logps, rejected_logps = (half[:counted].detach() for half in scores.logps.chunk(2))
    means = {name: value for name, value in terms._asdict().items() if name != "loss" and value is not None}
    return {
        "entropy": tokens.entropy[chosen | rejected],
        "logits/chosen": tokens.mean_logits[chosen],
        "logits/rejected": tokens.mean_logits[rejected],
        "mean_token_accuracy": tokens.is_top1[chosen],
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": rewards[0] > rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        **{f"loss/{name}": value.repeat(counted) for name, value in means.items()},
        "num_tokens": lengths_of(inputs)[rows],
    }
