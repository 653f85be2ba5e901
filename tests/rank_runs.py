"""What the tests of several ranks run: `torchrun --nproc_per_node 2 tests/rank_runs.py PLAN.json`.

PLAN.json is a list of runs, each with `name`, `dataset` (a folder of `Dataset.save_to_disk`), `model`, `settings` of
`MPOConfig`, and optionally `resume` (a checkpoint), `lora`, `evaluate`, `scripted`, `save` (a folder). For each, rank
r writes `NAME.r.json` beside the plan: losses, reward shift, reference columns, which share of the reference model it
holds and, where asked, metrics of an evaluation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoProcessor

from data_builders.hf_sampler import load_model
from mpo import MPOConfig, MPOTrainer


def scripted_rewards(batch: Any) -> torch.Tensor:
    """Rewards that follow from the responses' tokens alone: whole numbers from -3 to 3, (2B,)."""
    if "last" in batch:  # a forest
        tokens = batch["shift_labels"].flatten()[batch["places"]] * batch["completion_mask"][:, 1:]
    else:
        tokens = batch["input_ids"] * batch["completion_mask"]
    return (tokens.sum(dim=1) % 7 - 3).float()


class ScriptedTrainer(MPOTrainer):
    """Gets its rewards from the script instead of the model."""

    def _score(self, model: Any, inputs: Any) -> Any:
        scores = super()._score(model, inputs)
        return scores._replace(logps=scores.ref_logps + scripted_rewards(inputs) / self.beta + 0 * scores.logps)


def share_of_reference(trainer: MPOTrainer) -> float | None:
    """How much of the reference model lies on this rank; None where there is none."""
    if trainer.ref_model is None:
        return None
    parameters = list(trainer.ref_model.parameters())
    held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)
    return held / sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Trains as one entry of the plan says; also called without torchrun, as the run to compare with."""
    torch.manual_seed(0)  # adapters are drawn before the trainer sets its seed
    args = MPOConfig(**plan["settings"])  # before the model: DeepSpeed shards it as it is loaded
    trainer = (ScriptedTrainer if plan.get("scripted") else MPOTrainer)(
        model=load_model(plan["model"], dtype="float32"),
        args=args,
        train_dataset=load_from_disk(plan["dataset"]),
        processing_class=AutoProcessor.from_pretrained(plan["model"]),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if plan.get("lora") else None,
    )
    trainer.train(resume_from_checkpoint=plan.get("resume"))
    metrics = trainer.evaluate(load_from_disk(plan["dataset"])) if plan.get("evaluate") else {}
    if plan.get("save"):
        trainer.save_model(plan["save"])
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "shift": trainer.reward_shift.state_dict(),
        "ref_chosen_logps": list(trainer.train_dataset["ref_chosen_logps"]) if trainer.precompute_ref_logps else None,
        "share_of_reference": share_of_reference(trainer),
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }


def main(path: Path) -> None:
    for plan in json.loads(path.read_text()):
        if plan["settings"].get("deepspeed") and not torch.distributed.is_initialized():
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
        result = run(plan)
        rank = torch.distributed.get_rank()
        (path.parent / f"{plan['name']}.{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
