"""Mixed Preference Optimization in a training loop of your own, in plain torch.

    python examples/own_training_loop.py MODEL PAIRS.jsonl IMAGE_ROOT OUTPUT

PAIRS.jsonl holds pair rows as `mpo pair` writes them. Needs Liger: pip install liger-kernel
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from mpo import RewardShift
from mpo.data import preference_dataset
from mpo.fused import LigerFusedLinearMPOLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str) -> PreTrainedModel:
    """A model with weights in float32: steps of 1e-6 would be lost in bfloat16."""
    return AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).to(DEVICE)


def hidden_states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model's head would turn into logits of the next token, chosen responses first, (2B, T - 1, H)."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]


def main(
    name: str,
    pairs: str,
    image_root: str,
    output: str,
    *,
    learning_rate: float = 1e-6,
    step_size: int = 16,
    epochs: int = 1,
) -> None:
    """Trains a model on pairs with pictures and saves it: `step_size` pairs per optimizer step, one at a time."""
    policy, reference = load(name).train(), load(name).eval().requires_grad_(False)
    head, ref_head = policy.get_output_embeddings(), reference.get_output_embeddings()
    processor = AutoProcessor.from_pretrained(name)
    collate = DataCollatorForVisionPreference(processor)
    steps = DataLoader(preference_dataset([pairs], image_root), step_size, shuffle=True, collate_fn=list)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.05)
    mpo_loss = LigerFusedLinearMPOLoss(compiled=DEVICE == "cuda")
    shift = RewardShift()

    for rows in (rows for _ in range(epochs) for rows in steps):
        loss, generation, rewards = 0.0, 0.0, []
        for row in rows:
            inputs = collate([row]).to(DEVICE)
            mask = inputs.pop("completion_mask")
            target = inputs["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                hidden = hidden_states(policy, inputs)
                with torch.no_grad():
                    ref_hidden = hidden_states(reference, inputs)
                ref = (ref_hidden, ref_head.weight, ref_head.bias)
                terms = mpo_loss(head.weight, hidden, target, head.bias, *ref, reward_shift=shift.mean)
            (terms.loss / len(rows)).backward()
            loss += terms.loss.item() / len(rows)
            generation += terms.generation.item() / len(rows)
            rewards.append(terms.rewards)
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss:.6f}  generation {generation:.6f}  reward shift {shift.mean:+.6f}")
        shift.update(torch.cat(rewards))  # once per optimizer step, so that delta is the same for all of its pairs

    policy.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
