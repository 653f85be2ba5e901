"""What `mpo sft` and `mpo train` share: going on after a stop, one line of progress, and a model folder that is whole.

The loop itself is transformers'.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, ProgressCallback, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl import ModelConfig, get_peft_config, get_quantization_config

from data_builders.hf_sampler import load_processor
from data_builders.records import InputError, Row
from data_builders.shards import claim_folder
from mpo.drop_path import set_drop_path
from mpo.models import (
    PARTS,
    base_of,
    is_adapter,
    load_for_training,
    lora_targets,
    part_of,
    set_own_tiling,
    train_parts,
)
from mpo.optimizers import check_rates
from mpo.provenance import add_start
from mpo.sources import local_path
from mpo.tiled_data import KeepsTiling, data_tiling, read_tiling, tiled
from mpo.tiling import Tiling, save_tiling

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

logger = logging.getLogger(__name__)

_LAST = ("config.json", "adapter_config.json")  # what is written last of a model's folder
_SHOWN = {"loss": "loss", "rewards/margins": "margin", "mean_token_accuracy": "accuracy"}


@dataclass
class StageConfig:
    """What a training verb needs besides model and trainer settings."""

    data: list[str] = field(
        metadata={
            "help": "Sources, read one after the other: JSONL files or folders of shards; `mpo train` also takes "
            "JSON, Parquet, saved data sets and Hub ids (org/name[/config][:split])."
        }
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "The same for evaluation during training (`eval_strategy`)."}
    )
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    train: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts that are trained: vision, projector, llm. With LoRA `lora_parts` says it."},
    )
    lora_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "LoRA: parts whose linear layers get adapters. None: llm, or what `lora_target_modules` names. "
            "`lora_modules_to_save: [multi_modal_projector]` trains modules whole beside them."
        },
    )
    drop_path: float = field(
        default=0.0,
        metadata={
            "help": "How often the vision tower's last layer is left out in training, earlier ones less (InternVL: "
            "0.1, from 26B on 0.4). Not for Qwen-VL."
        },
    )
    tiling: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "How pictures are cut: `rule` (mm1_5, internvl), `n_min`, `n_max`, and if need be `indicator`, "
            "`side`, `tokens_per_view`. A processor that cuts by itself is given the numbers; for others pictures are "
            "cut as they are read, also when the model is asked later. None: as the model was trained."
        },
    )


def prepare(
    config: StageConfig, model_config: ModelConfig, args: Any, read: Callable[[list[str], str], "Dataset"]
) -> dict[str, Any]:
    """Loads and checks what a trainer is made of, in an order that finds cheap faults first.

    Args:
        config: Data and parts.
        model_config: TRL's settings of model and LoRA.
        args: A `TrainingArguments`.
        read: Sources and image root to a dataset.

    Returns:
        The trainer's arguments but `args`: model (with its parts frozen or not), processor, data, LoRA settings.

    Raises:
        InputError: Model, data or images are not what they should be.
    """
    if not args.output_dir or args.output_dir == "trainer_output":  # transformers' silent default
        raise InputError("`output_dir` is missing: name the folder for checkpoints and the trained model.")
    name = model_config.model_name_or_path
    if name is None:
        raise InputError("`model_name_or_path` is missing: the model to start from.")
    check_adapters(config, model_config)
    processor = load_processor(name, trust_remote_code=args.trust_remote_code)
    dataset = read(config.data, config.image_root)
    eval_dataset = read(config.eval_data, config.image_root) if config.eval_data else None
    set_seed(args.seed)  # adapters and what a model lacks are drawn before the trainer sets it
    model = load_for_training(
        name,
        trust_remote_code=args.trust_remote_code,
        dtype=model_config.dtype or "float32",
        attn_implementation=model_config.attn_implementation,
        revision=model_config.model_revision,
        quantization_config=get_quantization_config(model_config),
    )
    tiling = data_tiling(config.tiling, name, processor)
    if config.tiling and tiling is None:
        has_adapter = model_config.use_peft or is_adapter(name)
        note = set_own_tiling(processor, base_of(model).config, read_tiling(config.tiling), has_adapter=has_adapter)
        if args.process_index == 0:
            logger.warning(note)
    return {
        "model": model,
        "processing_class": processor,
        "train_dataset": tiled(dataset, tiling),
        "eval_dataset": tiled(eval_dataset, tiling),
        "peft_config": choose_parts(model, config, model_config, args.part_learning_rates or {}),
    }


def check_adapters(config: StageConfig, model_config: ModelConfig) -> None:
    """Looks whether the settings of LoRA and quantization go together, and with this machine.

    Raises:
        InputError: They do not.
    """
    if config.lora_parts is not None:
        if not model_config.use_peft:
            raise InputError("`lora_parts` says where adapters go, and there are none: add `use_peft: true`.")
        if model_config.lora_target_modules:
            raise InputError("both `lora_parts` and `lora_target_modules` say where adapters go: remove one of them.")
    if model_config.use_peft and set(config.train) != set(PARTS):
        raise InputError(
            "`train` chooses what is trained whole, and with `use_peft` nothing is: name the parts that get adapters "
            "in `lora_parts`, and modules that are trained whole beside them in `lora_modules_to_save`."
        )
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_config, name)), None)
    if quantized is None:
        return
    if not (model_config.use_peft or is_adapter(model_config.model_name_or_path)):
        raise InputError(f"`{quantized}` stores weights that cannot be trained: add `use_peft: true` (QLoRA).")
    if not torch.accelerator.is_available():
        raise InputError(f"`{quantized}` needs a GPU, and this machine has none: remove it.")
    if find_spec("bitsandbytes") is None:
        raise InputError(f"`{quantized}` needs bitsandbytes, which is not installed: `pip install bitsandbytes`.")


def choose_parts(
    model: Any, config: StageConfig, model_config: ModelConfig, rates: dict[str, float]
) -> "LoraConfig | None":
    """Freezes what is not trained, or says where adapters go; sets drop path.

    Args:
        model: Changed in place.
        config: The parts.
        model_config: TRL's settings of LoRA.
        rates: Learning rates of single parts.

    Returns:
        Settings of the adapters, which the trainer puts in; None without.

    Raises:
        InputError: A part does not exist, is not in the model or not trained, or its tower has no drop path.
    """
    lora, trained = get_peft_config(model_config), None
    if lora is None and isinstance(model, PreTrainedModel):
        train_parts(model, config.train)
        trained = set(config.train)
    elif lora is not None and not model_config.lora_target_modules:
        parts, saved = config.lora_parts or ["llm"], model_config.lora_modules_to_save or []
        lora.target_modules = lora_targets(model, parts, saved=saved)
        ends = tuple(f".{name}" for name in saved)
        trained = {*parts, *(part_of(f"{name}.") for name, _ in model.named_modules() if f".{name}".endswith(ends))}
    if trained is not None:  # else the optimizer finds out, later
        check_rates(rates, trained)
    if config.drop_path:
        if trained is not None and "vision" not in trained:
            raise InputError("`drop_path` is for training the vision tower, which is frozen here: remove it.")
        set_drop_path(model, config.drop_path)
    return lora


class LossBar(ProgressCallback):
    """Transformers' progress bar with the loss at its end instead of a dictionary per log line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        """Shows the latest numbers."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.set_postfix({_SHOWN[k]: f"{float(v):.3f}" for k, v in logs.items() if k in _SHOWN})


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is passed over."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # transformers writes it last
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(path)
    return None


def claim_output(config: StageConfig, model_config: ModelConfig, args: Any) -> None:
    """Binds the output folder to this run's settings, so that a run is only ever resumed with its own.

    Raises:
        InputError: The folder holds a run with other settings.
    """
    machine = {"device", "logging_dir", "disable_tqdm", "report_to", "local_rank", "resume_from_checkpoint"}
    chosen = {name: value for name, value in args.to_dict().items() if name not in machine}
    chosen["ranks"] = args.world_size  # they make the batch, and a sharded checkpoint fits no other number
    if args.process_index == 0:
        sources = [*config.data, *config.eval_data]
        inputs = [path for source in sources if (path := local_path(source))]  # a Hub id has no content here
        claim_folder(Path(args.output_dir), {**asdict(config), **asdict(model_config), **chosen}, inputs)


def train_and_save(trainer: Trainer, tiling: Tiling | None = None) -> Row:
    """Trains, from the newest checkpoint if there is one, and leaves model, processor and log in the output folder.

    Args:
        trainer: A trainer of transformers or TRL, with its processor.
        tiling: How the pictures of its data are cut; it is written down beside the model.

    Returns:
        The metrics of the run: the last logged value of each.
    """
    if tiling:
        trainer.add_callback(KeepsTiling(tiling))
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(LossBar)
    output_dir = Path(trainer.args.output_dir)
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(output_dir)
    finished = _take_finished(trainer, checkpoint)
    if not finished:
        if trainer.args.should_save:
            add_start(output_dir, num_ranks=trainer.args.world_size)
        trainer.train(resume_from_checkpoint=checkpoint)
    if not (finished and _is_whole(output_dir)):  # a model that others have read stays as it is
        _save_whole(trainer, output_dir, tiling)
    return {name: value for entry in trainer.state.log_history for name, value in entry.items()}


def _take_finished(trainer: Trainer, checkpoint: str | None) -> bool:
    """Whether the checkpoint is a run's last, then loaded: transformers would take one step too many from it."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # only what trains knows where the shards belong
        trainer._prepare_for_training(state.max_steps, trainer.get_train_dataloader(), checkpoint)
    else:
        trainer._load_from_checkpoint(checkpoint)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        trainer._load_best_model()
    return True


def _is_whole(output_dir: Path) -> bool:
    return any((output_dir / name).is_file() for name in _LAST)


def _save_whole(trainer: Trainer, output_dir: Path, tiling: Tiling | None) -> None:
    """Writes the final model beside and moves it in, `config.json` last: a folder that has one can be loaded."""
    staging = output_dir / ".saving"
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        if tiling:
            save_tiling(tiling, staging)
        _move_in(staging, output_dir)
    trainer.accelerator.wait_for_everyone()  # what comes next may read it, on any rank


def _move_in(staging: Path, output_dir: Path) -> None:
    for path in sorted(staging.iterdir(), key=lambda path: path.name in _LAST):
        target = output_dir / path.name
        if target.is_dir():  # an adapter's subfolder, of an earlier save
            shutil.rmtree(target)
        path.replace(target)
    staging.rmdir()
