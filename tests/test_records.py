"""Rows: what each kind must have, what may be added, and what a complaint says."""

from typing import Any

import pytest

from data_builders.records import Conversation, InputError, Pair, Question, Response, Row, Verdict, check_row

QUESTION = {"id": "q-1", "images": ["a.png"], "question": "How many?", "answer": "3", "source": "count"}
RESPONSE = {**QUESTION, "prompt": "How many? Think.", "response": "3", "finish_reason": "stop", "sampler": {"seed": 0}}
VERDICT = {**RESPONSE, "verdict": "correct", "prediction": "3", "rule": "number"}
PAIR = {"id": "q-1#0", "images": [], "prompt": "How many?", "chosen": "3", "rejected": "4", "kind": "correctness"}


@pytest.mark.parametrize(("row", "model"), [(QUESTION, Question), (RESPONSE, Response), (VERDICT, Verdict)])
def test_a_whole_row_comes_back_as_it_is(row: Row, model: type) -> None:
    assert check_row(row, model, "here") == row


def test_a_row_keeps_columns_of_the_users_own_and_is_given_none_that_it_lacks() -> None:
    row = {"id": "q", "question": "Why?", "difficulty": 3, "tags": {"topic": ["cats"]}, "model_config": "mine"}
    assert check_row(row, Question, "here") == row


@pytest.mark.parametrize(
    ("model", "row", "field"),
    [
        (Question, QUESTION, "question"),
        (Question, QUESTION, "id"),
        (Response, RESPONSE, "prompt"),
        (Response, RESPONSE, "sampler"),
        (Verdict, VERDICT, "verdict"),
        (Verdict, VERDICT, "rule"),
        (Pair, PAIR, "chosen"),
        (Pair, PAIR, "kind"),
    ],
)
def test_a_missing_field_is_named_with_its_place(model: type, row: Row, field: str) -> None:
    rest = {name: value for name, value in row.items() if name != field}
    with pytest.raises(InputError, match=rf"^a\.jsonl, line 7: `{field}` is missing\. A {model.__name__.lower()} row"):
        check_row(rest, model, "a.jsonl, line 7")


@pytest.mark.parametrize(
    ("model", "row", "change", "message"),
    [
        (Question, QUESTION, {"id": 5}, "`id` is 5: input should be a valid string"),
        (Question, QUESTION, {"id": ""}, "`id` is '': string should have at least 1 character"),
        (Question, QUESTION, {"question": ""}, "`question` is '': string should have at least 1 character"),
        (Question, QUESTION, {"answer": 3}, "`answer` is 3: input should be a valid string"),
        (Question, QUESTION, {"images": "a.png"}, "`images` is 'a.png': input should be a valid list"),
        (Question, QUESTION, {"images": None}, "`images` is None: input should be a valid list"),
        (Question, QUESTION, {"images": ["a.png", 5]}, "`images.1` is 5: input should be a valid string"),
        (Response, RESPONSE, {"sampler": "greedy"}, "`sampler` is 'greedy': input should be a valid dictionary"),
        (
            Response,
            RESPONSE,
            {"finish_reason": "eos"},
            "`finish_reason` is 'eos': input should be 'stop', 'length' or",
        ),
        (Verdict, VERDICT, {"verdict": "right"}, "`verdict` is 'right': input should be 'correct', 'wrong' or 'no_"),
        (Pair, PAIR, {"chosen": ""}, "`chosen` is '': string should have at least 1 character"),
        (Pair, PAIR, {"kind": "length"}, "`kind` is 'length': input should be 'correctness', 'format' or"),
        (Question, QUESTION, {"question": "\ud800"}, r"`question` is '\\ud800': input should be a valid string"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_value(model: type, row: Row, change: Row, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_row({**row, **change}, model, "a.jsonl, line 7")
    assert str(error.value).startswith(f"a.jsonl, line 7: {message}".replace(r"\\u", r"\u"))


@pytest.mark.parametrize("row", [[1, 2], "text", 5, None, True])
def test_what_is_no_object_is_shown(row: Any) -> None:
    with pytest.raises(InputError) as error:
        check_row(row, Question, "a.jsonl, line 7")
    assert str(error.value) == (f"a.jsonl, line 7: expected a JSON object with the fields of a Question, got {row!r}.")


@pytest.mark.parametrize("row", [{**QUESTION, "images": "x" * 10_000}, ["x" * 10_000]])
def test_a_long_value_is_shown_in_part(row: Any) -> None:
    with pytest.raises(InputError) as error:
        check_row(row, Question, "here")
    assert len(str(error.value)) < 400


def test_a_conversation_needs_one_of_its_two_shapes() -> None:
    asked, answered = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    for shape in ({"prompt": [asked], "completion": [answered]}, {"messages": [asked, answered]}):
        row = {"id": "a", "kept": 1, **shape}
        assert check_row(row, Conversation, "line 1") == row
    with pytest.raises(InputError, match=r"line 1: a conversation has `prompt` and `completion`, or `messages`"):
        check_row({"id": "a", "prompt": [asked]}, Conversation, "line 1")
    with pytest.raises(InputError, match=r"`messages.0.role` is 'bot'"):
        check_row({"id": "a", "messages": [{"role": "bot", "content": "x"}]}, Conversation, "line 1")
