"""MPO's losses against values worked out by hand and against numerical gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mpo.losses import generation_loss, mpo_loss, preference_loss, quality_loss

LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_preference_loss_is_the_log_sigmoid_of_the_margin() -> None:
    losses = preference_loss(torch.tensor([0.5, -1.0]), torch.tensor([0.2, 1.0]))
    expected = [-math.log(sigmoid(0.3)), -math.log(sigmoid(-2.0))]  # 0.554355, 2.126928
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_quality_loss_judges_each_response_against_the_shift() -> None:
    losses = quality_loss(torch.tensor([0.5]), torch.tensor([0.2]), 0.3)
    torch.testing.assert_close(losses, torch.tensor([-math.log(sigmoid(0.2)) - math.log(sigmoid(0.1))]))


def test_quality_loss_without_shift_is_trls_bco_pair() -> None:
    chosen, rejected = torch.tensor([0.7, -0.1]), torch.tensor([-0.4, 0.9])
    torch.testing.assert_close(quality_loss(chosen, rejected), -F.logsigmoid(chosen) - F.logsigmoid(-rejected))


def test_generation_loss_means_over_each_response_first() -> None:
    logps = torch.tensor([[-1.0, -3.0, 99.0], [-5.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert generation_loss(logps, mask).item() == pytest.approx((2.0 + 5.0) / 2)
    assert generation_loss(logps, mask, reduction="token").item() == pytest.approx((1.0 + 3.0 + 5.0) / 3)


def test_generation_loss_of_nothing_is_zero_and_has_a_gradient() -> None:
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    for reduction in ("sequence", "token"):
        loss = generation_loss(logps, torch.zeros(2, 3), reduction=reduction)
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, logps)
        assert gradient.abs().sum() == 0


def test_generation_loss_ignores_infinities_outside_the_response() -> None:
    logps = torch.tensor([[-1.0, float("-inf")]])
    assert generation_loss(logps, torch.tensor([[1, 0]])).item() == 1.0


def test_generation_loss_refuses_another_reduction() -> None:
    with pytest.raises(ValueError, match='must be "sequence"'):
        generation_loss(torch.zeros(1, 1), torch.ones(1, 1), reduction="mean")


def test_a_policy_equal_to_its_reference_has_the_known_loss() -> None:
    zero = torch.zeros(4)
    terms = mpo_loss(zero, zero, torch.tensor(1.25))
    assert terms.loss.item() == pytest.approx(0.8 * LN2 + 0.2 * 2 * LN2 + 1.25)
    assert terms.loss.item() - 1.25 == pytest.approx(0.831777, abs=1e-6)
    assert [term.item() for term in terms[1:]] == pytest.approx([LN2, 2 * LN2, 1.25])


def test_weights_mix_the_terms() -> None:
    chosen, rejected = torch.tensor([0.5]), torch.tensor([0.2])
    terms = mpo_loss(chosen, rejected, torch.tensor(2.0), reward_shift=0.3, weights=(0.5, 0.25, 0.125))
    assert terms.loss.item() == pytest.approx(
        0.5 * terms.preference.item() + 0.25 * terms.quality.item() + 0.125 * 2.0
    )


def test_a_term_of_weight_zero_is_not_computed() -> None:
    broken = torch.tensor([float("nan")])
    terms = mpo_loss(torch.zeros(1), torch.zeros(1), broken.mean(), weights=(1.0, 0.0, 0.0))
    assert terms.loss.item() == pytest.approx(LN2)
    assert terms.quality is None
    assert terms.generation is None


def test_a_missing_generation_term_with_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="pass what `generation_loss` returns"):
        mpo_loss(torch.zeros(1), torch.zeros(1), None)


@pytest.mark.parametrize("shift", [0.0, 0.7, -2.5])
def test_gradients_agree_with_finite_differences(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randn(5, dtype=torch.double, generator=generator, requires_grad=True)
    rejected = torch.randn(5, dtype=torch.double, generator=generator, requires_grad=True)
    logps = (-torch.rand(5, 3, dtype=torch.double, generator=generator)).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]])
    assert torch.autograd.gradcheck(preference_loss, (chosen, rejected))
    assert torch.autograd.gradcheck(partial(quality_loss, reward_shift=shift), (chosen, rejected))
    for reduction in ("sequence", "token"):
        assert torch.autograd.gradcheck(lambda x, r=reduction: generation_loss(x, mask, reduction=r), (logps,))


def test_extreme_rewards_stay_finite() -> None:
    chosen, rejected = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    terms = mpo_loss(chosen, rejected, torch.tensor(0.0))
    assert torch.isfinite(terms.loss)
    assert preference_loss(chosen, rejected).tolist() == [0.0, 2e4]
