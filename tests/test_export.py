"""What `mpo export` leaves: one folder that loads anywhere, gives the trained model's numbers, and says what it is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUIET_TRAINING, task_pairs
from PIL import Image
from trl import ModelConfig

from data_builders.hf_sampler import load_model, load_processor
from data_builders.records import InputError
from data_builders.shards import write_rows
from mpo.config import MPOConfig
from mpo.export import ExportConfig, run
from mpo.models import load_for_training
from mpo.train import run as train
from mpo.training import StageConfig


@pytest.fixture(scope="module")
def runs(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of `mpo train`: `full`, and `lora`, whose adapter has learned enough to be seen."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "pairs.jsonl", task_pairs(task, 8))
    for name in ("full", "lora"):
        data = StageConfig(data=[str(folder / "pairs.jsonl")], image_root=str(task))
        lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]} if name == "lora" else {}
        model = ModelConfig(model_name_or_path=str(task / "model"), **lora)
        settings = {**QUIET_TRAINING, "max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4}
        train(data, model, MPOConfig(str(folder / name), **settings))
    return folder


def logits(model: Any, task: Path) -> torch.Tensor:
    processor = load_processor(task / "model")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sum?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    picture = Image.open(sorted((task / "images").glob("*.png"))[0]).convert("RGB")
    with torch.no_grad():
        return model.eval()(**processor(images=picture, text=prompt, return_tensors="pt")).logits


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_exported_model_is_one_folder_that_gives_the_trained_models_numbers(
    name: str, runs: Path, task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "exported"
    summary = run(ExportConfig(model=str(runs / name), output=str(output)))
    assert ["adapter", "merged" if name == "lora" else "none"] in summary.rows
    files = {path.name for path in output.iterdir()}
    assert files >= {"config.json", "model.safetensors", "README.md", "processor_config.json", "chat_template.jinja"}
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl")) or file.startswith("adapter")]
    exported, before = load_model(output), load_model(task / "model")
    expected = logits(load_for_training(str(runs / name), dtype="auto"), task)
    torch.testing.assert_close(logits(exported, task), expected, atol=1e-5, rtol=0)
    assert (logits(before, task) - expected).abs().max() > 1e-3
    assert exported.dtype == before.dtype


def test_the_card_says_how_the_model_was_made(runs: Path, tmp_path: Path) -> None:
    scores = {"model": "MPO", "style": "direct", "source": "all", "num": 1200}
    scores |= {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"accuracy": [scores]}))
    names = {"name": "digits-mpo", "license": "apache-2.0", "evaluation": str(tmp_path / "evaluation")}
    run(ExportConfig(model=str(runs / "lora"), output=str(tmp_path / "exported"), **names))
    card = (tmp_path / "exported" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["tags"] == ["mpo", "trl"]
    assert "base_model" not in front  # a folder of this machine is nothing that the Hub could link to
    assert "| MPO | direct | all | 1,200 | 50.0% | 40.0% to 60.0% |" in card
    assert "| loss_weights | `[0.8, 0.2, 1.0]` |" in card
    assert "| learning_rate | `0.01` |" in card
    assert "| lora_r | `4` |" in card
    assert re.search(r"\| pairs\.jsonl \| `[0-9a-f]{16}` \|", card)
    assert re.search(r"2 optimizer steps\. At the end of training: loss [\d.]+, .*reward_shift -?[\d.e-]+\.", card)
    assert f"torch {torch.__version__}" in card
    assert str(runs) not in card


def test_the_card_links_a_base_model_of_the_hub(runs: Path, tmp_path: Path) -> None:
    settings = json.loads((runs / "full" / "settings.json").read_text())
    changed = {**settings, "model_name_or_path": "org/base"}
    (runs / "full" / "settings.json").write_text(json.dumps(changed))
    try:
        run(ExportConfig(model=str(runs / "full"), output=str(tmp_path / "exported")))
    finally:
        (runs / "full" / "settings.json").write_text(json.dumps(settings))
    front = yaml.safe_load((tmp_path / "exported" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "org/base"


def test_a_folder_that_is_in_use_or_not_there_is_refused_and_left_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        run(ExportConfig(model=str(runs / "full"), output=str(tmp_path / "used")))
    with pytest.raises(InputError, match="there is no folder"):
        run(ExportConfig(model=str(tmp_path / "missing"), output=str(tmp_path / "out")))
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        run(ExportConfig(model=str(runs / "full"), output=str(tmp_path / "out"), evaluation=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


def test_nothing_is_uploaded_unless_asked_and_a_failed_upload_leaves_the_folder_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    calls: list[tuple[Any, ...]] = []

    def refuse(self: HfApi, repo_id: str, **settings: Any) -> None:
        calls.append((repo_id, settings["private"]))
        raise ValueError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    run(ExportConfig(model=str(runs / "full"), output=str(tmp_path / "kept")))
    assert calls == []
    with pytest.raises(InputError, match=r"is whole, but uploading it to 'org/name' failed \(no token\)"):
        run(ExportConfig(model=str(runs / "full"), output=str(tmp_path / "pushed"), push="org/name"))
    assert calls == [("org/name", True)]
    assert (tmp_path / "pushed" / "config.json").is_file()


def test_a_run_notes_what_each_of_its_starts_was_made_with(runs: Path) -> None:
    (start,) = json.loads((runs / "full" / "provenance.json").read_text())["starts"]
    assert start["num_ranks"] == 1
    assert start["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])
    settings = json.loads((runs / "full" / "settings.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", settings["inputs"][str(runs / "pairs.jsonl")])  # the data's fingerprint
    state = json.loads((runs / "full" / "trainer_state.json").read_text())
    assert any("reward_shift" in entry for entry in state["log_history"])
    assert any(entry.get("tokens_per_second", 0) > 0 for entry in state["log_history"])
