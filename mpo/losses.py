"""The three losses of Mixed Preference Optimization, and the weights of SFT's, as pure functions.

Nothing here reads a model, a config or a process group, and nothing is kept between calls: the reward shift delta is
an argument, and its moving average lives in `mpo.reward_shift`.

Shapes: B preference pairs, T tokens. Log-probabilities are in nats and summed over a response, never
length-normalised. Rewards are beta * (policy - reference) log-probabilities.
Source: Wang et al. 2024, "Mixed Preference Optimization", https://arxiv.org/abs/2411.10442.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_WEIGHTS = (0.8, 0.2, 1.0)  # preference, quality, generation: section 4.1 of the paper


class MPOLoss(NamedTuple):
    """The weighted sum, and its unweighted terms as means over the batch: scalars. A term of weight 0 is None."""

    loss: Tensor
    preference: Tensor | None
    quality: Tensor | None
    generation: Tensor | None


def preference_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """DPO's loss: the chosen response should earn more than the rejected one.

    Args:
        chosen_rewards: Rewards of the chosen responses, (B,).
        rejected_rewards: Rewards of the rejected responses, (B,).

    Returns:
        One loss per pair, (B,). Equal rewards give ln 2.

    >>> import torch
    >>> round(preference_loss(torch.zeros(1), torch.zeros(1)).item(), 6)
    0.693147
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def quality_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, reward_shift: Tensor | float = 0.0) -> Tensor:
    """BCO's loss: each response on its own should fall on the right side of the reward shift delta.

    Args:
        chosen_rewards: Rewards of the chosen responses, (B,).
        rejected_rewards: Rewards of the rejected responses, (B,).
        reward_shift: delta, the mean of the rewards seen so far; no gradient flows through it. 0 gives TRL's
            `bco_pair`.

    Returns:
        One loss per pair, (B,).
    """
    return -F.logsigmoid(chosen_rewards - reward_shift) - F.logsigmoid(reward_shift - rejected_rewards)


def generation_loss(
    chosen_token_logps: Tensor, chosen_mask: Tensor, *, reduction: Literal["sequence", "token"] = "sequence"
) -> Tensor:
    """Negative log-likelihood of the chosen responses, which keeps the model able to write them.

    Args:
        chosen_token_logps: Log-probability of each token of the chosen responses, (B, T).
        chosen_mask: 1 for tokens of the response, 0 for prompt and padding, (B, T).
        reduction: "sequence" is the paper's: the mean over a response's tokens, then over responses. "token" is TRL's:
            the mean over all tokens of the batch, so that long responses weigh more.

    Returns:
        The loss, a scalar. A response without tokens counts as 0, and so does a batch without any.

    Raises:
        ValueError: `reduction` is neither of the two.
    """
    mask = chosen_mask.to(chosen_token_logps.dtype)
    summed = -(chosen_token_logps.masked_fill(chosen_mask == 0, 0.0)).sum(dim=-1)  # (B,)
    if reduction == "sequence":
        return (summed / mask.sum(dim=-1).clamp(min=1)).mean()
    if reduction == "token":
        return summed.sum() / mask.sum().clamp(min=1)
    raise ValueError(f'`reduction` must be "sequence" (the paper\'s) or "token" (TRL\'s), got {reduction!r}.')


def response_weights(num_tokens: Tensor, reduction: Literal["token", "sample", "square"] = "token") -> Tensor:
    """What each token of a response weighs in supervised fine-tuning, by the length of the response.

    The loss is the weighted sum of -log p over all tokens of an optimizer step, divided by the sum of their weights.

    Args:
        num_tokens: Tokens of each response that are learned (x), (B,).
        reduction: "token" weighs every token 1, so that long responses count most; "sample" 1/x, so that all responses
            count alike; "square" 1/sqrt(x), which lies between them.

    Returns:
        One weight per response, (B,); 0 where nothing is learned.

    Raises:
        ValueError: `reduction` is none of the three.

    Source: Chen et al. 2024, "InternVL2.5", https://arxiv.org/abs/2412.05271, section on loss reweighting.

    >>> import torch
    >>> (response_weights(torch.tensor([4, 1, 0]), "square") * torch.tensor([4, 1, 0])).tolist()
    [2.0, 1.0, 0.0]
    """
    powers = {"token": 0.0, "sample": -1.0, "square": -0.5}
    if reduction not in powers:
        raise ValueError(f"`reduction` must be one of {', '.join(powers)}, got {reduction!r}.")
    return torch.where(num_tokens > 0, num_tokens.clamp(min=1).float() ** powers[reduction], 0.0)


def mpo_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    generation: Tensor | None,
    *,
    reward_shift: Tensor | float = 0.0,
    weights: tuple[float, float, float] = PAPER_WEIGHTS,
) -> MPOLoss:
    """Mixed Preference Optimization: the weighted sum of preference, quality and generation loss.

    Args:
        chosen_rewards: Rewards of the chosen responses, (B,).
        rejected_rewards: Rewards of the rejected responses, (B,).
        generation: What `generation_loss` returned, a scalar; may be None where its weight is 0.
        reward_shift: delta of the quality loss.
        weights: Of preference, quality and generation loss. A term of weight 0 is not computed.

    Returns:
        The loss and its terms. With the policy equal to the reference the first two add up to 0.8 ln 2 + 0.4 ln 2.

    Raises:
        ValueError: `generation` is None although its weight is not 0.

    >>> import torch
    >>> zero = torch.zeros(2)
    >>> round(mpo_loss(zero, zero, torch.tensor(0.0)).loss.item(), 6)
    0.831777
    """
    preference_weight, quality_weight, generation_weight = weights
    preference = preference_loss(chosen_rewards, rejected_rewards).mean() if preference_weight else None
    quality = quality_loss(chosen_rewards, rejected_rewards, reward_shift).mean() if quality_weight else None
    if generation_weight and generation is None:
        raise ValueError("`generation` is None although its weight is not 0: pass what `generation_loss` returns.")
    terms = (preference, quality, generation if generation_weight else None)
    total = sum(
        (weight * term for weight, term in zip(weights, terms, strict=True) if term is not None),
        start=chosen_rewards.new_zeros(()),
    )
    return MPOLoss(total, *terms)
