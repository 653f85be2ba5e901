"""`mpo sft`: supervised fine-tuning of a vision-language model on conversations, in one stage or several.

Settings are those of this file, of `trl.ModelConfig` (model, LoRA) and of `mpo.config.SFTConfig`, which has all fields
of TRL's; flat in one YAML file. Each of `stages` is a list entry with a `name` and whatever it sets in another way; it
starts from the model of the one before and leaves its own in a folder of its name.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from data_builders.records import InputError, Row, Summary
from mpo.config import SFTConfig
from mpo.data import sft_dataset
from mpo.learning_rates import rates_of
from mpo.memory import release
from mpo.models import base_of
from mpo.settings import build_settings
from mpo.sft_trainer import SFTTrainer
from mpo.stages import RunVerb, Stage, run_stages
from mpo.tiled_data import data_tiling
from mpo.training import StageConfig, claim_output, prepare, train_and_save


@dataclass
class SFTStageConfig(StageConfig):
    """What `mpo sft` needs besides model and trainer settings."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources, read one after the other: JSONL files or folders of shards. A stage has its own."},
    )
    lr: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "`{rule: mm1}`: learning rate and weight decay by MM1's rule, from the parameters of the language "
            "model, or from `parameters`. A `weight_decay` that is set stays."
        },
    )
    stages: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={
            "help": "Stages, each with a `name` and its own settings beside those of the file: data, train, learning "
            "rates, max_length, tiling, ... Each starts from the last."
        },
    )


CONFIGS = (SFTStageConfig, ModelConfig, SFTConfig)


def run(*values: Row, run_verb: RunVerb) -> Summary:
    """Trains and saves the model, or one after the other those of all stages.

    Args:
        values: What was set of each of `CONFIGS`.
        run_verb: Runs another verb in this process, as the command line would: here, this one for a stage.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    if values[0].get("stages"):
        return _run_stages({name: value for part in values for name, value in part.items()}, run_verb)
    if values[0].get("lr") and "learning_rate" in values[2]:
        raise InputError("both `lr` and `learning_rate` say how fast to learn: remove one of them.")
    config, model_config, args = build_settings(CONFIGS, values)
    return _train(config, model_config, args, sets_decay="weight_decay" in values[2])


def _train(config: SFTStageConfig, model_config: ModelConfig, args: SFTConfig, *, sets_decay: bool) -> Summary:
    parts = prepare(config, model_config, args, sft_dataset)
    if config.lr:
        learning_rate, weight_decay = rates_of(config.lr, base_of(parts["model"]))
        args.learning_rate, args.weight_decay = learning_rate, args.weight_decay if sets_decay else weight_decay
    claim_output(config, model_config, args)
    trainer = SFTTrainer(args=args, **parts)
    tiling = data_tiling(config.tiling, model_config.model_name_or_path, parts["processing_class"])
    metrics = train_and_save(trainer, tiling)
    release(trainer)
    rows = [
        ["rows", f"{len(parts['train_dataset']):,}"],
        ["optimizer steps", f"{metrics.get('step', 0):,}"],
        ["peak learning rate", f"{args.learning_rate:.3g}"],
        ["loss", f"{float(metrics.get('loss', metrics.get('train_loss', float('nan')))):.4f}"],
    ]
    return Summary(
        "Supervised fine-tuning",
        ["", "last logged"],
        rows,
        notes=[*trainer.notes, f"The model is in {args.output_dir}."],
        next_command=f"mpo sample --model {args.output_dir} --questions YOUR_QUESTIONS.jsonl --output responses",
    )


def plan_stages(settings: Row) -> list[Stage]:
    """Each stage as a run of its own, in their order.

    Args:
        settings: What was set, `stages` among it.

    Raises:
        InputError: There is no folder for them, or a stage has no name of its own or sets what is the whole run's.
    """
    stages, output = settings["stages"], settings.get("output_dir")
    shared = {name: value for name, value in settings.items() if name != "stages"}
    if not output:
        raise InputError("`output_dir` is missing: name the folder that gets one for each stage.")
    names = [_name(stage, number) for number, stage in enumerate(stages, 1)]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"`stages` has {double!r} twice: each stage needs a name of its own, which is its folder's.")
    planned, model = [], shared.get("model_name_or_path")
    for name, stage in zip(names, stages, strict=True):
        own = {key.replace("-", "_"): value for key, value in stage.items() if key != "name"}
        if "stages" in own or "output_dir" in own:
            raise InputError(f"stage {name!r} sets `stages` or `output_dir`, which belong to the whole run.")
        folder = str(Path(output) / name)
        own_rates = own.keys() & {"lr", "learning_rate"}  # they take the place of whichever all stages share
        others = {key: value for key, value in shared.items() if not (own_rates and key in ("lr", "learning_rate"))}
        words = {**others, **({"model_name_or_path": model} if model else {}), **own, "output_dir": folder}
        planned.append(Stage(name, "sft", {key: _word(value) for key, value in words.items()}))
        model = folder
    return planned


def _run_stages(settings: Row, run_verb: RunVerb) -> Summary:
    """Runs the stages; those that are done are not done again."""
    stages = plan_stages(settings)
    done = run_stages(stages, Path(settings["output_dir"]), run_verb)
    rows = [[stage.name, f"{done[stage.name]['seconds']:.0f} s", stage.settings["output_dir"]] for stage in stages]
    last = shlex.quote(rows[-1][-1])
    return Summary(
        f"Supervised fine-tuning in {len(stages)} stages",
        ["stage", "time", "model"],
        rows,
        next_command=f"mpo sample --model {last} --questions YOUR_QUESTIONS.jsonl --output responses",
    )


def _name(stage: Row, number: int) -> str:
    name = stage.get("name")
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise InputError(
            f"stage {number} of `stages` has the name {name!r}: give it one of letters, digits, - and _, such as "
            "`align`; its model lies in a folder of that name."
        )
    return name


def _word(value: Any) -> str:
    """A value as it would stand on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
