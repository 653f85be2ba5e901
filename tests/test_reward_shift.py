"""The reward shift against its closed forms."""

import pytest
import torch

from mpo.reward_shift import RewardShift


def test_it_starts_at_zero() -> None:
    assert RewardShift().mean == 0.0
    assert RewardShift(decay=0.9).mean == 0.0


def test_the_default_is_the_mean_of_all_rewards_each_counting_once() -> None:
    shift = RewardShift()
    assert shift.update([1.0, 2.0, 6.0]) == pytest.approx(3.0)
    assert shift.update([7.0]) == pytest.approx(16.0 / 4)
    assert shift.update(torch.tensor([[0.0, 4.0], [0.0, 0.0]])) == pytest.approx(20.0 / 8)


def test_an_exponential_mean_starts_from_zero() -> None:
    shift = RewardShift(decay=0.9)
    assert shift.update([2.0, 4.0]) == pytest.approx(0.1 * 3.0)
    assert shift.update([13.0]) == pytest.approx(0.9 * 0.3 + 0.1 * 13.0)


def test_a_decay_of_one_keeps_the_shift_at_zero() -> None:
    shift = RewardShift(decay=1.0)
    shift.update([5.0])
    assert shift.mean == 0.0


def test_a_long_stream_has_the_closed_form() -> None:
    rewards = torch.randn(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    plain, moving = RewardShift(), RewardShift(decay=0.99)
    expected = 0.0
    for step in rewards:
        plain.update(step)
        moving.update(step)
        expected = 0.99 * expected + 0.01 * step.mean().item()
    assert plain.mean == pytest.approx(rewards.mean().item(), abs=1e-12)
    assert moving.mean == pytest.approx(expected, abs=1e-12)


def test_no_rewards_change_nothing() -> None:
    shift = RewardShift()
    shift.update([2.0])
    assert shift.update([]) == 2.0
    assert shift.count == 1


def test_no_gradient_flows_into_it() -> None:
    shift = RewardShift()
    shift.update(torch.ones(2, requires_grad=True))
    assert isinstance(shift.mean, float)


def test_its_state_goes_through_json_and_back() -> None:
    shift = RewardShift(decay=0.5)
    shift.update([1.0, 2.0])
    other = RewardShift(decay=0.5)
    other.load_state_dict(shift.state_dict())
    assert (other.update([9.0]), other.count) == (shift.update([9.0]), shift.count)


def test_a_state_of_another_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="resume with the same setting"):
        RewardShift(decay=0.9).load_state_dict(RewardShift().state_dict())


@pytest.mark.parametrize("decay", [1.01, -0.1, 2.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        RewardShift(decay)


def test_rewards_that_are_not_finite_are_refused_with_advice() -> None:
    shift = RewardShift()
    with pytest.raises(ValueError, match="Lower the learning rate"):
        shift.update([1.0, float("nan")])
    assert shift.count == 0
