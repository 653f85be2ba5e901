"""MPOTrainer: `trl.DPOTrainer` with the loss of the Mixed Preference Optimization paper.

What it changes in TRL's trainer: the loss (`mpo.losses`, with the reward shift that TRL dropped in 0.29), the reward
shift's upkeep at the end of every optimizer step, and its place in checkpoints. Data, collators, reference model,
PEFT, DeepSpeed, metrics and logging are TRL's.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from data_builders.shards import write_text
from mpo.config import MPOConfig
from mpo.losses import MPOLoss, generation_loss, mpo_loss
from mpo.models import LoadsItsCheckpoints
from mpo.reward_shift import RewardShift

REWARD_SHIFT_FILE = "reward_shift.json"
_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class Scores(NamedTuple):
    """What the loss and the metrics need of one micro-batch of B pairs; T tokens, chosen responses first.

    Attributes:
        logps: Summed log-probabilities of the policy in float32, (2B,).
        ref_logps: The same of the reference, (2B,).
        token_logps: Log-probability of every next token, 0 outside responses, (2B, T - 1).
        mask: 1 where the next token is part of a response, (2B, T - 1).
        outputs: Everything else the fused head returned.
    """

    logps: Tensor
    ref_logps: Tensor
    token_logps: Tensor
    mask: Tensor
    outputs: Any


class MPOTrainer(LoadsItsCheckpoints, DPOTrainer):
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

    def __init__(self, model: Any, ref_model: Any = None, args: MPOConfig | None = None, **kwargs: Any) -> None:
        """Builds the trainer; see `trl.DPOTrainer` for the arguments.

        Raises:
            TypeError: `args` is not an `MPOConfig`.
        """
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = MPOConfig(f"{name.split('/')[-1]}-MPO")
        if not isinstance(args, MPOConfig):
            raise TypeError(
                f"`args` must be an `MPOConfig`, got {type(args).__name__}: it has all fields of `DPOConfig`."
            )
        self.reward_shift = RewardShift(args.reward_shift_decay)
        self._step_rewards: list[Tensor] = []
        self._step_size: Tensor | None = None
        super().__init__(model, ref_model, args, **kwargs)
        self.add_callback(_StepEnd(self))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's seam for the loss: one forward of policy and reference over a micro-batch."""
        mode = "train" if self.model.training else "eval"
        scores = self._score(model, inputs)
        chosen_rewards, rejected_rewards = (self.beta * (scores.logps - scores.ref_logps)).chunk(2)
        pair_share, token_share = self._shares(inputs) if mode == "train" else (1.0, 1.0)
        generation = None
        if self.args.term_weights[2]:
            token_logps, mask = scores.token_logps.chunk(2)[0], scores.mask.chunk(2)[0]
            generation = generation_loss(token_logps.float(), mask, reduction=self.args.sft_reduction)
            if self.args.sft_reduction == "token":
                generation = generation * (token_share / pair_share)
        terms = mpo_loss(
            chosen_rewards,
            rejected_rewards,
            generation,
            reward_shift=self.reward_shift.mean,
            weights=self.args.term_weights,
        )
        loss = terms.loss * pair_share
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.outputs.aux_loss
        if mode == "train":
            self._step_rewards.append(torch.cat([chosen_rewards, rejected_rewards]).detach())
        self._record(mode, inputs, scores, terms, chosen_rewards.detach(), rejected_rewards.detach())
        if return_outputs:
            with torch.no_grad():
                return loss, model(**_model_inputs(inputs))
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Transformers' seam for what has to be known of a whole optimizer step: its pairs and chosen tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [_size(batch) for batch in batches] or [torch.zeros(2, dtype=torch.long)]
        self._step_size = self.accelerator.reduce(torch.stack(sizes).sum(dim=0).to(device), reduction="sum")
        return batches, num_items

    def _shares(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """What this micro-batch's means weigh in the step, by pairs and by chosen tokens; 1 where all are of one size.

        Transformers divides by the number of micro-batches, and DDP and DeepSpeed by the number of ranks, later on.
        """
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        shares = _size(inputs).to(self._step_size.device) * parts / self._step_size.clamp(min=1)
        return tuple(shares.tolist())

    def _score(self, model: Any, inputs: dict[str, Any]) -> Scores:
        model_inputs = _model_inputs(inputs)
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        mask = inputs["completion_mask"][:, 1:]
        outputs = model(**model_inputs, **extra, labels=labels, fused_lm_head=True)
        token_logps = outputs.log_probs[:, -mask.size(1) :]  # prompt-learning adapters put virtual tokens in front
        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            ref_token_logps = self._reference_token_logps(model_inputs, labels)[:, -mask.size(1) :]
            ref_logps = sequence_logps(ref_token_logps, mask, self.ld_alpha)
        return Scores(sequence_logps(token_logps, mask, self.ld_alpha), ref_logps.float(), token_logps, mask, outputs)

    @torch.no_grad()
    def _reference_token_logps(self, model_inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Log-probabilities under the reference: its own model, or the policy with its adapter off or at its start."""
        model, adapter = self.ref_model, contextlib.nullcontext()
        if model is None:
            model = self.model
            unwrapped = self.accelerator.unwrap_model(model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
            assert is_peft_model(unwrapped)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), adapter:
            return model(**model_inputs, labels=labels, fused_lm_head=True).log_probs

    def _record(
        self,
        mode: str,
        inputs: dict[str, Any],
        scores: Scores,
        terms: MPOLoss,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
    ) -> None:
        """Adds this micro-batch, over all ranks, to TRL's metrics, in one exchange: each is a sum over a count."""
        outputs, mask = scores.outputs, scores.mask.bool()
        width = mask.size(1)
        chosen, rejected = mask.clone(), mask.clone()
        chosen[mask.size(0) // 2 :] = False
        rejected[: mask.size(0) // 2] = False
        chosen_logps, rejected_logps = scores.logps.detach().chunk(2)
        values = {
            "entropy": outputs.entropy[:, -width:][mask],
            "logits/chosen": outputs.mean_logits[:, -width:][chosen],
            "logits/rejected": outputs.mean_logits[:, -width:][rejected],
            "mean_token_accuracy": outputs.is_top1[:, -width:][chosen],
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            **{
                f"loss/{name}": value
                for name, value in terms._asdict().items()
                if name != "loss" and value is not None
            },
        }
        if self.aux_loss_enabled:
            values["aux_loss"] = outputs.aux_loss
        tokens = inputs["attention_mask"].sum()
        sums = [(value.detach().double().sum(), value.numel()) for value in values.values()] + [(tokens.double(), 1)]
        local = torch.tensor(sums, dtype=torch.float64, device="cpu").to(self.accelerator.device, _widest(self))
        totals = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, (total, count) in zip(values, totals, strict=False):
            self._metrics[mode][name].append(total / count if count else 0.0)
        self._metrics[mode]["reward_shift"].append(self.reward_shift.mean)
        if mode == "train":
            self._total_train_tokens += int(totals[-1][0]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def end_step(self) -> None:
        """Takes the rewards of one optimizer step, all micro-batches and ranks, into the reward shift."""
        local = torch.cat(self._step_rewards).tolist() if self._step_rewards else []
        self._step_rewards.clear()
        self.reward_shift.update(gather_object(local) if self.accelerator.num_processes > 1 else local)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_text(Path(output_dir) / REWARD_SHIFT_FILE, json.dumps(self.reward_shift.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / REWARD_SHIFT_FILE
        if checkpoint is None:
            return
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {REWARD_SHIFT_FILE}: it was not saved by MPOTrainer, so the reward shift "
                f"cannot be "
                "restored. Start from its weights instead: pass the folder as the model."
            )
        self.reward_shift.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


class _StepEnd(TrainerCallback):
    """Calls the trainer at the end of every optimizer step, before anything is logged or saved."""

    def __init__(self, trainer: MPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.end_step()


def sequence_logps(token_logps: Tensor, mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of whole responses, summed in float32 whatever the model's dtype.

    Args:
        token_logps: Of every next token, chosen responses first, (2B, T).
        mask: 1 where the token is part of a response, (2B, T).
        ld_alpha: LD-DPO (https://arxiv.org/abs/2409.06411): the weight of the tokens by which a response is longer
            than the other one of its pair; None weighs all alike.

    Returns:
        One sum per response, (2B,).
    """
    masked = token_logps.float().masked_fill(mask == 0, 0.0)
    if ld_alpha is None:
        return masked.sum(dim=1)
    lengths = mask.sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)  # (2B,)
    in_tail = mask.cumsum(dim=1) > shared[:, None]
    return torch.where(in_tail, ld_alpha * masked, masked).sum(dim=1)


def _size(batch: dict[str, Any]) -> Tensor:
    """Pairs, and tokens of chosen responses, (2,)."""
    mask = batch["completion_mask"]
    num_pairs = mask.size(0) // 2
    return torch.stack([torch.tensor(num_pairs, device=mask.device), mask[:num_pairs, 1:].sum()])


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}, "use_cache": False}


def _widest(trainer: MPOTrainer) -> torch.dtype:
    """float64, but float32 where the device has none (Apple's MPS)."""
    return torch.float32 if trainer.accelerator.device.type == "mps" else torch.float64
