"""The server sampler: against a server that fails as it is told to, and against the real `transformers serve`."""

import asyncio
import base64
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import (
    Body,
    Fault,
    FaultyServer,
    answer_all,
    answer_one,
    choice,
    drop,
    half,
    late,
    question,
    refuses,
    says,
)
from PIL import Image
from tiny_models import byte_tokenizer, picture
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_builders import chat_format, servers
from data_builders.chat_format import completion_of, data_url, rendered_prompt
from data_builders.dropout_ntp import DropoutNTPConfig
from data_builders.dropout_ntp import run as run_dropout_ntp
from data_builders.hf_sampler import HFSampler
from data_builders.images import load_image
from data_builders.records import InputError, Pair, Response
from data_builders.sample import SampleConfig
from data_builders.sample import run as run_sample
from data_builders.samplers import Completion, Request, SamplingSettings, word_ends
from data_builders.server_sampler import ServerSampler
from data_builders.servers import server_address
from data_builders.shards import read_stage, write_rows
from mpo.evaluate import EvalConfig
from mpo.evaluate import run as run_eval

DRAWN = SamplingSettings(max_new_tokens=8)
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=8)
HI = [Request("Hi?")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of hundredths of a second; a key or a proxy in the developer's environment is nobody's business."""
    for name, seconds in {"BACKOFF": 0.01, "REST": 0.02, "MAX_REST": 0.1, "PATIENCE": 0.6, "CONNECT": 1.0}.items():
        monkeypatch.setattr(servers, name, seconds)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make(*targets: FaultyServer | str, **settings: Any) -> ServerSampler:
    addresses = [target if isinstance(target, str) else target.address for target in targets]
    return ServerSampler("tiny", addresses, **{"image_root": Path(), "concurrency": 4, "timeout": 5.0, **settings})


def texts(found: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in group] for group in found]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Requests


def test_a_request_says_how_many_tokens_are_drawn_and_how() -> None:
    settings = SamplingSettings(temperature=0.7, top_p=0.9, top_k=50, max_new_tokens=12)
    with FaultyServer() as server:
        ((completion,),) = make(server).sample(HI, 1, settings)
    (body,) = server.calls
    seed = body.pop("seed")
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi?"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "max_tokens": 12,
    }
    assert 0 <= seed < 2**31
    assert completion == Completion(f"Hi? {seed} 0", "stop")


def test_log_probabilities_of_the_first_token_are_asked_for_and_read() -> None:
    first = {"token": " Yes", "logprob": -0.5, "top_logprobs": []}
    first["top_logprobs"] = [{"token": " Yes", "logprob": -0.5}, {"token": "No", "logprob": -1}]
    said = {"choices": [choice("Yes") | {"logprobs": {"content": [first, {"token": ".", "logprob": 0}]}}]}
    with FaultyServer(answer=lambda _: said) as server:
        ((completion,),) = make(server).sample(HI, 1, replace(GREEDY, top_logprobs=7))
    assert (server.calls[0]["logprobs"], server.calls[0]["top_logprobs"]) == (True, 7)
    assert completion == Completion("Yes", "stop", first_logps=((" Yes", -0.5), ("No", -1.0)))


@pytest.mark.parametrize(
    "logprobs",
    [
        None, [], "yes", {}, {"content": None}, {"content": []}, {"content": ["Yes"]}, {"content": [{}]},
        {"content": [{"top_logprobs": "Yes"}]}, {"content": [{"top_logprobs": ["Yes", {"token": "Yes"}]}]},
        {"content": [{"top_logprobs": [{"token": 3, "logprob": -1.0}, {"token": "Yes", "logprob": "0"}]}]},
        {"content": [{"top_logprobs": [{"token": "Yes", "logprob": 10**400}, {"token": "No", "logprob": 0.5}]}]},
        {"content": [{"top_logprobs": [{"token": "Yes", "logprob": float("nan")}]}]},
    ],
)  # fmt: skip
def test_what_is_no_log_probability_is_passed_over(logprobs: object) -> None:
    with FaultyServer(answer=lambda _: {"choices": [choice("Yes") | {"logprobs": logprobs}]}) as server:
        ((completion,),) = make(server).sample(HI, 1, replace(GREEDY, top_logprobs=7))
    assert completion == Completion("Yes", "stop")


def test_a_server_without_log_probabilities_answers_without_them(caplog: pytest.LogCaptureFixture) -> None:
    with FaultyServer(answer=refuses("logprobs")) as server:
        found = make(server).sample([*HI, Request("Ho?")], 1, replace(GREEDY, top_logprobs=7))
    assert texts(found) == [["Hi? None 0"], ["Ho? None 0"]]
    assert all("top_logprobs" not in call for call in server.calls[-2:])
    (message,) = warnings(caplog)
    assert "is asked without it: how sure the model is stays unknown" in message


def test_a_server_is_told_to_keep_every_token_since_its_own_default_may_be_another() -> None:
    with FaultyServer() as server:
        make(server).sample(HI, 1, DRAWN)
    assert server.calls[0]["top_k"] == -1


def test_several_completions_are_one_request_where_the_server_has_it() -> None:
    with FaultyServer() as server:
        found = make(server).sample(HI, 3, DRAWN)
    assert [body["n"] for body in server.calls] == [3]
    seed = server.calls[0]["seed"]
    assert texts(found) == [[f"Hi? {seed} 0", f"Hi? {seed} 1", f"Hi? {seed} 2"]]


def test_a_server_that_ignores_n_is_asked_for_the_rest_one_by_one_with_other_seeds() -> None:
    with FaultyServer(answer=answer_one) as server:
        sampler = make(server)
        found = sampler.sample(HI, 4, DRAWN)
        assert [body.get("n") for body in server.calls] == [4, None, None, None]
        assert len(set(texts(found)[0])) == 4
        assert sampler.sample(HI, 4, DRAWN) == found
    assert [body.get("n") for body in server.calls[4:]] == [None] * 4


def test_fewer_choices_than_asked_for_are_kept_and_the_others_asked_for_again() -> None:
    with FaultyServer(answer=lambda body: answer_all({**body, "n": min(2, body.get("n", 1))})) as server:
        found = make(server).sample(HI, 5, DRAWN)
    assert len(set(texts(found)[0])) == 5
    assert len(server.calls) == 4


def test_more_choices_than_asked_for_are_not_taken() -> None:
    with FaultyServer(answer=lambda body: answer_all({**body, "n": 7})) as server:
        assert [len(group) for group in make(server).sample(HI * 2, 2, DRAWN)] == [2, 2]


def test_seeds_depend_on_seed_and_question_and_on_nothing_else() -> None:
    with FaultyServer() as server:
        sampler = make(server)
        first = sampler.sample([Request("One?"), Request("Two?")], 1, DRAWN)
        assert sampler.sample([Request("Two?"), Request("One?")], 1, DRAWN) == first[::-1]
        assert sampler.sample([Request("One?")], 1, replace(DRAWN, seed=1)) != first[:1]
    assert len({body["seed"] for body in server.calls}) == 3


def test_several_greedy_completions_are_one_repeated() -> None:
    with FaultyServer() as server:
        ((first, second, third),) = make(server).sample(HI, 3, GREEDY)
    assert first == second == third
    assert [sorted(body) for body in server.calls] == [["max_tokens", "messages", "model", "temperature"]]


def test_completions_stand_in_the_order_of_the_requests_whoever_is_done_first() -> None:
    def answer(body: Body) -> Body:
        time.sleep(0.002 * (int(question(body)) * 7 % 5))
        return answer_all(body)

    requests = [Request(str(number)) for number in range(12)]
    with FaultyServer(answer=answer) as one, FaultyServer(answer=answer) as other:
        found = make(one, other).sample(requests, 2, DRAWN)
    assert [[text.split()[0] for text in group] for group in texts(found)] == [[str(n)] * 2 for n in range(12)]
    assert [[text.split()[2] for text in group] for group in texts(found)] == [["0", "1"]] * 12


def test_nothing_asked_is_nothing_answered() -> None:
    with FaultyServer() as server:
        assert make(server).sample([], 4, DRAWN) == []


# Answers


@pytest.mark.parametrize(
    ("answer", "text", "reason", "error"),
    [
        (choice("Four."), "Four.", "stop", None),
        (choice("Four", "length"), "Four", "length", None),
        (choice("Four", None), "Four", "stop", None),
        (choice(None, "length"), "", "length", None),
        (choice("", "stop"), "", "stop", None),
        (choice("Fo", "content_filter"), "Fo", "error", "the server ended the response with 'content_filter'"),
        (choice(None, "tool_calls"), "", "error", "the server ended the response with 'tool_calls'"),
        (choice("\n\n4", reasoning_content="\n2 + 2\n"), "<think>\n2 + 2\n</think>\n\n4", "stop", None),
        (choice("4", reasoning="2 + 2"), "<think>2 + 2</think>4", "stop", None),
        (choice(None, "length", reasoning_content="2 + "), "<think>2 + ", "length", None),
        (choice("4", reasoning_content=None), "4", "stop", None),
        ({"message": {"content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}}, "42", "stop", None),
        ({"text": " four", "finish_reason": "stop"}, " four", "stop", None),
    ],
)
def test_an_answer_becomes_a_completion(answer: Body, text: str, reason: str, error: str | None) -> None:
    assert completion_of(answer, "", exact=False) == Completion(text, reason, error)


@pytest.mark.parametrize(
    ("prefix", "text", "exact", "expected"),
    [
        ("It is", " four.", False, "It is four."),
        ("It is", "n't.", False, "It isn't."),
        ("It is ", " four.", False, "It is four."),
        ("It is ", "four.", False, "It is four."),
        ("One.\n\n", "\n\nTwo.", False, "One.\n\nTwo."),
        ("图中有", "三只猫", False, "图中有三只猫"),
        ("It is ", " four.", True, "It is  four."),
    ],
)
def test_a_prefix_and_its_continuation_are_neither_glued_nor_torn(
    prefix: str, text: str, exact: bool, expected: str
) -> None:
    assert completion_of({"text": text}, prefix, exact).text == expected


def test_samples_that_are_all_the_same_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with FaultyServer(answer=lambda body: {"choices": [choice("Four.")] * body.get("n", 1)}) as server:
        sampler = make(server)
        for _ in range(2):
            sampler.sample([Request("One?"), Request("Two?")], 4, DRAWN)
    assert warnings(caplog) == [
        "all 4 responses to each of 2 questions are the same at temperature 1. Most likely the server ignores "
        "`temperature` or `seed`: such responses give no pairs."
    ]


def test_equal_samples_of_some_questions_are_nothing_to_talk_about(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: Body) -> Body:
        sure = {"choices": [choice("Four.")] * body.get("n", 1)}
        return sure if question(body) == "Easy?" else answer_all(body)

    with FaultyServer(answer=answer) as server:
        make(server).sample([Request("Easy?"), Request("Hard?")], 4, DRAWN)
        make(server).sample([Request("Easy?")], 3, DRAWN)
        make(server).sample([Request("Easy?")], 4, GREEDY)
    assert warnings(caplog) == []


# Failures that pass


GARBLED = says('{"choices": [{"message"')
FAULTS = {
    "hangs up": drop,
    "half an answer": half,
    "too late": late(0.5),
    "500": says("Internal Server Error", 500),
    "503": says({"error": {"message": "starting"}}, 503),
    "408": says("", 408),
    "429": says({"error": {"message": "slow down"}}, 429),
    "no JSON": GARBLED,
    "no UTF-8": lambda handler: handler.reply("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), 200),
    "another JSON": says(["choices"]),
    "too deep": says("[" * 100_000),
    "an error with status 200": says({"error": {"message": "out of memory"}}),
    "no choices": says({"choices": []}),
    "choices of another kind": says({"choices": ["Four."]}),
    "a text that is none": says({"choices": [{"message": {"content": 4}}]}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_request_that_fails_is_sent_again(fault: Fault) -> None:
    with FaultyServer(fault) as server:
        found = make(server, timeout=0.3).sample(HI, 2, DRAWN)
    seed = server.calls[0]["seed"]
    assert texts(found) == [[f"Hi? {seed} 0", f"Hi? {seed} 1"]]
    assert server.calls[1:] == server.calls[:1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_says_how_long_to_wait_is_left_alone_for_so_long(status: int) -> None:
    with FaultyServer(says("", status, Retry_After="0.3")) as server:
        make(server).sample(HI, 1, DRAWN)
    assert 0.3 <= server.times[1] - server.times[0] < 0.6


def test_waits_between_tries_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BACKOFF", 0.04)
    monkeypatch.setattr(servers, "STRIKES", 9)
    with FaultyServer(GARBLED, GARBLED, GARBLED) as server:
        make(server).sample(HI, 1, DRAWN)
    first, second, third = (after - before for before, after in zip(server.times, server.times[1:], strict=False))
    assert [first > 0.03, second > 0.06, third > 0.12] == [True] * 3
    assert first < 0.1


def test_a_server_that_has_too_much_to_do_costs_no_request_its_tries() -> None:
    with FaultyServer(*[says("", 429, Retry_After="0.01")] * (servers.MAX_TRIES + 2)) as server:
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert completion.error is None


def test_a_request_that_always_fails_is_an_error_and_the_others_are_answered() -> None:
    def answer(body: Body) -> object:
        return says("worker crashed", 500) if question(body) == "Poison?" else answer_all(body)

    with FaultyServer(answer=answer) as server:
        poisoned, *others = make(server).sample([Request(f"{word}?") for word in ("Poison", "One", "Two")], 2, DRAWN)
    assert poisoned == [Completion("", "error", "failed 6 times, at last with: HTTP 500: worker crashed")] * 2
    assert [completion.error for group in others for completion in group] == [None] * 4
    assert [question(body) for body in server.calls].count("Poison?") == servers.MAX_TRIES


def test_an_answer_that_does_not_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "MAX_ANSWER_BYTES", 1000)
    with FaultyServer(says("x" * 2000), says("x" * 2000, 400)) as server:
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
        assert [completion.error, len(server.calls)] == [None, 3]
        server.faults += [says("x" * 2000)] * 9
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert completion.error == "failed 6 times, at last with: the answer is longer than 1,000 bytes"


# Servers that die


def test_servers_share_the_work_and_none_is_given_more_than_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: Body) -> Body:
        time.sleep(0.02)
        return answer_all(body)

    with FaultyServer(answer=answer) as one, FaultyServer(answer=answer) as other:
        make(one, other, concurrency=2).sample([Request(str(number)) for number in range(12)], 1, DRAWN)
    assert sorted([len(one.calls), len(other.calls)]) in [[5, 7], [6, 6]]
    assert [one.most_at_once, other.most_at_once] == [2, 2]


def test_a_request_goes_to_the_server_that_has_the_least_to_do() -> None:
    with FaultyServer(late(0.1), late(0.1)) as one, FaultyServer(late(0.1), late(0.1)) as other:
        make(one, other).sample([Request(str(number)) for number in range(4)], 1, DRAWN)
    assert [len(one.calls), len(other.calls)] == [2, 2]


def test_a_slow_server_is_given_less() -> None:
    def slow(body: Body) -> Body:
        time.sleep(0.1)
        return answer_all(body)

    with FaultyServer(answer=slow) as one, FaultyServer() as other:
        make(one, other, concurrency=1).sample([Request(str(number)) for number in range(12)], 1, DRAWN)
    assert len(one.calls) < 4


def test_a_server_that_is_not_there_is_left_out_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    dead = f"http://127.0.0.1:{unused_port()}"
    with FaultyServer() as server:
        found = make(dead, server).sample([Request(str(number)) for number in range(8)], 2, DRAWN)
    assert [completion.error for group in found for completion in group] == [None] * 16
    assert len(server.calls) == 8
    assert [line.partition(" does not answer and is left out until it does")[0] for line in warnings(caplog)] == [
        f"{dead}/v1"
    ]


def test_a_failed_request_goes_to_another_server() -> None:
    with FaultyServer(GARBLED) as one, FaultyServer() as other:
        make(one, other).sample(HI, 1, DRAWN)
    assert [len(one.calls), len(other.calls)] == [1, 1]


def test_a_server_that_dies_and_comes_back_is_used_again_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = FaultyServer()

    def die(handler: Any) -> None:
        server.stop()
        threading.Timer(0.2, server.start).start()

    server.faults = [says(answer_all({"messages": [{"role": "user", "content": "0"}]})), die]
    with server:
        found = make(server, concurrency=3).sample([Request(str(number)) for number in range(9)], 1, DRAWN)
    assert [completion.error for (completion,) in found] == [None] * 9
    assert [line.split(" ")[1:3] for line in warnings(caplog)] == [["is", "left"], ["is", "back."]]


def test_a_request_is_not_given_up_because_nobody_is_there_to_answer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STRIKES", 1)
    monkeypatch.setattr(servers, "MAX_TRIES", 2)
    server = FaultyServer()

    def die(handler: Any) -> None:
        server.stop()
        threading.Timer(0.3, server.start).start()

    server.faults = [die]
    with server:
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert [completion.error, len(server.calls)] == [None, 2]


def test_the_others_take_over_from_a_server_that_dies() -> None:
    first = FaultyServer()
    first.faults = [lambda _: first.stop()]
    with first, FaultyServer() as second:
        found = make(first, second, concurrency=2).sample([Request(str(number)) for number in range(10)], 1, DRAWN)
    assert [completion.error for (completion,) in found] == [None] * 10
    assert len(second.calls) >= 8


def test_a_server_that_only_fails_is_left_out_while_another_works() -> None:
    broken = FaultyServer(answer=lambda body: says("CUDA error", 500))
    with broken, FaultyServer(late(0.05), late(0.05)) as other:
        found = make(broken, other).sample([Request(str(number)) for number in range(40)], 1, DRAWN)
    assert [completion.error for (completion,) in found] == [None] * 40
    assert len(broken.calls) < 20


def test_the_run_stops_when_no_server_answers_any_more() -> None:
    server = FaultyServer()
    server.faults = [lambda _: server.stop()]
    with server:
        sampler = make(server)
        start = time.monotonic()
        with pytest.raises(
            InputError, match=r"no server has answered for 0\.6 seconds \(http://127.*the same command then goes on"
        ):
            sampler.sample([Request(str(number)) for number in range(9)], 1, DRAWN)
    assert 0.6 < time.monotonic() - start < 3


@pytest.mark.parametrize("status", [429, 500])
def test_the_run_stops_when_servers_answer_with_nothing_but_errors(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "MAX_TRIES", 1000)
    with FaultyServer(answer=lambda body: says({"error": "no quota"}, status)) as server:
        sampler = make(server)
        with pytest.raises(InputError, match=f"no server has answered for .*HTTP {status}: no quota"):
            sampler.sample(HI * 4, 1, DRAWN)
    assert len(server.calls) < 60


# Requests that are refused


def test_a_refused_request_is_an_error_that_says_why_and_is_not_repeated() -> None:
    def answer(body: Body) -> object:
        words = {"error": {"message": "This model's maximum context length is 64 tokens.", "code": 400}}
        return says(words, 400) if question(body) == "Long?" else answer_all(body)

    with FaultyServer(answer=answer) as server:
        refused, (whole, _) = make(server).sample([Request("Long?"), Request("Short?")], 2, DRAWN)
    reason = "HTTP 400: This model's maximum context length is 64 tokens."
    assert refused == [Completion("", "error", reason)] * 2
    assert [whole.error, len(server.calls)] == [None, 2]


@pytest.mark.parametrize("name", ["top_k", "seed"])
def test_a_parameter_that_a_server_refuses_is_left_out_and_reported_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyServer(answer=refuses(name)) as server:
        sampler = make(server, concurrency=1)
        for _ in range(2):
            found = sampler.sample([Request("One?"), Request("Two?")], 2, DRAWN)
    assert [completion.error for group in found for completion in group] == [None] * 4
    assert [name in body for body in server.calls] == [True, False, False, False, False]
    (warning,) = warnings(caplog)
    assert f"refuses `{name}` (Unrecognized request argument supplied: '{name}') and is asked without it" in warning


@pytest.mark.parametrize(
    "words",
    [
        {"error": {"message": "Unrecognized request argument supplied: 'n'"}},
        {"detail": [{"loc": ["body", "n"], "msg": "Extra inputs are not permitted", "input": {"seed": 1}}]},
        {"message": "Only n=1 is supported."},
        {"error": {"message": "Unknown parameter", "param": "n"}},
        "n must be 1",
    ],
)
def test_a_server_that_refuses_n_is_asked_once_for_each_completion(words: object) -> None:
    answer: Callable[[Body], object] = lambda body: says(words, 422) if "n" in body else answer_all(body)  # noqa: E731
    with FaultyServer(answer=answer) as server:
        ((*completions,),) = make(server).sample(HI, 3, DRAWN)
    assert len({completion.text for completion in completions}) == 3
    assert ["n" in body for body in server.calls] == [True, False, False, False]
    assert "seed" in server.calls[-1]


def test_a_server_that_wants_another_name_for_max_tokens_is_given_it() -> None:
    words = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    answer: Callable[[Body], object] = lambda b: says(words, 400) if "max_tokens" in b else answer_all(b)  # noqa: E731
    with FaultyServer(answer=answer) as server:
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert completion.error is None
    assert server.calls[-1]["max_completion_tokens"] == 8


def test_a_prompt_that_is_too_long_does_not_cost_a_server_its_limit_of_tokens() -> None:
    words = "'max_tokens' or 'max_completion_tokens' is too large: 8. The maximum context length is 4."
    with FaultyServer(says(words, 400)) as server:
        failed, whole = make(server, concurrency=1).sample([Request("One?"), Request("Two?")], 1, DRAWN)
    assert [failed[0].error, whole[0].error] == [f"HTTP 400: {words}", None]
    assert server.calls[1]["max_tokens"] == 8


def test_a_temperature_that_a_server_refuses_is_never_left_out() -> None:
    with (
        FaultyServer(answer=refuses("temperature")) as server,
        pytest.raises(InputError, match="refuses `temperature` .*give a value that it takes"),
    ):
        make(server).sample(HI, 1, DRAWN)


# Keys, addresses and models


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    echo = {"error": {"message": "sk-secret-123 may not use this model"}}
    with FaultyServer(says(echo, 400)) as server:
        sampler = make(server, api_key_env="MY_KEY", concurrency=1)
        (failed,), (whole,) = sampler.sample([Request("One?"), Request("Two?")], 1, DRAWN)
        assert [headers["authorization"] for headers in server.headers] == ["Bearer sk-secret-123"] * 2
        server.faults = [says(echo, 401)]
        with pytest.raises(InputError, match="refuses the key .*`api_key_env`") as caught:
            sampler.sample(HI, 1, DRAWN)
    told = [str(caught.value), failed.error, whole.text, repr(sampler.servers), caplog.text]
    assert ["sk-secret" in text for text in told] == [False] * 5
    assert failed.error == "HTTP 400: [key] may not use this model"


def test_the_key_of_another_service_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with FaultyServer() as server:
        make(server, api_key_env="MY_KEY").sample(HI, 1, DRAWN)
    assert server.headers[0]["authorization"] == "Bearer none"


def test_a_redirect_is_not_followed() -> None:
    with FaultyServer() as other, FaultyServer() as server:
        server.faults = [says("", 307, Location=f"{other.address}/chat/completions")]
        with pytest.raises(InputError, match="answers with a redirect"):
            make(server).sample(HI, 1, DRAWN)
    assert other.calls == []


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("http://host:8000/v1/", "http://host:8000/v1"),
        ("host:8000", "http://host:8000/v1"),
        (" https://example.org/api/v1 ", "https://example.org/api/v1"),
        ("https://example.org/proxy", "https://example.org/proxy/v1"),
        ("https://example.org/v1beta/openai", "https://example.org/v1beta/openai/v1"),
        ("http://host/v1/chat/completions", "http://host/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_is_understood_with_and_without_what_follows_it(text: str, address: str) -> None:
    assert server_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://host", "http://host:port", "http://host:99999", "http://h?a=b"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no address of a server: give it as http://host:8000/v1"):
        server_address(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="`server` for host holds a password") as caught:
        server_address("http://me:secret@host:8000")
    assert "secret" not in str(caught.value)


def test_the_same_server_given_twice_is_one() -> None:
    with FaultyServer() as server:
        assert len(make(server, server.address.removesuffix("/v1")).servers) == 1


def test_no_server_at_all_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"no server answers \(http://127.*Are they running, and is `server` right"):
        make(f"127.0.0.1:{unused_port()}")


def test_a_model_that_is_not_served_is_refused_with_those_that_are() -> None:
    with FaultyServer(says({"error": {"message": "The model `tiny` does not exist."}}, 404)) as server:
        server.models = ["large", "huge"]
        with pytest.raises(InputError, match="does not serve 'tiny' .*It names large, huge: give"):
            make(server)


def test_a_model_that_is_served_without_being_listed_is_taken() -> None:
    with FaultyServer() as server:
        server.models = ["something in the cache"]
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert completion.error is None


@pytest.mark.parametrize(
    "models", [says("", 404), says("Internal Server Error", 500), says("<html>"), says({"data": [3]}), says({})]
)
def test_a_server_that_cannot_list_its_models_is_taken(models: Fault) -> None:
    with FaultyServer() as server:
        server.models = models
        ((completion,),) = make(server).sample(HI, 1, DRAWN)
    assert completion.error is None


def test_a_model_that_is_gone_stops_the_run() -> None:
    with (
        FaultyServer(says({"error": {"message": "The model `tiny` does not exist."}}, 404)) as server,
        pytest.raises(InputError, match="cannot be asked for 'tiny' .*is it served"),
    ):
        make(server).sample(HI, 1, DRAWN)


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_settings_that_nothing_can_run_with_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be at least 1 and `timeout`"):
        make("http://127.0.0.1:1", **settings)


def test_a_missing_client_is_answered_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'mpo\[serve\]'"):
        make("http://127.0.0.1:1")


# Where it is called from


def test_it_works_where_an_event_loop_is_running() -> None:
    async def notebook() -> list[list[Completion]]:
        return make(server).sample(HI, 2, DRAWN)

    with FaultyServer() as server:
        assert len(asyncio.run(notebook())[0]) == 2


def test_threads_share_what_a_server_may_be_given() -> None:
    def answer(body: Body) -> Body:
        time.sleep(0.06)
        return answer_all(body)

    with FaultyServer(answer=answer) as server:
        sampler = make(server, concurrency=2)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda size: sampler.sample(HI * size, 1, DRAWN), (6, 4, 2)))
    assert [[completion.error for (completion,) in group] for group in found] == [[None] * 6, [None] * 4, [None] * 2]
    assert [len(server.calls), server.most_at_once] == [12, 2]


# Images


def decoded(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize(("name", "kind"), [("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp")])
def test_a_picture_is_sent_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    picture(0).save(tmp_path / name)
    url = data_url(tmp_path, name)
    assert url == f"data:image/{kind};base64,{base64.b64encode((tmp_path / name).read_bytes()).decode()}"


@pytest.mark.parametrize("kind", ["turned", "transparent", "palette", "black and white", "cmyk", "animated", "bmp"])
def test_a_picture_that_a_server_could_see_otherwise_is_encoded_anew(tmp_path: Path, kind: str) -> None:
    image, name, settings = picture(0), "a.png", {}
    if kind == "turned":
        image.getexif()[0x0112] = 6
        name, settings = "a.jpg", {"exif": image.getexif()}
    elif kind == "animated":
        settings = {"save_all": True, "append_images": [picture(1)]}
    elif kind == "bmp":
        name = "a.bmp"
    else:
        mode = {"transparent": "RGBA", "palette": "P", "black and white": "1", "cmyk": "CMYK"}[kind]
        name, image = "a.jpg" if mode == "CMYK" else name, image.convert(mode)
    if kind == "transparent":
        image.putalpha(100)
    image.save(tmp_path / name, **settings)
    sent, expected = decoded(data_url(tmp_path, name)), load_image(tmp_path, name)
    assert [sent.mode, sent.size, sent.tobytes()] == ["RGB", expected.size, expected.tobytes()]


def test_a_picture_too_large_for_a_request_is_sent_as_a_smaller_file_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(0, (200, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(chat_format, "MAX_IMAGE_BYTES", 100_000)
    assert data_url(tmp_path, "a.png").startswith("data:image/jpeg;")
    monkeypatch.setattr(chat_format, "MAX_IMAGE_BYTES", 1000)
    with pytest.raises(InputError, match="image 'a.png' of 200 x 200 pixels takes more than 1,000 bytes.*scale it"):
        data_url(tmp_path, "a.png")


@pytest.mark.parametrize(
    ("name", "message"), [("../a.png", "is outside the image root"), ("none.png", "does not exist"), ("b.png", "dec")]
)
def test_a_picture_that_cannot_be_sent_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=message):
        data_url(tmp_path / "root", name)


def test_pictures_stand_before_the_text_in_their_order(tmp_path: Path) -> None:
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.png")
    with FaultyServer() as server:
        make(server, image_root=tmp_path).sample([Request("Both?", ("1.png", "0.png"))], 1, DRAWN)
    (message,) = server.calls[0]["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": data_url(tmp_path, "1.png")}},
        {"type": "image_url", "image_url": {"url": data_url(tmp_path, "0.png")}},
        {"type": "text", "text": "Both?"},
    ]


# Given beginnings


def continuing(closed: int) -> Callable[[Body], Body]:
    """Answers ` and so on`, and counts words as tokens; a begun message adds `closed` tokens to its own."""

    def answer(body: Body) -> Body:
        words = sum(len(message["content"].split()) for message in body["messages"]) + 9
        tokens = words + (closed if len(body["messages"]) > 1 else 0)
        return {"choices": [choice(" and so on")] * body.get("n", 1), "usage": {"prompt_tokens": tokens}}

    return answer


BEGUN = Request("Why?", (), "It is ")


def test_a_beginning_is_given_to_the_server_as_a_message_to_continue() -> None:
    with FaultyServer(answer=continuing(closed=0)) as server:
        sampler = make(server)
        found = sampler.sample([BEGUN, Request("Who?", (), "图中有")], 2, DRAWN)
        assert len(server.calls) == 4  # two of them to see whether it is continued
        sampler.sample([BEGUN], 1, DRAWN)
    assert texts(found) == [["It is and so on"] * 2, ["图中有 and so on"] * 2]
    body = server.calls[-1]
    assert body["messages"] == [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is"}]
    assert [body["continue_final_message"], body["add_generation_prompt"]] == [True, False]
    assert len(server.calls) == 5


@pytest.mark.parametrize(
    "answer",
    [continuing(closed=5), answer_all, refuses("continue_final_message")],
    ids=["answers anew", "does not say", "refuses"],
)
def test_a_server_that_does_not_continue_a_message_is_found_out(answer: Callable[[Body], object]) -> None:
    with (
        FaultyServer(answer=answer) as server,
        pytest.raises(InputError, match="does not continue a message .*give the model's `tokenizer`, then"),
    ):
        make(server).sample([BEGUN], 1, DRAWN)


def test_a_probe_that_fails_is_repeated() -> None:
    with FaultyServer(drop, drop, answer=continuing(closed=0)) as server:
        ((completion,),) = make(server).sample([BEGUN], 1, DRAWN)
    assert completion.text == "It is and so on"


def test_an_empty_beginning_is_an_ordinary_request() -> None:
    with FaultyServer() as server:
        make(server).sample([Request("Why?", (), "")], 1, DRAWN)
    assert server.calls[0]["messages"] == [{"role": "user", "content": "Why?"}]
    assert "continue_final_message" not in server.calls[0]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte; begins every text with a mark, and so does its chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "{{ bos_token }}user: {{ messages[0].content }}\nassistant: "
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def test_with_a_tokenizer_a_beginning_is_a_part_of_the_prompt(tokenizer_folder: Path) -> None:
    with FaultyServer() as server:
        sampler = make(server, tokenizer=str(tokenizer_folder))
        ((completion,),) = sampler.sample([BEGUN], 1, DRAWN)
        sampler.sample(HI, 1, DRAWN)
    assert server.paths == ["/v1/completions", "/v1/chat/completions"]
    prompt = rendered_prompt(sampler.tokenizer, "Why?") + "It is "
    assert prompt.endswith("user: Why?\nassistant: It is ")
    assert server.calls[0]["prompt"] == prompt
    assert completion.text == f"It is {prompt} {server.calls[0]['seed']} 0"


def test_with_images_a_beginning_is_a_message_even_with_a_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    with (
        FaultyServer(answer=answer_all) as server,
        pytest.raises(InputError, match="leave the images out, then the prompt is rendered here"),
    ):
        make(server, image_root=tmp_path, tokenizer=str(tokenizer_folder)).sample(
            [Request("Why?", ("a.png",), "It is")], 1, DRAWN
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}user: {{ m.content }}{% endfor %}assistant: ",
        "{% for m in messages %}user: {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}assistant: ",
        "{% for m in messages %}user: {{ m.content | trim }}{% endfor %}assistant: ",
    ],
)
def test_a_prompt_is_rendered_by_templates_for_texts_and_for_parts(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert rendered_prompt(tokenizer, "Why? ").replace("? ", "?") == "user: Why?assistant: "


def test_the_mark_at_the_beginning_that_the_server_adds_is_not_sent() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}user: {{ messages[0].content }}"
    tokenizer.bos_token = "<|im_start|>"
    assert rendered_prompt(tokenizer, "Why?") == "<|im_start|>user: Why?"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert rendered_prompt(tokenizer, "Why?") == "user: Why?"


@pytest.mark.parametrize("template", [None, "{{ messages[0].name }}", "{{ raise_exception('only systems') }}"])
def test_a_tokenizer_that_cannot_render_a_question_is_refused(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="cannot render a question: it has no chat template, or one for other"):
        rendered_prompt(tokenizer, "Why?")


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with FaultyServer() as server, pytest.raises(InputError, match="`tokenizer` .*none cannot be loaded"):
        make(server, tokenizer=str(tmp_path / "none"))


def test_tokens_end_where_the_tokenizer_says_and_without_one_where_words_do(tokenizer_folder: Path) -> None:
    with FaultyServer() as server:
        assert make(server, tokenizer=str(tokenizer_folder)).token_ends("two cats") == list(range(1, 9))
        assert make(server).token_ends("two cats.") == word_ends("two cats.") == [3, 8, 9]


# The real thing


@pytest.fixture(scope="module")
def served(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The folder of the task's model, with weights so large that every token counts, and the address of its server."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model = AutoModelForImageTextToText.from_pretrained(task / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(task / "model").save_pretrained(folder)
    port, environment = unused_port(), {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent)}
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *where]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder.parent / "log")
        yield str(folder), f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline, direct = time.monotonic() + 120, urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            direct.open(url, timeout=1)
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text(encoding="utf-8"))


def open_served(served: tuple[str, str], task: Path, **settings: Any) -> ServerSampler:
    model, address = served
    return ServerSampler(model, [address], image_root=task, concurrency=4, timeout=60.0, **settings)


@pytest.fixture(scope="module")
def in_process(served: tuple[str, str], task: Path) -> HFSampler:
    return HFSampler(served[0], image_root=task, device="cpu")


REAL = [
    Request("What is the sum of the digits?", ("images/known-00000.png",)),
    Request("And without a picture?"),
    Request("What do both show?", ("images/known-00001.png", "images/known-00002.png")),
]


def test_a_real_server_sees_text_and_pictures_as_the_model_does_in_process(
    served: tuple[str, str], task: Path, in_process: HFSampler
) -> None:
    expected = in_process.sample(REAL, 1, GREEDY)
    assert open_served(served, task).sample(REAL, 1, GREEDY) == expected
    assert len({text for (text,) in texts(expected)}) == 3


def test_a_real_server_that_has_no_log_probabilities_answers_all_the_same(
    served: tuple[str, str], task: Path, in_process: HFSampler
) -> None:
    asked = replace(GREEDY, top_logprobs=5)
    found = open_served(served, task).sample(REAL, 1, asked)
    assert texts(found) == texts(in_process.sample(REAL, 1, asked))
    assert {completion.first_logps for (completion,) in found} == {None}


def test_a_real_server_samples_although_it_ignores_n_and_knows_no_top_k(
    served: tuple[str, str], task: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = open_served(served, task).sample(REAL, 4, DRAWN)
    assert [len(set(group)) for group in texts(found)] == [4, 4, 4]
    assert {completion.error for group in found for completion in group} == {None}
    nearly_greedy = replace(DRAWN, top_k=1)
    greedy = open_served(served, task).sample(REAL, 1, GREEDY)
    assert open_served(served, task).sample(REAL, 1, nearly_greedy) == greedy
    assert warnings(caplog) == []


@pytest.mark.parametrize("prefix", ["The sum is", "The sum is ", "和是"])
def test_a_real_server_continues_a_beginning_as_the_model_does_in_process(
    served: tuple[str, str], task: Path, in_process: HFSampler, prefix: str
) -> None:
    request = Request("What is the sum?", (), prefix)
    ((completion,),) = open_served(served, task, tokenizer=served[0]).sample([request], 1, GREEDY)
    assert completion == in_process.sample([request], 1, GREEDY)[0][0]
    assert completion.text.startswith(prefix)
    assert len(completion.text) > len(prefix)


def test_a_real_server_without_a_tokenizer_says_what_it_needs(served: tuple[str, str], task: Path) -> None:
    with pytest.raises(InputError, match="give the model's `tokenizer`"):
        open_served(served, task).sample([Request("What is the sum?", (), "It is")], 1, GREEDY)


def test_a_real_server_with_another_model_is_found_out(served: tuple[str, str], task: Path) -> None:
    sampler = ServerSampler("another", [served[1]], image_root=task)
    with pytest.raises(InputError, match="cannot be asked for 'another' .*pinned to"):
        sampler.sample(HI, 1, GREEDY)


def test_questions_become_pairs_through_a_real_server(served: tuple[str, str], task: Path, tmp_path: Path) -> None:
    model, address = served
    shared = {"model": model, "server": [address], "image_root": str(task), "tokenizer": model, "concurrency": 4}
    responses = tmp_path / "responses"
    sampling = {"num_responses": 2, "max_new_tokens": 6, "shard_size": 3}
    run_sample(SampleConfig(questions=str(task / "open.jsonl"), output=str(responses), **sampling, **shared))
    rows = list(read_stage(responses, Response))
    assert [row["id"] for row in rows] == [f"open-{number:05d}" for number in range(4) for _ in range(2)]
    assert {row.get("error") for row in rows} == {None}
    assert {row["sampler"]["model"] for row in rows} == {model}
    whole = [{**row, "response": "The sum of the digits is 7.", "finish_reason": "stop"} for row in rows]
    write_rows(tmp_path / "whole.jsonl", whole)
    own = {"responses": str(tmp_path / "whole.jsonl"), "output": str(tmp_path / "pairs"), "max_new_tokens": 6}
    run_dropout_ntp(DropoutNTPConfig(**own, **shared))
    pairs = list(read_stage(tmp_path / "pairs", Pair))
    kept = pairs[0]["rejected_meta"]["prefix_characters"]
    assert len(pairs) >= 6
    assert 0 < kept < len(whole[0]["response"])
    for pair in pairs:
        assert pair["rejected"][:kept] == pair["chosen"][:kept]
        assert pair["rejected"] != pair["chosen"]


def test_an_evaluation_through_a_real_server_finds_what_one_in_process_does(
    served: tuple[str, str], task: Path, tmp_path: Path
) -> None:
    model, address = served
    shared = {"models": [f"Model={model}"], "questions": str(task / "questions.jsonl"), "image_root": str(task)}
    shared |= {"prompts": ["direct"], "max_new_tokens": 6}
    run_eval(EvalConfig(**shared, server=[address], output=str(tmp_path / "served")))
    run_eval(EvalConfig(**shared, device="cpu", output=str(tmp_path / "here")))
    served_rows, rows = (list(read_stage(tmp_path / name / "answers.jsonl")) for name in ("served", "here"))
    assert [row["response"] for row in served_rows] == [row["response"] for row in rows]
    evaluations = [(tmp_path / name / "evaluation.json").read_text() for name in ("served", "here")]
    assert evaluations[0] == evaluations[1]


def test_a_killed_server_stops_the_verb_and_the_same_command_goes_on(task: Path, tmp_path: Path) -> None:
    server = FaultyServer()
    config = SampleConfig(
        model="tiny",
        server=[server.address],
        questions=str(task / "questions.jsonl"),
        image_root=str(task),
        output=str(tmp_path / "responses"),
        num_responses=2,
        shard_size=5,
        concurrency=2,
    )
    with server:
        config = replace(config, server=[server.address])
        server.faults = [says(answer_all({"messages": [{"role": "user", "content": "?"}], "n": 2}))] * 7
        server.faults.append(lambda _: server.stop())
        with pytest.raises(InputError, match="no server has answered for"):
            run_sample(config)
        first = (tmp_path / "responses" / "00000.jsonl").read_bytes()
        server.start()
        run_sample(config)
    assert (tmp_path / "responses" / "00000.jsonl").read_bytes() == first
    rows = list(read_stage(tmp_path / "responses", Response))
    assert [len(rows), {row["finish_reason"] for row in rows}] == [24, {"stop"}]
