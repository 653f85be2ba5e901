"""Pairs of one question fall into one micro-batch, in an order that depends on seed and epoch alone."""

from datasets import Dataset

from mpo.groups import GroupedSampler, pack_groups, question_keys


def num_split(keys: str, rows: list[int], size: int) -> int:
    """How many groups stand in more than one batch."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return sum(sum(key in {keys[row] for row in batch} for batch in batches) > 1 for key in set(keys))


def test_groups_stay_whole_where_they_fit() -> None:
    keys = "aaabbbbcdddddeef"
    rows = pack_groups(keys, range(len(keys)), 8)
    assert sorted(rows) == list(range(16))
    assert num_split(keys, rows, 8) == 0


def test_a_group_larger_than_a_batch_is_cut_and_nothing_is_lost() -> None:
    keys = "a" * 11 + "b" * 3
    rows = pack_groups(keys, range(14), 4)
    assert sorted(rows) == list(range(14))
    assert num_split(keys, rows, 4) <= 2


def test_groups_that_cannot_fill_a_batch_are_cut_at_the_end_only() -> None:
    keys = "aaabbbccc"
    rows = pack_groups(keys, range(9), 4)
    assert sorted(rows) == list(range(9))
    assert num_split(keys, rows, 4) <= 2


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    keys = list("abcdefgh" * 4)
    epoch = [0]
    sampler = GroupedSampler(keys, 4, seed=7, epoch=lambda: epoch[0])
    first, again = list(sampler), list(GroupedSampler(keys, 4, seed=7, epoch=lambda: 0))
    assert first == again
    assert sorted(first) == list(range(32))
    assert len(sampler) == 32
    epoch[0] = 1
    assert list(sampler) != first
    assert list(GroupedSampler(keys, 4, seed=8, epoch=lambda: 0)) != first
    for rows in (first, list(sampler)):
        assert num_split("".join(keys), rows, 4) == 0


def test_a_question_is_its_prompt_and_its_pictures() -> None:
    rows = [
        {"images": ["a.png"], "prompt": "What?", "chosen": "1"},
        {"images": ["a.png"], "prompt": "What?", "chosen": "2"},
        {"images": ["b.png"], "prompt": "What?", "chosen": "1"},
        {"images": ["a.png"], "prompt": "Why?", "chosen": "1"},
    ]
    one, two, three, four = question_keys(Dataset.from_list(rows))
    assert one == two
    assert len({one, three, four}) == 3
    tokenized = [{"prompt": "x", "prompt_ids": [1, n]} for n in (2, 2, 3)]
    first, second, third = question_keys(Dataset.from_list(tokenized))
    assert first == second != third
