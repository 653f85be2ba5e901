"""One prefill for many continuations, with nine families: the same tokens as `generate` gives each prompt alone.

The weights are random and large, so that every token depends on the prompt and on the pictures.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SIZES, build, picture
from torch import Tensor
from transformers import DynamicCache

from data_builders import decoding
from data_builders.hf_sampler import HFSampler
from data_builders.samplers import Completion, Request, SamplingSettings

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=10)
DRAWN = SamplingSettings(max_new_tokens=10)
LONG = "A question of more than the 64 tokens that a sliding window sees: how many are there, and which of them?"
REQUESTS = [
    Request("One picture?", ("0.png",)),
    Request("None?"),
    Request(LONG, ("1.png", "2.png")),
    Request(LONG),
    Request("Three, and a beginning?", ("2.png", "0.png", "1.png"), "There are"),
    Request("None, and a beginning?", (), "I see "),
]
NUM = 4
TOWERS = ("visual", "vision_tower", "vision_model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        picture(number, size).save(folder / f"{number}.png")
    return folder


def open_family(name: str, folder: Path, pictures: Path) -> HFSampler:
    build(name, folder)
    sampler = HFSampler(str(folder), image_root=pictures, device="cpu")
    with torch.no_grad():
        for parameter in sampler.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return sampler


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> HFSampler:
    """Has found out that it can share before any test counts what it computes."""
    sampler = open_family(request.param, tmp_path_factory.mktemp(request.param), pictures)
    sampler.sample(REQUESTS, NUM, DRAWN)
    return sampler


@pytest.fixture
def llava(pictures: Path, tmp_path: Path) -> HFSampler:
    return open_family("llava", tmp_path, pictures)


@contextmanager
def every_nth_token_ends(sampler: HFSampler, n: int) -> Iterator[None]:
    """Makes responses end at different places; 0: nowhere."""
    config = sampler.model.generation_config
    kept, config.eos_token_id = config.eos_token_id, list(range(0, 256, n)) if n else [10**6]
    yield
    config.eos_token_id = kept


@contextmanager
def counted(module: torch.nn.Module, measure: Callable[[Any], int]) -> Iterator[list[int]]:
    """What each forward of a module was given."""
    seen: list[int] = []

    def note(_: Any, positional: tuple, named: dict[str, Any]) -> None:
        seen.append(measure(next(value for value in (*positional, *named.values()) if isinstance(value, Tensor))))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def generated_alone(sampler: HFSampler, request: Request, settings: SamplingSettings) -> Completion:
    """What transformers makes of one request, greedily."""
    inputs = sampler._encode([request])
    width, ends = inputs["input_ids"].shape[1], sampler.model.generation_config.eos_token_id
    ids = sampler.model.generate(**inputs, do_sample=False, max_new_tokens=settings.max_new_tokens)[0, width:].tolist()
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    text = request.prefix + sampler.tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return Completion(text, "length" if stop is None else "stop")


@pytest.mark.parametrize("n", [0, 4])
def test_a_mixed_batch_gives_each_prompt_what_generate_gives_it_alone(family: HFSampler, n: int) -> None:
    assert set(family._shares.values()) == {True}
    with every_nth_token_ends(family, n):
        expected = [generated_alone(family, request, GREEDY) for request in REQUESTS]
        assert family.sample(REQUESTS, 3, GREEDY) == [[completion] * 3 for completion in expected]
    assert len({completion.text for completion in expected}) >= 4


def test_what_is_drawn_is_the_same_in_any_company_and_without_sharing(
    family: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with every_nth_token_ends(family, 6):
        expected = family.sample(REQUESTS, NUM, DRAWN)
        for batch_size in (9, NUM, 3):
            monkeypatch.setattr(family, "batch_size", batch_size)
            assert family.sample(REQUESTS, NUM, DRAWN) == expected
        monkeypatch.setattr(family, "batch_size", 64)
        assert family.sample(REQUESTS[::-1], NUM, DRAWN) == expected[::-1]
        assert [family.sample([request], NUM, DRAWN)[0] for request in REQUESTS] == expected
        monkeypatch.setattr(family, "_can_share", lambda _: False)
        assert family.sample(REQUESTS, NUM, DRAWN) == expected
    assert {completion.finish_reason for group in expected for completion in group} == {"stop", "length"}


def test_pictures_and_prompts_are_computed_once_and_not_for_every_completion(family: HFSampler) -> None:
    tower = next(getattr(family.model.model, name) for name in TOWERS if hasattr(family.model.model, name))
    requests = [REQUESTS[0], REQUESTS[2]]
    inputs = family._encode(requests)
    with counted(tower, len) as once, torch.no_grad():
        family.model(**inputs)
    embeddings = family.model.get_input_embeddings()
    with counted(tower, len) as seen, counted(embeddings, Tensor.numel) as tokens, every_nth_token_ends(family, 0):
        family.sample(requests, NUM, DRAWN)
    assert seen == once
    assert tokens == [inputs["input_ids"].numel()] + [len(requests) * NUM] * (DRAWN.max_new_tokens - 1)


def test_a_prompt_is_about_as_long_as_its_processor_makes_it(family: HFSampler) -> None:
    for request in (REQUESTS[0], *REQUESTS[3:6:2]):
        exact = family._encode([request])["input_ids"].shape[1]
        assert family._num_tokens(request) == pytest.approx(exact, abs=6 * len(request.images))


def test_completions_that_have_ended_are_computed_no_further(llava: HFSampler) -> None:
    requests, settings = [Request("?"), Request("!")], SamplingSettings(max_new_tokens=20)
    llava.sample(requests, 8, settings)
    with every_nth_token_ends(llava, 5), counted(llava.model.get_input_embeddings(), len) as rows:
        groups = llava.sample(requests, 8, settings)
    assert {completion.finish_reason for group in groups for completion in group} == {"stop"}
    assert rows[:2] == [2, 16]  # the prompts, then their continuations
    assert sorted(rows[1:], reverse=True) == rows[1:]
    assert all(after == before or 2 * after <= before for before, after in zip(rows[1:], rows[2:], strict=False))
    assert rows[-1] <= 2


def test_a_cache_that_mixes_rows_up_is_found_out_and_prompts_are_computed_anew(
    llava: HFSampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llava, "_can_share", lambda _: False)
    expected = llava.sample(REQUESTS, NUM, DRAWN)
    monkeypatch.undo()
    reorder = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: reorder(self, rows.sort(descending=True)[0]))
    with caplog.at_level(logging.WARNING):
        assert llava.sample(REQUESTS, NUM, DRAWN) == expected
        assert llava.sample(REQUESTS[:1], NUM, DRAWN) == expected[:1]  # one prompt alone cannot be mixed up
    (message,) = [record.message for record in caplog.records if "anew" in record.message]
    assert "each completion computes its prompt anew, as the model's cache cannot be copied (its scores are" in message


@pytest.mark.parametrize("error", [NotImplementedError("no beams"), decoding.CannotShareError("two caches")])
def test_a_model_whose_cache_cannot_be_copied_answers_all_the_same(
    llava: HFSampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    expected = llava.sample(REQUESTS, NUM, DRAWN)
    llava._shares.clear()
    monkeypatch.setattr(DynamicCache, "reorder_cache", refuse)
    with caplog.at_level(logging.WARNING):
        assert llava.sample(REQUESTS, NUM, DRAWN) == expected
    (message,) = [record.message for record in caplog.records if "anew" in record.message]
    assert f"{type(error).__name__}: {error}" in message


def test_a_model_without_a_cache_object_is_not_shared(llava: HFSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    llava.model.generation_config.use_cache = False
    inputs = llava._encode([REQUESTS[1]])
    assert "CannotShareError: it keeps 0 caches and not one" in decoding.why_not_shared(llava.model, inputs)


@pytest.mark.parametrize("share", [True, False])
def test_repetition_is_punished_as_the_models_config_says_from_each_prompt_on(llava: HFSampler, share: bool) -> None:
    plain = llava.sample(REQUESTS, 2, GREEDY)
    llava.model.generation_config.repetition_penalty = 1.5
    llava._can_share = lambda _: share
    expected = [generated_alone(llava, request, GREEDY) for request in REQUESTS]
    assert llava.sample(REQUESTS, 2, GREEDY) == [[completion] * 2 for completion in expected] != plain
    with every_nth_token_ends(llava, 6):  # rows leave the batch, and what the penalty knows of their padding with them
        together = llava.sample(REQUESTS, NUM, DRAWN)
        assert [llava.sample([request], NUM, DRAWN)[0] for request in REQUESTS] == together
