"""The in-process sampler on a tiny LLaVA: what decides a completion, what may never be in one, and what is refused.

The weights are random and large, so that every token depends on the prompt and on the pictures.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_builders import decoding, hf_sampler
from data_builders.drawing import Draw
from data_builders.hf_sampler import HFSampler, load_model, load_processor
from data_builders.records import InputError
from data_builders.samplers import Completion, Request, SamplingSettings
from mpo import digits

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=8)
DRAWN = SamplingSettings(temperature=1.0, max_new_tokens=8)
IMAGES = tuple(f"images/known-{number:05d}.png" for number in range(6))
REQUESTS = [
    Request("What is the sum of the digits in the picture, all of them?", IMAGES[:1]),
    Request("And without a picture?"),
    Request("What do both show?", IMAGES[1:3]),
    Request("And these three?", IMAGES[3:6]),
    Request("Short?"),
    Request("What is the largest digit?", IMAGES[1:2]),
]


def enlarge_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)


@pytest.fixture(scope="module")
def loaded(task: Path) -> HFSampler:
    sampler = HFSampler(str(task / "model"), image_root=task, device="cpu")
    enlarge_weights(sampler.model)
    return sampler


@pytest.fixture
def sampler(loaded: HFSampler, monkeypatch: pytest.MonkeyPatch) -> HFSampler:
    """The loaded sampler; what a test sets on it is undone."""
    monkeypatch.setattr(loaded, "batch_size", 64)
    return loaded


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of every batch: what the model was given, and as `output` the new tokens of each row."""
    seen, decode = [], decoding.decode

    def spy(model: Any, inputs: Any, *arguments: Any, **settings: Any) -> list[list[int]]:
        seen.append({**inputs, "output": decode(model, inputs, *arguments, **settings)})
        return seen[-1]["output"]

    monkeypatch.setattr(decoding, "decode", spy)
    return seen


@pytest.fixture
def favour(sampler: HFSampler) -> Iterator[Callable[..., None]]:
    """Makes the model want a token above all others, or (below 0) not at all."""
    hooks = []

    def put(token: int, by: float = 1e4) -> None:
        def change(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits + by * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

        hooks.append(sampler.model.lm_head.register_forward_hook(change))

    yield put
    for hook in hooks:
        hook.remove()


def texts(completions: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in group] for group in completions]


def prompt_inputs(sampler: HFSampler, request: Request) -> Any:
    """One request as the model's own processor sees it."""
    content = [*({"type": "image"} for _ in request.images), {"type": "text", "text": request.prompt}]
    text = sampler.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [Image.open(sampler.image_root / name).convert("RGB") for name in request.images] or None
    return sampler.processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)


def argmax_by_hand(sampler: HFSampler, request: Request, steps: int) -> str:
    """Greedy decoding with one whole forward pass per token, no cache, no batch and no `generate`."""
    inputs = dict(prompt_inputs(sampler, request))
    generated: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = sampler.model(**inputs).logits[0, -1]
        logits[sampler.tokenizer.image_token_id] = -torch.inf
        token = int(logits.argmax())
        if token == sampler.tokenizer.eos_token_id:
            break
        generated.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return sampler.tokenizer.decode(generated, skip_special_tokens=True)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{len(r.images)} images")
def test_greedy_is_the_likeliest_token_at_every_step(sampler: HFSampler, request_: Request) -> None:
    ((completion,),) = sampler.sample([request_], 1, GREEDY)
    assert completion.text == argmax_by_hand(sampler, request_, GREEDY.max_new_tokens)


def test_a_batch_of_any_mix_gives_each_request_what_it_gets_alone(
    sampler: HFSampler, calls: list[dict[str, Any]]
) -> None:
    together = sampler.sample(REQUESTS, 1, GREEDY)
    assert ["pixel_values" in call for call in calls] == [False, True]
    assert [call["input_ids"].shape[0] for call in calls] == [2, 4]
    alone = [sampler.sample([request], 1, GREEDY)[0] for request in REQUESTS]
    assert together == alone
    assert len({text for (text,) in texts(together)}) == len(REQUESTS)


def test_completions_stand_in_the_order_of_the_requests(sampler: HFSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dict(zip(REQUESTS, sampler.sample(REQUESTS, 1, GREEDY), strict=True))
    monkeypatch.setattr(sampler, "batch_size", 2)
    shuffled = [REQUESTS[i] for i in (4, 2, 0, 5, 1, 3)]
    assert sampler.sample(shuffled, 1, GREEDY) == [expected[request] for request in shuffled]


def test_every_completion_of_a_request_sees_all_its_pictures_in_their_order(sampler: HFSampler) -> None:
    nearly_greedy = replace(GREEDY, temperature=1e-4)
    greedy = texts(sampler.sample(REQUESTS, 1, GREEDY))
    assert texts(sampler.sample(REQUESTS, 3, nearly_greedy)) == [group * 3 for group in greedy]
    swapped = Request(REQUESTS[2].prompt, REQUESTS[2].images[::-1])
    assert texts(sampler.sample([swapped], 1, GREEDY)) != [greedy[2]]


def test_the_same_seed_gives_the_same_completions_and_another_seed_others(sampler: HFSampler) -> None:
    first = sampler.sample(REQUESTS, 4, DRAWN)
    torch.rand(7)
    assert sampler.sample(REQUESTS, 4, DRAWN) == first
    assert sampler.sample(REQUESTS, 4, replace(DRAWN, seed=1)) != first
    assert all(len(set(group)) == 4 for group in texts(first))


def test_sampling_leaves_the_process_wide_random_numbers_alone(sampler: HFSampler) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler.sample(REQUESTS[:1], 2, DRAWN)
    assert torch.equal(torch.rand(3), expected)


def test_what_was_drawn_depends_neither_on_the_batch_nor_on_its_size(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = sampler.sample(REQUESTS, 4, DRAWN)
    assert sampler.sample(REQUESTS[::-1], 4, DRAWN) == together[::-1]
    for batch_size in (12, 4, 3, 1):
        monkeypatch.setattr(sampler, "batch_size", batch_size)
        assert sampler.sample(REQUESTS, 4, DRAWN) == together
    assert [sampler.sample([request], 4, DRAWN)[0] for request in REQUESTS] == together


def test_more_completions_begin_with_the_ones_that_fewer_would_be(sampler: HFSampler) -> None:
    assert [group[:2] for group in sampler.sample(REQUESTS, 5, DRAWN)] == sampler.sample(REQUESTS, 2, DRAWN)


def test_different_questions_are_not_answered_with_the_same_random_numbers(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler.model.lm_head, "forward", lambda hidden: hidden.new_zeros(*hidden.shape[:-1], 300))
    requests = [
        Request("One?"),
        Request("Two?"),
        Request("One?", (), "It"),
        Request("One?", IMAGES[:1]),
        Request("One?", IMAGES[1:2]),
    ]
    drawn = sampler.sample(requests, 4, DRAWN)
    assert len({completion.text.removeprefix("It") for group in drawn for completion in group}) == 20


def test_a_batch_holds_at_most_batch_size_completions_and_whole_requests_where_they_fit(
    sampler: HFSampler, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "batch_size", 7)
    sampler.sample([Request(f"Number {number}?") for number in range(5)], 3, DRAWN)
    assert [len(call["output"]) for call in calls] == [6, 6, 3]
    monkeypatch.setattr(sampler, "batch_size", 2)
    sampler.sample([Request("One?"), Request("Two?")], 3, DRAWN)
    assert [len(call["output"]) for call in calls[3:]] == [2, 1, 2, 1]
    monkeypatch.setattr(sampler, "batch_size", 4)
    sampler.sample([Request(f"Number {number}?") for number in range(5)], 3, GREEDY)  # they are computed once
    assert [len(call["output"]) for call in calls[7:]] == [4, 1]


def test_requests_of_similar_length_with_their_pictures_share_a_batch(
    sampler: HFSampler, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "batch_size", 2)
    words = "many " * 12
    requests = [
        Request("Short?", IMAGES[:3]),
        Request(words),
        Request("Short?", IMAGES[:1]),
        Request("Short?"),
        Request("Short, with a beginning", (), words),
        Request("Short?", IMAGES[1:4]),
        Request("Shorter?"),
        Request("Shorter?", IMAGES[4:5]),
    ]
    sampler.sample(requests, 1, GREEDY)
    lengths = [call["attention_mask"].sum(dim=1).tolist() for call in calls]
    alone = [sampler._encode([request])["input_ids"].shape[1] for request in requests]
    text, pictures = (sorted(alone[i] for i in chosen) for chosen in ((1, 3, 4, 6), (0, 2, 5, 7)))
    assert lengths == [text[:2], text[2:], pictures[:2], pictures[2:]]
    assert pictures[1] < text[2] < pictures[2]  # neither words nor pictures alone decide


def test_nothing_asked_is_nothing_answered(sampler: HFSampler) -> None:
    assert sampler.sample([], 4, DRAWN) == []


def test_several_greedy_completions_are_one_repeated(sampler: HFSampler, calls: list[dict[str, Any]]) -> None:
    completions = sampler.sample(REQUESTS[:2], 3, GREEDY)
    assert [len(call["output"]) for call in calls] == [1, 1]  # with pictures, and without
    assert completions == [[group[0]] * 3 for group in sampler.sample(REQUESTS[:2], 1, GREEDY)]


def test_temperature_top_k_and_top_p_shape_what_is_drawn(sampler: HFSampler) -> None:
    greedy = texts(sampler.sample(REQUESTS[:1], 1, GREEDY))[0][0]
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert set(texts(sampler.sample(REQUESTS[:1], 6, replace(DRAWN, **narrow)))[0]) == {greedy}
    assert len(set(texts(sampler.sample(REQUESTS[:1], 6, DRAWN))[0])) > 1


@pytest.mark.parametrize("settings", [GREEDY, DRAWN])
def test_no_image_token_is_generated_even_if_the_model_wants_nothing_else(
    sampler: HFSampler, calls: list[dict[str, Any]], favour: Callable[..., None], settings: SamplingSettings
) -> None:
    image_token = sampler.tokenizer.image_token_id
    favour(image_token)
    inputs = prompt_inputs(sampler, REQUESTS[0])
    with torch.no_grad():
        assert int(sampler.model(**inputs).logits[0, -1].argmax()) == image_token
    completions = sampler.sample(REQUESTS, 2, settings)
    assert all(image_token not in row for call in calls for row in call["output"])
    assert [completion.error for group in completions for completion in group] == [None] * 2 * len(REQUESTS)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("settings", [GREEDY, replace(DRAWN, temperature=0.5, top_k=2, top_p=0.9)])
def test_log_probabilities_of_the_first_token_are_those_of_the_logits_and_change_no_answer(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch, settings: SamplingSettings, share: bool
) -> None:
    monkeypatch.setattr(sampler, "_can_share", lambda _: share)
    plain = sampler.sample(REQUESTS, 2, settings)
    found = sampler.sample(REQUESTS, 2, replace(settings, top_logprobs=5))
    assert texts(found) == texts(plain)
    assert {completion.first_logps for group in plain for completion in group} == {None}
    for request, group in zip(REQUESTS, found, strict=True):
        with torch.no_grad():
            logits = sampler.model(**prompt_inputs(sampler, request)).logits[0, -1]
        logps, ids = logits.index_fill(0, torch.tensor(sampler.image_tokens), -torch.inf).log_softmax(-1).topk(5)
        for completion in group:
            tokens, values = zip(*completion.first_logps, strict=True)
            assert list(tokens) == [sampler.tokenizer.decode(id, skip_special_tokens=True) for id in ids]
            assert list(values) == pytest.approx(logps.tolist(), abs=1e-3)


LONG = replace(GREEDY, max_new_tokens=32)


def play_back(sampler: HFSampler, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Makes the model answer with these tokens, and end then, whatever it is asked."""
    tokens = [*tokens, sampler.tokenizer.eos_token_id]

    def choose(_: Draw, __: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(rows, tokens[step])

    monkeypatch.setattr(Draw, "__call__", choose)


def test_a_response_that_spells_the_image_token_is_an_error_and_not_a_crash_later(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = [id for part in ("see <ima", "ge> here") for id in sampler.tokenizer(part)["input_ids"]]
    play_back(sampler, monkeypatch, spelled)
    ((completion,),) = sampler.sample([Request("What?")], 1, LONG)
    assert completion == Completion("see <image> here", "error", "the response contains an image token")


def test_a_prefix_that_spells_the_image_token_is_an_error_of_that_request_alone(sampler: HFSampler) -> None:
    plain = Request("What?", (), "It is")
    spelled, whole = sampler.sample([Request("What?", (), "The <image> is"), plain], 2, GREEDY)
    assert spelled == [Completion("The <image> is", "error", "the prefix contains an image token")] * 2
    assert [whole[0].error, whole] == [None, sampler.sample([plain], 2, GREEDY)[0]]


@pytest.mark.parametrize("images", [(), IMAGES[:1]])
def test_a_question_that_contains_the_image_token_is_refused_with_advice(
    sampler: HFSampler, images: tuple[str, ...]
) -> None:
    with pytest.raises(
        InputError, match=r"the prompt '<image>\\nWhat\?' contains <image>.*take it out of the questio"
    ):
        sampler.sample([Request("<image>\nWhat?", images)], 1, GREEDY)


def test_a_prefix_is_what_the_model_goes_on_from(sampler: HFSampler, calls: list[dict[str, Any]]) -> None:
    prefix = "top-left is 3. top-right is"
    (group,) = sampler.sample([replace(REQUESTS[0], prefix=prefix)], 3, DRAWN)
    assert all(completion.text.startswith(prefix) and len(completion.text) > len(prefix) for completion in group)
    asked = sampler.tokenizer.decode(calls[0]["input_ids"][0])
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n" + prefix)
    assert [completion.text for completion in group] == [
        prefix + sampler.tokenizer.decode(row, skip_special_tokens=True) for row in calls[0]["output"]
    ]


def test_requests_with_and_without_prefix_share_a_batch(sampler: HFSampler, calls: list[dict[str, Any]]) -> None:
    requests = [REQUESTS[1], replace(REQUESTS[1], prefix="top-left is 3."), REQUESTS[4]]
    together = sampler.sample(requests, 1, GREEDY)
    assert len(calls) == 1
    assert together == [sampler.sample([request], 1, GREEDY)[0] for request in requests]


def test_the_seam_behind_a_prefix_is_as_the_model_wrote_it(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for continuation in (" three", "three", ", three", "\nthree", "ee"):
        play_back(sampler, monkeypatch, sampler.tokenizer(continuation)["input_ids"])
        ((completion,),) = sampler.sample([Request("Count.", (), "one two")], 1, LONG)
        assert completion.text == "one two" + continuation


def test_words_are_not_glued_where_the_tokenizer_drops_the_space_before_a_first_token(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SentencePiece tokenizers do, those of LLaVA and InternVL2 among them."""
    sampler = metaspace_sampler(task, tmp_path)
    ids = sampler.tokenizer.convert_tokens_to_ids(["▁three", "▁four"])
    assert sampler.tokenizer.decode(ids) == "three four"
    play_back(sampler, monkeypatch, ids)
    completions = sampler.sample([Request("Count.", (), "one two"), Request("Count.")], 1, LONG)
    assert texts(completions) == [["one two three four"], ["three four"]]


def metaspace_sampler(task: Path, folder: Path) -> HFSampler:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(["one two three four", "user\nassistant\nCount."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        extra_special_tokens={"image_token": special[3]},
    )
    processor, model = digits.build_model(fast, seed=0)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return HFSampler(str(folder), image_root=task, device="cpu")


@pytest.mark.parametrize("text", ["top-left is 3. What is the sum?", "  two  spaces\n\nand lines ", "x", ""])
def test_token_ends_cut_a_text_where_its_tokens_end(sampler: HFSampler, text: str) -> None:
    ids, ends = sampler.tokenizer(text)["input_ids"], sampler.token_ends(text)
    assert [text[:end] for end in ends] == [sampler.tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]


def test_token_ends_never_cut_a_character(sampler: HFSampler) -> None:
    assert sampler.token_ends("图 猫") == [1, 1, 1, 2, 3, 3, 3]  # a character is three tokens of one byte each


def test_a_completion_ends_where_the_model_ends_it(sampler: HFSampler, favour: Callable[..., None]) -> None:
    favour(sampler.tokenizer.eos_token_id)
    assert sampler.sample(REQUESTS[:2], 2, DRAWN) == [[Completion("", "stop")] * 2] * 2
    assert sampler.sample(REQUESTS[:1], 1, replace(DRAWN, max_new_tokens=1)) == [[Completion("", "stop")]]


def test_a_completion_that_reaches_the_limit_is_cut_off(
    sampler: HFSampler, favour: Callable[..., None], calls: list[dict[str, Any]]
) -> None:
    favour(sampler.tokenizer.eos_token_id, -1e4)
    completions = sampler.sample(REQUESTS, 2, replace(DRAWN, max_new_tokens=3))
    assert {completion.finish_reason for group in completions for completion in group} == {"length"}
    assert {len(row) for call in calls for row in call["output"]} == {3}


def test_a_short_completion_beside_a_long_one_holds_nothing_after_its_end(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = (sampler.tokenizer(text)["input_ids"] for text in ("So 5<|im_end|>!!!!!!!!!!!!", "It is 7, or so!"))

    def choose(_: Draw, __: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        return torch.tensor([(short, long)[row == 1][step] for row in rows.tolist()])

    monkeypatch.setattr(Draw, "__call__", choose)
    settings = replace(DRAWN, max_new_tokens=len(long))
    assert sampler.sample([Request("?")], 4, settings) == [
        [Completion("So 5", "stop"), Completion("It is 7, or so!", "length"), *[Completion("So 5", "stop")] * 2]
    ]


def test_an_end_of_the_tokenizer_alone_ends_a_completion(task: Path, copy: Path) -> None:
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "eos_token_id": 5}), encoding="utf-8")
    sampler = HFSampler(str(copy), image_root=task, device="cpu")
    assert sampler.model.generation_config.eos_token_id == sorted([5, sampler.tokenizer.eos_token_id])
    with pytest.MonkeyPatch.context() as patch:
        play_back(sampler, patch, sampler.tokenizer("So 5")["input_ids"])
        assert sampler.sample([Request("?")], 2, LONG) == [[Completion("So 5", "stop")] * 2]


def test_a_models_own_sampling_settings_change_nothing_and_its_constraints_are_said(
    task: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = HFSampler(str(copy), image_root=task, device="cpu")
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    own = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "min_p": 0.9, "max_length": 8}
    path.write_text(json.dumps({**settings, **own}), encoding="utf-8")
    shipped = HFSampler(str(copy), image_root=task, device="cpu")
    enlarge_weights(plain.model)
    enlarge_weights(shipped.model)
    assert shipped.sample(REQUESTS[:2], 4, DRAWN) == plain.sample(REQUESTS[:2], 4, DRAWN)
    path.write_text(json.dumps({**settings, "repetition_penalty": 1.05}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="data_builders"):
        HFSampler(str(copy), image_root=task, device="cpu")
    assert [record.message for record in caplog.records if record.name.startswith("data_builders")] == [
        f"{copy}: tokens are drawn under its generation config's {{'repetition_penalty': 1.05}}"
    ]


def memory_for(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Lets memory run out above so many sequences at a time; notes all tries."""
    tries, decode = [], decoding.decode

    def spy(model: Any, inputs: Any, num: int, *arguments: Any, **settings: Any) -> list[list[int]]:
        tries.append(len(inputs["input_ids"]) * num)
        if tries[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return decode(model, inputs, num, *arguments, **settings)

    monkeypatch.setattr(decoding, "decode", spy)
    return tries


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sampler.sample(REQUESTS, 4, DRAWN)
    tries = memory_for(monkeypatch, 3)
    with caplog.at_level(logging.WARNING):
        assert sampler.sample(REQUESTS, 4, DRAWN) == expected
    assert tries == [8, 4, *[2] * 12]
    messages = [record.message for record in caplog.records]
    assert [message.split("(")[0] for message in messages] == [
        "memory ran out with 8 sequences at a time ",
        "memory ran out with 4 sequences at a time ",
    ]
    assert messages[1].endswith("going on with `batch_size` 2")


def test_a_request_that_does_not_fit_into_memory_alone_is_an_error_and_the_others_are_answered(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = decoding.decode

    def spy(model: Any, inputs: Any, *arguments: Any, **settings: Any) -> list[list[int]]:
        if inputs["input_ids"].shape[1] > 100:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return decode(model, inputs, *arguments, **settings)

    expected = sampler.sample(REQUESTS[1:2], 2, DRAWN)
    monkeypatch.setattr(decoding, "decode", spy)
    huge, fine = sampler.sample([Request("Huge? " * 100), REQUESTS[1]], 2, DRAWN)
    assert huge == [Completion("", "error", "memory ran out for this request alone")] * 2
    assert [fine] == expected


def test_another_failure_of_the_model_is_raised_as_it_is(sampler: HFSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(decoding, "decode", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        sampler.sample(REQUESTS[:1], 1, GREEDY)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN])
def test_scores_that_are_not_numbers_are_errors_of_that_request(
    sampler: HFSampler, monkeypatch: pytest.MonkeyPatch, settings: SamplingSettings
) -> None:
    requests = [REQUESTS[1], replace(REQUESTS[4], prefix="It is")]
    expected = sampler.sample(requests, 2, settings)
    processors = decoding._Loop._processors

    def break_second(loop: Any) -> Callable[..., torch.Tensor]:
        apply = processors(loop)

        def change(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            asked = [row in sampler.tokenizer.decode(ids_of) for row in ("It is",) for ids_of in ids]
            return apply(ids, logits).masked_fill(torch.tensor(asked)[:, None], torch.nan)

        return change

    monkeypatch.setattr(decoding._Loop, "_processors", break_second)
    first, second = sampler.sample(requests, 2, settings)
    assert first == expected[0]
    assert second == [Completion("It is", "error", "the model's scores are not numbers")] * 2


def test_a_model_with_an_encoder_is_refused(loaded: HFSampler, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model.config, "is_encoder_decoder", True)
    monkeypatch.setattr(hf_sampler, "load_model", lambda *_, **__: loaded.model)
    with pytest.raises(InputError, match="has an encoder and a decoder.*Take a model that reads and writes one text"):
        HFSampler(str(task / "model"), image_root=task, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("max_new_tokens", 0, "at least 1"),
    ],
)
def test_settings_that_nothing_can_be_drawn_with_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be {words}.*, got {value}"):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize("load", [load_model, load_processor])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no model folder /no/such/folder, and it is not a Hub name"),
        ("sft", "there is no model folder sft, and it is not a Hub name"),
        ("runs/one/sft", "there is no model folder runs/one/sft, and it is not a Hub name"),
        (
            "runs/sft",
            r"there is no model folder runs/sft, and it could not be taken from the Hub either .* Check the p",
        ),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_advice(
    load: Callable[..., Any], name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"(?s){message}"):
        load(name)


@pytest.fixture
def copy(task: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(task / "model", tmp_path / "model"))


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_a_folder_without_a_config_is_no_model(copy: Path, load: Callable[..., Any]) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"is not a model folder \(it has no config\.json\): the step that writes it"):
        load(copy)


def test_a_folder_without_a_processor_is_refused_with_where_to_get_one(copy: Path) -> None:
    (copy / "processor_config.json").unlink()
    advice = r"(?s)has no processor for text and images .* copy them from the model it was trained from, or call `proc"
    with pytest.raises(InputError, match=advice):
        load_processor(copy)


def test_a_language_model_without_eyes_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **small)).save_pretrained(tmp_path)
    digits.train_tokenizer(["What is the sum?"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?s)cannot be loaded as a vision-language model .* takes images and text"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"has no processor for text and images \(found only a \w+\)"):
        load_processor(tmp_path)


def test_a_model_of_an_unknown_kind_or_with_a_broken_config_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    for text in (json.dumps({**config, "model_type": "unheard"}), '{"model_type": '):
        (copy / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="(?s)cannot be loaded as a vision-language model"):
            load_model(copy)


def test_weights_that_were_cut_off_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cannot be loaded .* It must be a whole model folder"):
        load_model(copy)


def test_pickled_weights_are_never_opened(copy: Path) -> None:
    model = load_model(copy)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no file named model\.safetensors .* with weights in safetensors"):
        load_model(copy)


def test_a_model_keeps_the_type_it_was_saved_in_unless_told_otherwise(copy: Path, task: Path) -> None:
    load_model(copy, dtype="bfloat16").save_pretrained(copy)
    assert load_model(copy).dtype == torch.bfloat16
    assert load_model(copy, dtype="float32").dtype == torch.float32
    sampler = HFSampler(str(copy), image_root=task, device="cpu")
    assert sampler.model.dtype == torch.bfloat16
    assert len(sampler.sample(REQUESTS, 1, GREEDY)) == len(REQUESTS)


def test_a_missing_picture_is_refused_with_its_name(sampler: HFSampler) -> None:
    with pytest.raises(InputError, match=r"image 'images/none\.png' does not exist under the image root"):
        sampler.sample([Request("What?", ("images/none.png",))], 1, GREEDY)
