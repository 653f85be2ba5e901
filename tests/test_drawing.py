"""What decides a token: the settings, random numbers of each row's own, and what a model's config may still say."""

import math

import pytest
import torch
from transformers import GenerationConfig

from data_builders.drawing import Draw, constraints_of, generation_config, random_numbers

SCORES = torch.tensor([0.1, 0.0, 0.2, 0.7]).log()  # the second token is ruled out


def drawn(numbers: list[float], **settings: float) -> list[int]:
    """The token that each random number points at."""
    draw = Draw(len(numbers), torch.tensor(numbers, dtype=torch.float64)[:, None], **settings)
    return draw(SCORES.expand(len(numbers), -1), torch.arange(len(numbers)), 0).tolist()


def test_a_random_number_points_at_a_token_by_cumulative_probability() -> None:
    assert drawn([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-53]) == [0, 0, 2, 2, 3, 3]


def test_a_token_that_is_ruled_out_is_never_pointed_at() -> None:
    scores = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    for number, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        draw = Draw(1, torch.tensor([[number]], dtype=torch.float64))
        assert draw(scores, torch.tensor([0]), 0).tolist() == [token]


@pytest.mark.parametrize(
    ("settings", "probabilities"),
    [
        ({}, [0.1, 0.0, 0.2, 0.7]),
        ({"temperature": 0.5}, [0.01 / 0.54, 0.0, 0.04 / 0.54, 0.49 / 0.54]),
        ({"temperature": 2.0}, [0.1976, 0.0, 0.2795, 0.5229]),
        ({"top_k": 2}, [0.0, 0.0, 2 / 9, 7 / 9]),
        ({"top_p": 0.8}, [0.0, 0.0, 2 / 9, 7 / 9]),
        ({"top_p": 0.6}, [0.0, 0.0, 0.0, 1.0]),
        ({"temperature": 0.5, "top_p": 0.95}, [0.0, 0.0, 4 / 53, 49 / 53]),
    ],
)
def test_many_draws_have_the_probabilities_of_the_settings(
    settings: dict[str, float], probabilities: list[float]
) -> None:
    num = 20_000
    tokens = torch.tensor(drawn(random_numbers("any", num, 1)[:, 0].tolist(), **settings))
    shares = (torch.bincount(tokens, minlength=4) / num).tolist()
    for share, probability in zip(shares, probabilities, strict=True):
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / num) + 1e-4)


def test_a_temperature_too_small_for_numbers_means_the_likeliest() -> None:
    assert drawn([0.01, 0.99], temperature=1e-45) == [3, 3]


def test_each_row_uses_its_own_number_of_the_step() -> None:
    numbers = torch.tensor([[0.0, 0.9], [0.9, 0.2]], dtype=torch.float64)
    draw = Draw(2, numbers)
    both = SCORES.expand(2, -1)
    assert [draw(both, torch.tensor([0, 1]), step).tolist() for step in (0, 1)] == [[0, 3], [3, 2]]
    assert draw(SCORES[None], torch.tensor([1]), 1).tolist() == [2]  # the first row has left the batch


@pytest.mark.parametrize("numbers", [None, torch.full((3, 1), 0.5, dtype=torch.float64)])
def test_rows_without_probabilities_are_remembered(numbers: torch.Tensor | None) -> None:
    scores = torch.stack([SCORES, SCORES * torch.nan, SCORES.where(SCORES < -1, torch.inf)])
    draw = Draw(3, numbers)
    tokens = draw(scores, torch.arange(3), 0)
    assert draw.broken.tolist() == [False, True, True]
    assert int(tokens.max()) < 4


def test_random_numbers_depend_on_their_key_alone_and_do_not_change_when_more_are_asked_for() -> None:
    numbers = random_numbers((0, "question"), 2, 5)
    assert torch.equal(random_numbers((0, "question"), 4, 5)[:2], numbers)
    assert numbers.unique().numel() == 10
    assert bool((numbers >= 0).all() and (numbers < 1).all())
    for other in ((1, "question"), (0, "another")):
        assert not (random_numbers(other, 2, 5) == numbers).any()


def test_of_a_models_generation_config_constraints_and_special_tokens_are_left() -> None:
    shipped = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, min_p=0.5, typical_p=0.3, num_beams=4, max_length=20
    )
    shipped.update(repetition_penalty=1.05, suppress_tokens=[7], eos_token_id=2, bos_token_id=1, pad_token_id=0)
    kept = generation_config(shipped, ends={5}, never=[9, 8], pad=None).to_diff_dict()
    kept.pop("transformers_version")
    assert kept == {
        "repetition_penalty": 1.05,
        "suppress_tokens": [7, 8, 9],
        "eos_token_id": [2, 5],
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    assert constraints_of(shipped) == {"repetition_penalty": 1.05, "suppress_tokens": [7]}
    assert constraints_of(GenerationConfig(repetition_penalty=1.0, no_repeat_ngram_size=0)) == {}


def test_padding_is_an_end_where_a_model_has_none_of_its_own() -> None:
    assert generation_config(GenerationConfig(), ends={5, 3}, never=[], pad=None).pad_token_id == 3
    assert generation_config(GenerationConfig(), ends={5, 3}, never=[], pad=6).pad_token_id == 6
    assert generation_config(GenerationConfig(), ends=set(), never=[], pad=None).eos_token_id is None
