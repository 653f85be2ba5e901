"""`mpo export`: a trained model as others want it: one folder, merged, in safetensors, with processor and card."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel

from data_builders.hf_sampler import load_processor
from data_builders.records import InputError, Row, Summary
from data_builders.shards import SETTINGS_FILE
from mpo.models import base_of, load_for_training
from mpo.provenance import versions
from mpo.tiling import load_tiling, save_tiling

TEMPLATES = Path(__file__).parent / "templates"
_RECIPE = (  # of a run's settings, in the order of the card
    *("loss_type", "loss_weights", "beta", "reward_shift_decay", "sft_reduction", "train"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_length", "bf16", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
)
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
_SCORES = ("loss", "rewards/accuracies", "rewards/margins", "reward_shift")


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `mpo export`."""

    model: str = field(metadata={"help": "What `mpo train` or `mpo sft` wrote: a model folder or an adapter's."})
    output: str = field(metadata={"help": "Folder for the exported model; must be empty or absent."})
    name: str | None = field(default=None, metadata={"help": "Name on the model card; null takes the folder's."})
    dtype: str = field(default="auto", metadata={"help": "Weights in this type; auto takes the model's own."})
    evaluation: str | None = field(default=None, metadata={"help": "Folder written by `mpo eval`, for the card."})
    license: str | None = field(default=None, metadata={"help": "The model's license, as the Hub calls it."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Size of one weight file, at most."})
    push: str | None = field(
        default=None, metadata={"help": "Hub repository (org/name) to upload to; null uploads nothing."}
    )
    private: bool = field(default=True, metadata={"help": "Whether a new repository is private."})


CONFIGS = (ExportConfig,)


def run(config: ExportConfig) -> Summary:
    """Merges, writes the folder, and uploads it if asked to.

    Raises:
        InputError: The model is not one, the output folder is in use, or the evaluation is not one.
    """
    source, output = Path(config.model), Path(config.output)
    if not source.is_dir():
        raise InputError(f"there is no folder {source}: give what `mpo train` or `mpo sft` wrote.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"the output {output} holds something already: give a folder of its own.")
    card = _card(config, source)
    processor = load_processor(_home_of_processor(source))
    model, merged = _whole(config, source)
    staging = output.parent / f".{output.name}.exporting"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, max_shard_size=config.max_shard_size)
    processor.save_pretrained(staging)
    if tiling := load_tiling(source):
        save_tiling(tiling, staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):  # last: what has one is whole
        path.replace(output / path.name)
    staging.rmdir()
    return _summary(config, model, merged, [_push(config, output)] if config.push else [])


def _whole(config: ExportConfig, source: Path) -> tuple[PreTrainedModel, bool]:
    """The model, with its adapter merged into it if it has one; and whether it had."""
    model = load_for_training(str(source), dtype=config.dtype)
    if base_of(model) is model:
        return model, False
    try:
        return model.merge_and_unload(safe_merge=True), True
    except ValueError as error:
        raise InputError(f"the adapter {source} cannot be merged ({error!s:.300}).") from error


def _home_of_processor(source: Path) -> str:
    """The folder itself, or for an adapter without a processor the model that it belongs to."""
    adapter = source / "adapter_config.json"
    if adapter.is_file() and not (source / "processor_config.json").is_file():
        return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return str(source)


def _card(config: ExportConfig, source: Path) -> str:
    """The model card, in Markdown with the front matter that the Hub reads."""
    settings, state = _read(source / SETTINGS_FILE), _read(source / "trainer_state.json")
    logged = {name: value for entry in state.get("log_history", []) for name, value in entry.items()}
    lora = _LORA if settings.get("use_peft") else ()
    name = config.name or source.resolve().name
    start = settings.get("model_name_or_path")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        address=config.push or name,
        license=config.license,
        is_mpo="loss_weights" in settings,
        start=Path(start).name if start and Path(start).exists() else start,
        start_is_on_hub=bool(start) and not Path(start).exists(),
        recipe={key: settings[key] for key in (*_RECIPE, *lora) if settings.get(key) is not None},
        data=[{"name": Path(path).name, "digest": digest} for path, digest in settings.get("inputs", {}).items()],
        num_steps=state.get("global_step"),
        scores={key: logged[key] for key in _SCORES if key in logged},
        accuracy=_accuracy(config),
        versions=versions(),
    )


def _accuracy(config: ExportConfig) -> list[Row]:
    if config.evaluation is None:
        return []
    path = Path(config.evaluation) / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{config.evaluation} holds no evaluation.json: give a folder that `mpo eval` wrote.")
    return json.loads(path.read_text(encoding="utf-8"))["accuracy"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _push(config: ExportConfig, output: Path) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(config.push, private=config.private, exist_ok=True)
        return f"Uploaded: {api.upload_folder(repo_id=config.push, folder_path=output)}"
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{output} is whole, but uploading it to {config.push!r} failed ({error!s:.300}). `hf auth login` gives "
            f"this machine a token; `hf upload {config.push} {output}` tries again."
        ) from error


def _summary(config: ExportConfig, model: PreTrainedModel, merged: bool, notes: list[str]) -> Summary:
    files = list(Path(config.output).iterdir())
    size = sum(path.stat().st_size for path in files)
    rows = [
        ["model", type(model).__name__],
        ["parameters", f"{model.num_parameters():,}"],
        ["type", str(model.dtype).removeprefix("torch.")],
        ["adapter", "merged" if merged else "none"],
        ["files", f"{len(files)}, {size / 2**20:,.1f} MiB"],
    ]
    return Summary("Export", ["what", "value"], rows, notes=notes)
