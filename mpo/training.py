"""What `mpo sft` and `mpo train` share: going on after a stop, one line of progress, and a model folder that is whole.

The loop itself is transformers'.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, ProcessorMixin, ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl import ModelConfig, get_quantization_config

from data_builders.records import InputError, Row
from data_builders.samplers import load_model, load_processor
from data_builders.shards import claim_folder
from mpo.models import PARTS, train_parts

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = {"loss": "loss", "rewards/margins": "margin", "mean_token_accuracy": "accuracy"}


@dataclass
class StageConfig:
    """What a training verb needs besides model and trainer settings."""

    data: list[str] = field(metadata={"help": "Files or folders of rows, read one after the other."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    train: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts that are trained: vision, projector, llm. LoRA chooses its own."},
    )


def prepare(
    config: StageConfig, model_config: ModelConfig, args: Any, read: Callable[[list[str], str], "Dataset"]
) -> tuple[PreTrainedModel, ProcessorMixin, "Dataset"]:
    """Loads and checks what a trainer is made of, in an order that finds cheap faults first.

    Args:
        config: Data and parts.
        model_config: TRL's settings of model and LoRA.
        args: A `TrainingArguments`; its output folder is bound to these settings.
        read: Sources and image root to a dataset.

    Returns:
        The model with its parts frozen or not, its processor, and the data.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    if not args.output_dir or args.output_dir == "trainer_output":  # transformers' silent default
        raise InputError("`output_dir` is missing: name the folder for checkpoints and the trained model.")
    name = model_config.model_name_or_path
    if name is None:
        raise InputError("`model_name_or_path` is missing: the model to start from.")
    processor = load_processor(name, trust_remote_code=args.trust_remote_code)
    dataset = read(config.data, config.image_root)
    model = load_model(
        name,
        trust_remote_code=args.trust_remote_code,
        dtype=model_config.dtype or "float32",
        attn_implementation=model_config.attn_implementation,
        revision=model_config.model_revision,
        quantization_config=get_quantization_config(model_config),
    )
    if not model_config.use_peft:
        train_parts(model, config.train)
    claim_output(args, {**asdict(config), **asdict(model_config)}, [Path(source) for source in config.data])
    return model, processor, dataset


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


def claim_output(trainer_args: Any, settings: Row, inputs: list[Path]) -> None:
    """Binds the output folder to this run's settings, so that a run is only ever resumed with its own.

    Args:
        trainer_args: A `TrainingArguments`.
        settings: The verb's own settings.
        inputs: The data that is trained on.

    Raises:
        InputError: The folder holds a run with other settings.
    """
    machine = {"device", "logging_dir", "disable_tqdm", "report_to", "local_rank", "resume_from_checkpoint"}
    chosen = {name: value for name, value in trainer_args.to_dict().items() if name not in machine}
    if trainer_args.process_index == 0:
        claim_folder(Path(trainer_args.output_dir), {**settings, **chosen}, inputs)


def train_and_save(trainer: Trainer) -> Row:
    """Trains, from the newest checkpoint if there is one, and leaves model, processor and log in the output folder.

    Args:
        trainer: A trainer of transformers or TRL, with its processor.

    Returns:
        The metrics of the run: the last logged value of each.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(LossBar)
    output_dir = Path(trainer.args.output_dir)
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(output_dir)
    if not _take_finished(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
    _save_whole(trainer, output_dir)
    return {name: value for entry in trainer.state.log_history for name, value in entry.items()}


def _take_finished(trainer: Trainer, checkpoint: str | None) -> bool:
    """Whether the checkpoint is a run's last, then loaded: transformers would take one step too many from it."""
    if checkpoint is None or trainer.is_deepspeed_enabled:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = state
    return True


def _save_whole(trainer: Trainer, output_dir: Path) -> None:
    """Writes the final model beside and moves it in, `config.json` last: a folder that has one can be loaded."""
    staging = output_dir / ".saving"
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    trainer.state.save_to_json(str(staging / "trainer_state.json"))
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
        path.replace(output_dir / path.name)
    staging.rmdir()
