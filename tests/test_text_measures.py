"""How alike texts are and how much they repeat themselves, by hand-counted examples."""

import time

import pytest

from data_builders.text_measures import Profile, repetition, similarity, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["hello", "world"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("x_1 = 3.5%", ["x_1", "3", "5"]),
        ("don't", ["don", "t"]),
        ("图中有3只cat。", ["图", "中", "有", "3", "只", "cat"]),
        ("猫がいる・ネコ", ["猫", "が", "い", "る", "ネ", "コ"]),
        ("고양이 세 마리", ["고양이", "세", "마리"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        ("  ... \n ?!", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_and_single_chinese_or_japanese_characters(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "A, b: c. D!", 1.0),
        ("a b c d", "a b c e", 2 * 1 / 4),  # abc of abc, bcd and abc, bce
        ("a b c d e", "a b c", 2 * 1 / 4),  # abc of abc, bcd, cde and abc
        ("a b c a b c", "a b c", 2 * 1 / 5),  # abc counts once, since the right has it once
        ("a b c a b c", "a b c a b c", 1.0),
        ("a b c", "c b a", 0.0),  # order matters
        ("a b", "a b", 1.0),
        ("a b", "a b c", 2 * 1 / 3),  # ab of ab and ab, bc
        ("a", "a b c", 2 * 1 / 4),  # single words where one is alone
        ("yes", "no", 0.0),
        ("图中有三只猫", "图中有四只猫", 2 * 1 / 8),  # 图中有 of four and four
        ("", "", 1.0),
        ("", "a", 0.0),
        ("...", "...", 1.0),
        ("+", "-", 0.0),
    ],
)
def test_similarity_is_the_share_of_common_trigrams(left: str, right: str, expected: float) -> None:
    assert similarity(left, right) == similarity(right, left) == pytest.approx(expected)


def test_a_profile_gives_what_the_function_gives_and_can_be_used_again() -> None:
    texts = ["a b c d", "a b", "a b c e", "", "d"]
    profiles = {text: Profile(text) for text in texts}
    for left in texts:
        assert [profiles[left].similarity(profiles[other]) for other in texts] == [similarity(left, x) for x in texts]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a a a a", 1, 1.0),
        ("a b c d", 1, 0.0),
        ("a b a c", 1, 2 / 4),
        ("a b a b c", 2, 2 / 4),  # ab ba ab bc: ab twice
        ("A b. a, B c", 2, 2 / 4),
        ("猫猫猫", 1, 1.0),
        ("one two", 3, 0.0),
        ("", 10, 0.0),
    ],
)
def test_every_occurrence_of_an_n_gram_that_comes_back_counts(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == expected


def test_a_sentence_that_loops_scores_one_however_long_and_not_less_with_every_turn() -> None:
    """The released filter counts distinct n-grams: fifty turns score 0.02 there and pass."""
    sentence = "So the answer must be three because there are three cats. "
    assert [repetition(turns * sentence) for turns in (1, 2, 3, 50)] == [0.0, pytest.approx(4 / 13), 1.0, 1.0]
    assert repetition(50 * "图中一共有三只猫所以答案是三。") == 1.0


def test_a_loop_at_the_end_of_a_sound_text_counts_by_its_share() -> None:
    sound = " ".join(f"w{number}" for number in range(100))
    looped = 10 * " and so on and on it goes for ever more"  # 100 words, which come back every 10
    assert repetition(sound + looped) == pytest.approx(91 / 191)


@pytest.mark.parametrize("n", [0, -1])
def test_an_n_gram_of_no_words_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"`n` must be at least 1, got {n}"):
        repetition("a", n)


def test_a_megabyte_takes_a_moment() -> None:
    start = time.process_time()
    for text in (200_000 * "word ", 500_000 * "猫", 1_000_000 * "x", 1_000_000 * "_", 1_000_000 * "."):
        assert similarity(text, text) == 1.0
        repetition(text)
    assert time.process_time() - start < 20
