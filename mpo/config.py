"""MPOConfig: `trl.DPOConfig` with the settings of Mixed Preference Optimization; and what it shares with `mpo sft`.

Defaults are those of the paper (https://arxiv.org/abs/2411.10442) and of the InternVL2.5-MPO releases; everything else
is `trl.DPOConfig`'s.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig
from trl import SFTConfig as TRLSFTConfig

_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")  # by which DeepSpeed finds its way under mpirun

TERMS = ("sigmoid", "bco_pair", "sft")  # TRL's names of preference, quality and generation loss
_CHOICES = {
    "truncation_mode": ("keep_start", "keep_end"),
    "overlong": ("error", "drop"),
    "sft_reduction": ("sequence", "token"),
}


@dataclass
class TrainerConfig:
    """For a config of TRL: learning rates by part, and the same start under every launcher, with or without a GPU."""

    part_learning_rates: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Peak learning rates of single parts, `{vision: 2e-6}`; `learning_rate` is that of the others. "
            "Parts are vision, projector, llm; all rates follow one schedule."
        },
    )

    def __post_init__(self) -> None:
        """Prepares what the ranks talk through, which has to be there before the config is built."""
        if self.deepspeed and not {"RANK", *_MPI_RANKS} & os.environ.keys():
            raise ValueError(
                "`deepspeed` is set, but nothing started this process as a rank: put a launcher in front, on one GPU "
                "too: `torchrun --nproc_per_node 1 -m mpo ...`, with the rest of the command as it is."
            )
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns of it in every run, whoever imports it
            if self.deepspeed or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                self.use_cpu = True  # or each rank would train alone, on all of the data
            if self.deepspeed:
                _start_deepspeed_on_cpu()
        super().__post_init__()


def _start_deepspeed_on_cpu() -> None:
    """Lets DeepSpeed know of the ranks, which accelerate does on a GPU only: ZeRO-3 loads a model by their number."""
    os.environ.pop("LOCAL_SIZE", None)  # or it takes 64 MB of shared memory and never gives it back
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")


@dataclass
class SFTConfig(TrainerConfig, TRLSFTConfig):
    """Settings of `mpo sft` and `SFTTrainer`; takes every field of `trl.SFTConfig`."""

    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Learn the assistant's turns only, with any chat template. True: those of a prompt too. None: "
            "those of `messages`, and of other rows their completion."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the rows of a micro-batch one after the other, without padding, pictures too. Same losses "
            "and gradients; models that cannot take it say so and pad. Rows are never split."
        },
    )
    max_forest_tokens: int | None = field(
        default=None,
        metadata={"help": "With `packing`: tokens of a packed row, at most. None: a micro-batch is one row."},
    )
    loss_reduction: Literal["token", "sample", "square"] = field(
        default="token",
        metadata={
            "help": "What a token weighs in a row of which x tokens are learned, over the whole optimizer step: "
            "'token' 1, 'sample' 1/x, 'square' 1/sqrt(x) (InternVL2.5)."
        },
    )

    def __post_init__(self) -> None:
        """Refuses a reduction that does not exist, and TRL's ways of packing that split rows."""
        if self.loss_reduction not in ("token", "sample", "square"):
            raise ValueError(f"`loss_reduction` must be token, sample or square, got {self.loss_reduction!r}.")
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={self.packing_strategy!r}` splits rows, and here rows are packed whole: leave it "
                "at 'bfd'."
            )
        super().__post_init__()


@dataclass
class MPOConfig(TrainerConfig, DPOConfig):
    """Settings of `MPOTrainer`; takes every field of `trl.DPOConfig`."""

    learning_rate: float = field(
        default=1e-6,
        metadata={"help": "Peak learning rate. InternVL2.5-MPO: 1e-6; the paper's InternVL2-8B-MPO: 5e-6."},
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW (InternVL2.5-MPO: 0.05)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs (paper: 1)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate (paper: cosine)."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a share of all steps below 1, else a number of steps (paper: 0.05)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log. They stop training anyway."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt and response, image tokens included; longer rows are cut. None: no limit."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: list(TERMS),
        metadata={"help": "Terms of the loss: 'sigmoid' (preference), 'bco_pair' (quality), 'sft' (generation)."},
    )
    loss_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight per term; 0 turns a term off. None: 0.8, 0.2 and 1.0, as in the paper."},
    )
    reward_shift_decay: float | None = field(
        default=None,
        metadata={
            "help": "How the reward shift delta is averaged. None: cumulative mean; else the decay of an "
            "exponential one; 1: no shift at all."
        },
    )
    sft_reduction: Literal["sequence", "token"] = field(
        default="sequence",
        metadata={
            "help": "Generation loss: 'sequence' (the paper's mean per response) or 'token' (TRL's mean over all "
            "tokens)."
        },
    )

    overlong: Literal["error", "drop"] = field(
        default="error",
        metadata={
            "help": "A row that would lose image tokens or a whole response to `max_length`: 'error' stops before "
            "training, 'drop' leaves it out, counted and listed."
        },
    )
    ref_logps_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `precompute_ref_log_probs` keeps reference log-probabilities in, to be used again "
            "by other runs and machines. None: beside the data sets that `datasets` caches."
        },
    )

    share_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Compute every prefix and picture that a micro-batch's sequences share once. Same losses and "
            "gradients; models that cannot take it say so and compute rows one by one."
        },
    )
    max_forest_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With `share_prefixes`: tokens of a row of trees, at most. None: as many as the largest tree has."
        },
    )
    group_by_question: bool = field(
        default=False,
        metadata={
            "help": "Put pairs of one question into one micro-batch, where they share most. Off by default: an "
            "optimizer step then sees fewer questions, and its gradient is noisier."
        },
    )
    use_liger: bool = field(
        default=False,
        metadata={
            "help": "Replace layers of the model by Liger's Triton kernels, where Liger knows its family (GPU)."
        },
    )

    def __post_init__(self) -> None:
        """Refuses what MPO's loss cannot honour; no option is silently ignored."""
        if self.bf16 is None and (self.use_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False  # TRL turns it on wherever fp16 is off, which fails on a laptop
        self._check_terms()
        self._check_values()
        self._refuse("label_smoothing", 0.0, "it belongs to the losses 'robust' and 'exo_pair' of `trl.DPOTrainer`")
        self._refuse("discopop_tau", 0.05, "it belongs to the loss 'discopop' of `trl.DPOTrainer`")
        self._refuse("f_divergence_type", "reverse_kl", "the quality term has no counterpart for other divergences")
        self._refuse("f_alpha_divergence_coef", 0.5, "it belongs to the divergence 'alpha_divergence'")
        self._refuse("use_weighting", False, "WPO's weights are defined for one loss per pair, not for MPO's mix")
        self._refuse("padding_free", False, "TRL 1.16 ignores it")
        self._refuse("use_liger_kernel", False, "it leaves the reference as it is; `use_liger` changes both models")
        self._refuse("liger_kernel_config", None, "`use_liger` takes all kernels that the model's family has")
        if not self.sync_ref_model:
            self._refuse("ref_model_mixup_alpha", 0.6, "without `sync_ref_model=True` the reference never moves")
            self._refuse("ref_model_sync_steps", 512, "without `sync_ref_model=True` the reference never moves")
        if not self.share_prefixes:
            self._refuse("max_forest_tokens", None, "without `share_prefixes` rows hold no trees")
        if self.group_by_question:
            self._refuse("train_sampling_strategy", "random", "`group_by_question` has an order of its own")
        if self.use_liger and self.use_cpu:
            raise ValueError("`use_liger` needs a GPU, and `use_cpu` is set: Triton kernels do not run on a CPU.")
        super().__post_init__()
        if self.device.type == "cpu":
            self._refuse("activation_offloading", False, "it moves activations to the CPU, where they are already")
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` does not work with MPO: accelerate would cut a batch by the rows of its "
                "tensors, which are two per pair, but one per picture or patch of `pixel_values`. Leave it out."
            )
        self.accelerator_config.dispatch_batches = False  # None would be True for a stream

    def _check_terms(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        unknown = sorted(set(self.loss_type) - set(TERMS))
        if unknown:
            raise ValueError(
                f"`loss_type` {unknown} is not a term of MPO: choose among {list(TERMS)}, or use `trl.DPOTrainer` "
                "for TRL's other losses."
            )
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"`loss_type` names a term twice: {self.loss_type}. Give each once and weigh it instead.")
        if self.loss_weights is None:
            self.loss_weights = [dict(zip(TERMS, (0.8, 0.2, 1.0), strict=True))[term] for term in self.loss_type]

    def _check_values(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}={value!r}` means nothing: choose one of {list(choices)}.")
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(
                f"`ld_alpha={self.ld_alpha}` is not in [0, 1]: it is the weight of the tokens by which one response "
                "of a pair is longer; 1 weighs them like the others."
            )

    def _refuse(self, name: str, default: object, reason: str) -> None:
        value = getattr(self, name)
        if value != default:
            raise ValueError(f"`{name}={value!r}` cannot be used here: {reason}. Leave it at {default!r}.")

    @property
    def term_weights(self) -> tuple[float, float, float]:
        """Weights of preference, quality and generation loss; 0 for a term that is not in `loss_type`."""
        weights = dict(zip(self.loss_type, self.loss_weights, strict=True))
        return tuple(weights.get(term, 0.0) for term in TERMS)
