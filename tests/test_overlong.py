"""`max_length` never leaves half a picture or an empty response: an error that says what would do, or dropped."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from tiny_models import FAMILIES, preference_rows
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from data_builders.records import InputError
from mpo.lengths import Lengths, measure_rows, measure_tokenized
from mpo.overlong import check_batch, fit_to_length

TURN = List({"role": Value("string"), "content": Value("string")})
LENGTHS = Lengths(  # rows 1 and 3 have 10 and 12 tokens in front of their responses
    image=np.array([0, 6, 0, 8]),
    prompt=np.array([4, 4, 5, 4]),
    chosen=np.array([3, 2, 9, 5]),
    rejected=np.array([2, 7, 1, 1]),
)
ROWS = Dataset.from_list([{"id": name, "n": 0} for name in ("a", "b", "c", "d")])


def conversations(rows: list[dict[str, Any]]) -> Dataset:
    features = Features(images=List(ImageFeature()), prompt=TURN, chosen=TURN, rejected=TURN)
    return Dataset.from_list(rows, features=features)


def test_an_overlong_row_is_an_error_that_says_what_would_do() -> None:
    message = (
        r"train data: row 1 \(id 'b'\) has 6 image and 4 text tokens in front of its responses, so `max_length=10` "
        r"would cut its pictures or leave nothing of a response; so it is with 2 of 4 rows\. Set `max_length` to at "
        r"least 13; 17 cuts nothing at all\..* fewer tiles.* Or set `overlong: drop`"
    )
    with pytest.raises(InputError, match=message):
        fit_to_length(ROWS, LENGTHS, max_length=10)


def test_the_max_length_that_an_error_names_is_the_smallest_that_will_do() -> None:
    assert fit_to_length(ROWS, LENGTHS, max_length=13)[1].num_cut == 3  # all but row 0
    assert fit_to_length(ROWS, LENGTHS, max_length=17)[1].num_cut == 0
    with pytest.raises(InputError, match="row 3 .* 1 of 4 rows"):
        fit_to_length(ROWS, LENGTHS, max_length=12)


def test_overlong_rows_can_be_dropped_and_each_is_listed_with_its_reason() -> None:
    kept, report = fit_to_length(ROWS, LENGTHS, max_length=10, overlong="drop", name="eval")
    assert kept["id"][:] == ["a", "c"]
    reason = "pictures would be cut or nothing of a response left"
    assert report.dropped == [
        {"row": 1, "id": "b", "image": 6, "prompt": 4, "chosen": 2, "rejected": 7, "reason": reason},
        {"row": 3, "id": "d", "image": 8, "prompt": 4, "chosen": 5, "rejected": 1, "reason": reason},
    ]
    assert json.loads(json.dumps(report.dropped)) == report.dropped
    assert (report.num_rows, report.num_cut) == (4, 1)  # row 2 takes 14 tokens
    assert str(report).startswith("eval data: 2 of 4 rows dropped")
    assert str(report).endswith("1 cut at max_length=10")


def test_a_row_without_id_is_named_by_its_number() -> None:
    rows = ROWS.remove_columns("id")
    with pytest.raises(InputError, match="row 1 has 6 image"):
        fit_to_length(rows, LENGTHS, max_length=10)
    assert "id" not in fit_to_length(rows, LENGTHS, max_length=10, overlong="drop")[1].dropped[0]


def test_a_data_set_of_which_nothing_is_left_is_an_error() -> None:
    with pytest.raises(InputError, match="4 of 4 rows") as caught:
        fit_to_length(ROWS, LENGTHS, max_length=4, overlong="drop")
    assert "overlong" not in str(caught.value)


def test_an_empty_response_is_refused_without_any_limit() -> None:
    empty = LENGTHS._replace(rejected=np.array([2, 7, 0, 1]))
    for max_length in (None, 17):
        with pytest.raises(InputError, match=r"row 2 \(id 'c'\) has an empty response"):
            fit_to_length(ROWS, empty, max_length=max_length)
    kept, report = fit_to_length(ROWS, empty, max_length=None, overlong="drop")
    assert (kept["id"][:], report.dropped[0]["reason"]) == (["a", "b", "d"], "a response is empty")


def test_without_a_limit_or_with_room_for_all_the_data_stays_as_it_is() -> None:
    for max_length in (None, 17):
        kept, report = fit_to_length(ROWS, LENGTHS, max_length=max_length)
        assert kept is ROWS
        assert (report.dropped, report.num_cut) == ([], 0)


def test_keeping_the_end_never_takes_a_whole_response() -> None:
    texts = LENGTHS._replace(image=np.zeros(4, int))
    kept, report = fit_to_length(ROWS, texts, max_length=3, truncation_mode="keep_end")
    assert (kept is ROWS, report.num_cut) == (True, 4)


@pytest.mark.parametrize("max_length", range(1, 9))
def test_rows_are_kept_exactly_where_trls_collator_leaves_something_of_both_responses(max_length: int) -> None:
    rows = [
        {"prompt_ids": [1] * before, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}
        for before, chosen, rejected in ((3, 2, 1), (5, 1, 4), (6, 3, 3), (1, 1, 1))
    ]
    dataset = Dataset.from_list(rows)
    masks = DataCollatorForPreference(0, max_length)(rows)["completion_mask"]
    left = (masks.sum(dim=1) > 0).reshape(2, 4).all(dim=0)
    if not left.any():
        with pytest.raises(InputError):
            fit_to_length(dataset, measure_tokenized(dataset), max_length=max_length, overlong="drop")
        return
    kept, _ = fit_to_length(dataset, measure_tokenized(dataset), max_length=max_length, overlong="drop")
    assert list(kept) == [example for example, stays in zip(rows, left.tolist(), strict=True) if stays]


def test_a_batch_is_refused_where_a_cut_would_leave_no_response() -> None:
    ids = torch.tensor(
        [
            [9, 9, 1, 5, 5, 0],  # pair 0, chosen: two image tokens, a word, two tokens of response
            [9, 9, 9, 1, 5, 0],
            [9, 9, 1, 6, 0, 0],  # pair 0, rejected
            [9, 9, 9, 1, 6, 6],
        ]
    )
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    for enough in (None, 5, 6):
        check_batch(ids, mask, max_length=enough, image_token_id=9)
    message = (
        r"pair 1 of this batch has 3 image and 1 text tokens .*`max_length=4`.* with 1 of 2 pairs\. Set `max_length` "
        r"to at least 5; 6 cuts nothing"
    )
    with pytest.raises(InputError, match=message):
        check_batch(ids, mask, max_length=4, image_token_id=9)
    with pytest.raises(InputError, match=r"pair 0 .* 0 image and 3 text tokens .* 2 of 2 pairs"):
        check_batch(ids, mask, max_length=3, image_token_id=None)
    mask[3] = 0
    with pytest.raises(InputError, match=r"pair 0 .* 2 of 2 pairs\. Set `max_length` to at least 5"):
        check_batch(ids, mask, max_length=3, image_token_id=9)
    with pytest.raises(InputError, match="pair 1 of this batch has an empty response"):
        check_batch(ids, mask, max_length=None, image_token_id=9)


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_a_collated_batch_and_the_counted_rows_ask_for_the_same_max_length(name: str) -> None:
    processor, _ = FAMILIES[name]()
    rows = preference_rows(4)
    found = measure_rows(conversations(rows), processor)
    with pytest.raises(InputError) as counted_rows:
        fit_to_length(conversations(rows), found, max_length=20)
    batch = DataCollatorForVisionPreference(processor)(rows)
    with pytest.raises(InputError) as one_batch:
        check_batch(
            batch["input_ids"], batch["completion_mask"], max_length=20, image_token_id=processor.image_token_id
        )
    limits = [re.findall(r"at least (\d+); (\d+)", str(error.value)) for error in (counted_rows, one_batch)]
    assert limits[0] == limits[1] == [(str(found.before_response.max() + 1), str(found.total.max()))]
