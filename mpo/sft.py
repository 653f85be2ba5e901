"""`mpo sft`: supervised fine-tuning of a vision-language model on conversations with TRL's SFTTrainer.

Settings are those of this file, of `trl.ModelConfig` (model, LoRA) and of `trl.SFTConfig`, flat in one YAML file.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from data_builders.records import InputError, Summary
from data_builders.samplers import load_model, load_processor
from mpo.data import sft_dataset
from mpo.models import PARTS, LoadsItsCheckpoints, train_parts
from mpo.training import claim_output, require_output_dir, train_and_save


@dataclass
class SFTStageConfig:
    """What `mpo sft` needs besides the trainer's settings."""

    data: list[str] = field(metadata={"help": "Files or folders of rows with `images`, `prompt` and `completion`."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    train: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts that are trained: vision, projector, llm. LoRA chooses its own."},
    )


class _Trainer(LoadsItsCheckpoints, SFTTrainer):
    pass


CONFIGS = (SFTStageConfig, ModelConfig, SFTConfig)


def run(config: SFTStageConfig, model_config: ModelConfig, args: SFTConfig) -> Summary:
    """Trains and saves the model.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    require_output_dir(args)
    if model_config.model_name_or_path is None:
        raise InputError("`model_name_or_path` is missing: the model to start from.")
    processor = load_processor(model_config.model_name_or_path, trust_remote_code=args.trust_remote_code)
    dataset = sft_dataset(config.data, config.image_root)
    claim_output(args, {**asdict(config), **asdict(model_config)}, [Path(source) for source in config.data])
    model = load_model(
        model_config.model_name_or_path,
        trust_remote_code=args.trust_remote_code,
        dtype=model_config.dtype or "float32",
        attn_implementation=model_config.attn_implementation,
    )
    if not model_config.use_peft:
        train_parts(model, config.train)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_config),
    )
    metrics = train_and_save(trainer)
    rows = [
        ["rows", f"{len(dataset):,}"],
        ["optimizer steps", f"{metrics.get('step', 0):,}"],
        ["loss", f"{float(metrics.get('loss', float('nan'))):.4f}"],
    ]
    return Summary(
        "Supervised fine-tuning",
        ["", "last logged"],
        rows,
        notes=[f"The model is in {args.output_dir}."],
        next_command=f"mpo sample --model {args.output_dir} --questions YOUR_QUESTIONS.jsonl --output responses",
    )
