"""The fused loss against automatic differentiation, in double precision, through the pure losses."""

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo.fused import LigerFusedLinearMPOLoss
from mpo.losses import MPOLoss, generation_loss, mpo_loss
from mpo.reward_shift import RewardShift

IGNORED = -100
PAIRS, TOKENS, HIDDEN, VOCABULARY = 3, 13, 8, 37


class Batch(NamedTuple):
    weight: Tensor
    hidden: Tensor
    target: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None


def make_batch(*, bias: bool = True, pairs: int = PAIRS, tokens: int = TOKENS) -> Batch:
    """Three pairs whose responses start and end anywhere; one of them is a single token."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, VOCABULARY, (2 * pairs, tokens), generator=generator)
    for row in range(2 * pairs):
        target[row, : 1 + row] = IGNORED
        target[row, tokens - row :] = IGNORED
    target[1] = IGNORED
    target[1, 4] = 5
    return Batch(
        weight=numbers(VOCABULARY, HIDDEN).requires_grad_(),
        hidden=numbers(2 * pairs, tokens, HIDDEN).requires_grad_(),
        target=target,
        bias=numbers(VOCABULARY).requires_grad_() if bias else None,
        ref_hidden=numbers(2 * pairs, tokens, HIDDEN),
        ref_weight=numbers(VOCABULARY, HIDDEN),
        ref_bias=numbers(VOCABULARY) if bias else None,
    )


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    labels = target.clamp(min=0)[..., None]
    return torch.log_softmax(logits, dim=-1).gather(-1, labels).squeeze(-1) * (target >= 0)


def plain(batch: Batch, *, beta: float = 0.1, sft_reduction: str = "sequence", **settings: Any) -> MPOLoss:
    """The same from full logits, in double precision."""
    logps = token_logps(batch.hidden, batch.weight, batch.bias, batch.target)
    ref_logps = token_logps(batch.ref_hidden, batch.ref_weight, batch.ref_bias, batch.target)
    chosen, rejected = (beta * (logps - ref_logps).sum(dim=1)).chunk(2)
    mask = batch.target.chunk(2)[0] != IGNORED
    return mpo_loss(chosen, rejected, generation_loss(logps.chunk(2)[0], mask, reduction=sft_reduction), **settings)


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    trained = [x for x in (batch.weight, batch.hidden, batch.bias) if x is not None and x.requires_grad]
    return list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("sft_reduction", ["sequence", "token"])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_pure_losses(sft_reduction: str, chunk_size: int, bias: bool) -> None:
    batch = make_batch(bias=bias)
    expected = plain(batch, sft_reduction=sft_reduction, reward_shift=0.7)
    loss = LigerFusedLinearMPOLoss(sft_reduction=sft_reduction, chunk_size=chunk_size, compiled=False)
    found = loss(*batch, reward_shift=0.7)
    for name in ("loss", "preference", "quality", "generation"):
        assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-6), name
    for theirs, ours in zip(gradients(expected.loss, batch), gradients(found.loss, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_compiled_it_gives_the_same_and_is_not_compiled_again_for_another_shift() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(chunk_size=2)
    assert loss.compiled
    loss(*batch)  # chunks of two pairs and of one: two shapes
    for shift in (0.7, -0.2):
        expected = plain(batch, reward_shift=shift)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = loss(*batch, reward_shift=shift)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        for theirs, ours in zip(gradients(expected.loss, batch), gradients(found.loss, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.5), (0.8, 0.2, 0.0)])
def test_a_term_of_weight_zero_is_not_computed(weights: tuple[float, float, float]) -> None:
    batch = make_batch()
    expected = plain(batch, weights=weights)
    found = LigerFusedLinearMPOLoss(weights=weights, compiled=False)(*batch)
    names = ("preference", "quality", "generation")
    assert [getattr(found, name) is None for name in names] == [weight == 0 for weight in weights]
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for theirs, ours in zip(gradients(expected.loss, batch), gradients(found.loss, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sft_reduction", ["sequence", "token"])
@pytest.mark.parametrize("generation_weight", [1.0, 0.0])
def test_a_batch_without_a_response_gives_no_nan(sft_reduction: str, generation_weight: float) -> None:
    batch = make_batch()
    batch.target.fill_(IGNORED)
    weights = (0.8, 0.2, generation_weight)
    found = LigerFusedLinearMPOLoss(weights=weights, sft_reduction=sft_reduction, compiled=False)(*batch)
    assert found.loss.item() == pytest.approx(0.831777, abs=1e-6)
    assert [gradient.abs().max().item() for gradient in gradients(found.loss, batch)] == [0.0, 0.0, 0.0]


def test_a_policy_equal_to_its_reference_has_the_known_loss() -> None:
    batch = make_batch()
    terms = LigerFusedLinearMPOLoss(compiled=False)(*batch[:4], batch.hidden, batch.weight, batch.bias)
    assert (terms.loss - terms.generation).item() == pytest.approx(0.831777, abs=1e-6)
    assert terms.rewards.tolist() == [0.0] * 2 * PAIRS


def test_gradients_scale_with_what_comes_from_above_and_add_up() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(compiled=False)
    whole = gradients(plain(batch).loss, batch)
    for _ in range(2):
        (loss(*batch).loss * 0.5).backward()
    for theirs, leaf in zip(whole, (batch.weight, batch.hidden, batch.bias), strict=True):
        torch.testing.assert_close(leaf.grad, theirs, rtol=1e-5, atol=1e-6)


def test_the_mean_over_equal_parts_of_a_batch_is_the_batch() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(compiled=False)
    parts = []
    for pair in range(PAIRS):
        rows = [pair, pair + PAIRS]
        part = loss(
            batch.weight,
            batch.hidden[rows],
            batch.target[rows],
            batch.bias,
            batch.ref_hidden[rows],
            batch.ref_weight,
            batch.ref_bias,
        )
        parts.append(part.loss)
    assert (sum(parts) / PAIRS).item() == pytest.approx(loss(*batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("trained", ["weight", "hidden", "bias"])
def test_what_is_frozen_gets_no_gradient(trained: str) -> None:
    batch = make_batch()
    for name in ("weight", "hidden", "bias"):
        getattr(batch, name).requires_grad_(name == trained)
    (expected,) = gradients(plain(batch).loss, batch)
    LigerFusedLinearMPOLoss(compiled=False)(*batch).loss.backward()
    torch.testing.assert_close(getattr(batch, trained).grad, expected, rtol=1e-5, atol=1e-6)
    assert [getattr(batch, name).grad is None for name in ("weight", "hidden", "bias")].count(True) == 2


def test_without_gradients_the_values_are_the_same() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(compiled=False)
    with torch.no_grad():
        evaluated = loss(*batch, reward_shift=0.3)
    assert not evaluated.loss.requires_grad
    trained = loss(*batch, reward_shift=0.3)
    assert trained.loss.requires_grad
    assert [x.tolist() for x in evaluated] == [x.tolist() for x in trained]


def test_log_probs_of_the_reference_can_be_computed_once() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(compiled=False, chunk_size=2)
    ref_logps = loss.logps(batch.ref_weight, batch.ref_hidden, batch.target, batch.ref_bias)
    expected = token_logps(batch.ref_hidden, batch.ref_weight, batch.ref_bias, batch.target).sum(dim=1)
    torch.testing.assert_close(ref_logps.double(), expected, rtol=1e-6, atol=1e-5)
    found = loss(*batch[:4], ref_logps=ref_logps)
    assert found.loss.item() == loss(*batch).loss.item()
    assert found.logps.shape == found.rewards.shape == (2 * PAIRS,)
    torch.testing.assert_close(found.rewards, 0.1 * (found.logps - ref_logps))


def test_its_rewards_are_what_the_reward_shift_takes() -> None:
    batch = make_batch()
    found = LigerFusedLinearMPOLoss(beta=0.5, compiled=False)(*batch)
    shift = RewardShift()
    assert shift.update(found.rewards) == pytest.approx(found.rewards.mean().item(), rel=1e-6)
    again = LigerFusedLinearMPOLoss(beta=0.5, compiled=False)(*batch, reward_shift=shift.mean)
    assert again.loss.item() == pytest.approx(plain(batch, beta=0.5, reward_shift=shift.mean).loss.item(), rel=1e-6)


def test_another_ignore_index_means_the_same() -> None:
    batch = make_batch()
    expected = LigerFusedLinearMPOLoss(compiled=False)(*batch).loss.item()
    relabelled = batch._replace(target=batch.target.masked_fill(batch.target == IGNORED, -1))
    assert LigerFusedLinearMPOLoss(ignore_index=-1, compiled=False)(*relabelled).loss.item() == expected


def test_in_half_precision_the_sums_are_single_precision() -> None:
    batch = make_batch(pairs=2, tokens=600)
    half = Batch(*(x if x is batch.target else x.detach().bfloat16().requires_grad_(x.requires_grad) for x in batch))
    expected = plain(half)
    found = LigerFusedLinearMPOLoss(compiled=False)(*half)
    exact = token_logps(half.hidden, half.weight, half.bias, half.target).sum(dim=1)
    assert exact[0].item() < -2048  # where neighbours in bfloat16 lie 16 nats apart
    assert found.logps.dtype == found.loss.dtype == torch.float32
    torch.testing.assert_close(found.logps.double(), exact, rtol=0, atol=2.0)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=5e-3)
    for theirs, ours in zip(gradients(expected.loss, half), gradients(found.loss, half), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_mixed_precision_takes_the_two_dtypes_that_a_model_then_has() -> None:
    batch = make_batch()
    expected = plain(batch)
    mixed = batch._replace(hidden=batch.hidden.detach().bfloat16().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        found = LigerFusedLinearMPOLoss(compiled=False)(*mixed)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    weight_gradient, hidden_gradient, _ = gradients(found.loss, mixed)
    assert (weight_gradient.dtype, hidden_gradient.dtype) == (torch.float32, torch.bfloat16)


def test_what_does_not_fit_is_refused() -> None:
    batch = make_batch()
    loss = LigerFusedLinearMPOLoss(compiled=False)
    with pytest.raises(ValueError, match="already shifted"):
        loss(batch.weight, batch.hidden, batch.target[:, 1:], ref_logps=torch.zeros(2 * PAIRS))
    with pytest.raises(ValueError, match="chosen responses first"):
        loss(batch.weight, batch.hidden[:5], batch.target[:5], ref_logps=torch.zeros(5))
    with pytest.raises(ValueError, match="the reference one way"):
        loss(*batch[:4])
    with pytest.raises(ValueError, match="the reference one way"):
        loss(*batch, ref_logps=torch.zeros(2 * PAIRS))
    with pytest.raises(ValueError, match="one sum per response"):
        loss(*batch[:4], ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match='must be "sequence" or "token"'):
        LigerFusedLinearMPOLoss(sft_reduction="mean")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LigerFusedLinearMPOLoss(chunk_size=0)


def test_without_liger_it_answers_with_the_install_line() -> None:
    code = "import sys; sys.modules['liger_kernel'] = None; import mpo.fused"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith("pip install liger-kernel")
