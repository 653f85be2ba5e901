"""MPO's loss from hidden states instead of log-probabilities, for training loops that are not ours.

Logits take most of the memory of a training step. Here they exist for a few pairs at a time: a chunk's gradients are
computed in the forward pass, as in all of Liger's `chunked_loss`. What happens to a chunk is Liger's, the loss that of
`mpo.losses`. Only the loop over chunks is ours: Liger's tells its loss hook neither which pairs a chunk holds nor how
long they are, and the generation loss, a mean per response, needs that.

Shapes: B preference pairs, T tokens, H hidden size, V vocabulary. As in Liger's own losses, chosen responses come
first, (2B, ...), and hidden states and targets are already shifted against each other. Inside, pairs are (2, B, ...).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mpo.losses import PAPER_WEIGHTS, MPOLoss, mpo_loss

try:
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
except ImportError as error:
    raise ImportError(
        f"`LigerFusedLinearMPOLoss` is built on Liger, which cannot be imported ({error}): pip install liger-kernel"
    ) from error


class FusedMPOLoss(NamedTuple):
    """What one batch of B pairs gives. Only `loss` has a gradient.

    Attributes:
        loss: The weighted sum of the terms, a scalar.
        preference: Unweighted mean over the batch; like the next two a scalar, and None where its weight is 0.
        quality: The same of the quality loss.
        generation: The same of the generation loss.
        logps: Summed log-probabilities of the responses in float32, chosen first, (2B,).
        rewards: beta * (policy - reference) of `logps`, chosen first, (2B,): what `RewardShift.update` takes.
    """

    loss: Tensor
    preference: Tensor | None
    quality: Tensor | None
    generation: Tensor | None
    logps: Tensor
    rewards: Tensor


class LigerFusedLinearMPOLoss(nn.Module):
    """Language-model head and MPO's loss in one, in the manner of Liger's `LigerFusedLinearDPOLoss`.

    Equal to `mpo_loss` on the log-probabilities of the same hidden states, in value and in gradients. A head that does
    more than a linear layer (soft-capped or scaled logits) is not covered.

    Args:
        ignore_index: The target of tokens that are not part of a response: prompt, images, padding.
        beta: How much one nat of difference from the reference is worth.
        weights: Of preference, quality and generation loss. A term of weight 0 is not computed.
        sft_reduction: Generation loss: "sequence" is the paper's mean per response, "token" TRL's over all tokens.
        compiled: Whether `torch.compile` turns a chunk into fused kernels. On a CPU this needs a C++ compiler.
        chunk_size: Pairs whose logits exist at the same time.

    >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    >>> target = torch.tensor([[1, 2, -100], [3, -100, -100]])
    >>> loss = LigerFusedLinearMPOLoss(compiled=False)
    >>> terms = loss(weight, hidden, target, ref_input=hidden, ref_weight=weight)
    >>> round((terms.loss - terms.generation).item(), 6)
    0.831777
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        beta: float = 0.1,
        weights: tuple[float, float, float] = PAPER_WEIGHTS,
        sft_reduction: Literal["sequence", "token"] = "sequence",
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        if sft_reduction not in ("sequence", "token"):
            raise ValueError(f'`sft_reduction` must be "sequence" or "token", got {sft_reduction!r}.')
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` is a number of pairs, at least 1, got {chunk_size}.")
        self.formula = _Formula(ignore_index, beta, tuple(weights))
        self.sft_reduction = sft_reduction
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        reward_shift: Tensor | float = 0.0,
    ) -> FusedMPOLoss:
        """Computes the loss, and where gradients are enabled also its gradients.

        Args:
            lin_weight: The head's weight, (V, H).
            _input: Hidden states of the policy, (2B, T, H).
            target: The token that each hidden state predicts, or `ignore_index`, (2B, T).
            bias: The head's bias, (V,).
            ref_input: Hidden states of the reference, (2B, T, its H).
            ref_weight: The reference's head, (V, its H).
            ref_bias: Its bias, (V,).
            ref_logps: What `logps` gave for the reference, (2B,), in place of the three above.
            reward_shift: delta of the quality loss, `RewardShift.mean`.

        Raises:
            ValueError: Shapes do not fit, or the reference is missing or given in both ways.
        """
        _check_shapes(_input, target)
        if (ref_logps is None) == (ref_input is None) or (ref_input is None) != (ref_weight is None):
            raise ValueError("pass the reference one way: `ref_logps`, or `ref_input` together with `ref_weight`.")
        if ref_logps is None:
            ref_logps = self.logps(ref_weight, ref_input, target, ref_bias)
        if ref_logps.shape != target.shape[:1]:
            raise ValueError(
                f"`ref_logps` is {tuple(ref_logps.shape)}: it needs one sum per response, ({len(target)},)."
            )
        hidden, labels = _by_pair(_input), _by_pair(target)
        pairs = _Pairs(
            _by_pair(ref_logps.detach().float()),
            self._token_shares(labels[0]),
            torch.as_tensor(reward_shift, dtype=torch.float32, device=_input.device).detach(),
        )
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (_input, lin_weight, bias)):
            settings = (self.formula, self.chunk_size, self.compiled)
            loss, logps = _FusedLinearMPOFunction.apply(hidden, lin_weight, labels, bias, pairs, *settings)
            terms = _terms(logps, pairs, self.formula)._replace(loss=loss)
        else:
            logps = self._logps(hidden, lin_weight, labels, bias)
            terms = _terms(logps, pairs, self.formula)
        return FusedMPOLoss(*terms, logps.flatten(), _rewards(logps, pairs, self.formula).flatten())

    def logps(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """Summed log-probabilities of the responses, without gradients: a reference's, once for a whole training.

        Args:
            lin_weight: The head's weight, (V, H).
            _input: Hidden states, (2B, T, H).
            target: The token that each hidden state predicts, or `ignore_index`, (2B, T).
            bias: The head's bias, (V,).

        Returns:
            One sum per response in float32, chosen first, (2B,).

        Raises:
            ValueError: Shapes do not fit.
        """
        _check_shapes(_input, target)
        return self._logps(_by_pair(_input), lin_weight, _by_pair(target), bias).flatten()

    @torch.no_grad()
    def _logps(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        compute = torch.compile(_chunk_logps) if self.compiled else _chunk_logps
        chunks = zip(hidden.split(self.chunk_size, dim=1), target.split(self.chunk_size, dim=1), strict=True)
        parts = [compute(states, weight, bias, labels, self.formula.ignore_index) for states, labels in chunks]
        return torch.cat(parts, dim=1)

    def _token_shares(self, chosen_target: Tensor) -> Tensor:
        num_tokens = (chosen_target != self.formula.ignore_index).sum(dim=1)
        if self.sft_reduction == "sequence":
            return 1.0 / num_tokens.clamp(min=1)
        return (len(num_tokens) / num_tokens.sum().clamp(min=1)).expand(len(num_tokens))


class _Formula(NamedTuple):
    ignore_index: int
    beta: float
    weights: tuple[float, float, float]


class _Pairs(NamedTuple):
    """What the loss needs of B pairs besides the policy's log-probabilities.

    Attributes:
        ref_logps: Log-probabilities of the reference, (2, B).
        token_shares: What a token of each chosen response weighs, so that the mean over responses is the generation
            loss, (B,).
        reward_shift: delta. A tensor, since a number would be compiled in, and compiled again at every step.
    """

    ref_logps: Tensor
    token_shares: Tensor
    reward_shift: Tensor

    def split(self, size: int) -> list["_Pairs"]:
        parts = zip(self.ref_logps.split(size, dim=1), self.token_shares.split(size), strict=True)
        return [_Pairs(ref_logps, shares, self.reward_shift) for ref_logps, shares in parts]


class _FusedLinearMPOFunction(LigerFusedLinearPreferenceBase):
    """Loss and gradients in one pass over the chunks. The backward pass is Liger's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        pairs: _Pairs,
        formula: _Formula,
        chunk_size: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        argnums = tuple(place for place, need in enumerate(needed) if need)
        gradients = [
            torch.zeros_like(x) if need else None for x, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        compute = torch.compile(_chunk_gradients) if compiled else _chunk_gradients
        logps = []
        for start, part in zip(range(0, target.size(1), chunk_size), pairs.split(chunk_size), strict=True):
            chunk = (slice(None), slice(start, start + chunk_size))
            found, chunk_logps = compute(argnums, hidden[chunk], weight, bias, target[chunk], part, formula)
            share = chunk_logps.size(1) / target.size(1)
            for place, gradient in zip(argnums, found, strict=True):
                total = gradients[place] if place else gradients[place][chunk]
                total.add_(gradient, alpha=share)
            logps.append(chunk_logps)
        ctx.save_for_backward(*gradients)
        logps = torch.cat(logps, dim=1)
        ctx.mark_non_differentiable(logps)
        return _terms(logps, pairs, formula).loss, logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*LigerFusedLinearPreferenceBase.backward(ctx, grad_outputs)[:4], None, None, None, None)


def _chunk_gradients(argnums: tuple[int, ...], *chunk: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    return torch.func.grad(_chunk_loss, argnums=argnums, has_aux=True)(*chunk)


def _chunk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, pairs: _Pairs, formula: _Formula
) -> tuple[Tensor, Tensor]:
    logps = _chunk_logps(hidden, weight, bias, target, formula.ignore_index)
    return _terms(logps, pairs, formula).loss, logps


def _chunk_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    chosen_logps, rejected_logps, *_ = LigerFusedLinearPreferenceBase.chunk_forward(
        hidden.flatten(0, 1),
        weight,
        target.flatten(0, 1),
        bias=bias,
        ignore_index=ignore_index,
        compute_nll_loss=False,
        average_log_prob=False,
    )
    return torch.stack([chosen_logps, rejected_logps])


def _terms(logps: Tensor, pairs: _Pairs, formula: _Formula) -> MPOLoss:
    generation = -(pairs.token_shares * logps[0]).mean()
    chosen_rewards, rejected_rewards = _rewards(logps, pairs, formula)
    return mpo_loss(
        chosen_rewards, rejected_rewards, generation, reward_shift=pairs.reward_shift, weights=formula.weights
    )


def _rewards(logps: Tensor, pairs: _Pairs, formula: _Formula) -> Tensor:
    return formula.beta * (logps - pairs.ref_logps)


def _by_pair(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (2, -1))


def _check_shapes(hidden: Tensor, target: Tensor) -> None:
    if hidden.shape[:2] != target.shape or len(target) % 2:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} and targets {tuple(target.shape)} do not fit: they must be "
            "(2B, T, H) and (2B, T), chosen responses first, and already shifted: `hidden[:, :-1]`, `labels[:, 1:]`."
        )
