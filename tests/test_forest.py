"""The forest against a written-out example, an independent trie, and separate forwards.

First the layout alone, with a small attention model; then real models: nine families, backends, windows, several trees
to a row.
"""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_models import FAMILIES, picture, preference_rows
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference
from trl.trainer.utils import add_fused_lm_head

from mpo import forest_attention
from mpo.forest import Forest, Sequence, build_forest, sequences_of, visible
from mpo.forest_attention import use_forest_attention
from mpo.forest_collators import ForestCollator, TextForestCollator
from mpo.forest_inputs import FLEX_BLOCK, why_not
from mpo.scores import score_tokens

PAD = 99
SEEDS = range(32)
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROWS = [
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [5, 6, 10]},
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [11, 12, 13, 14, 15, 16]},
    {"prompt_ids": [1, 2, 30], "chosen_ids": [31], "rejected_ids": [5, 6, 7]},
    {"prompt_ids": [40, 41], "chosen_ids": [42, 43], "rejected_ids": [42, 44]},
]


class Picture(NamedTuple):
    """Equal by name, with a hash of our choice: what another PYTHONHASHSEED does to a file name."""

    name: str
    seed: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.name, self.seed))


def random_sequences(seed: int) -> list[Sequence]:
    """Few tokens, so that much is shared: nested branches, duplicates, prefixes, prompts and pictures that differ."""
    rng = random.Random(seed)
    alphabet = rng.choice([1, 2, 3])
    num_fixed = rng.choice([0, 0, 2, 3])

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(alphabet) for _ in range(rng.randint(low, high))]

    sequences: list[Sequence] = []
    for _ in range(rng.randint(1, 16)):
        images = rng.choice([(), ("a.png",), ("b.png",)]) if num_fixed else ()
        prompt = [7] * num_fixed + tokens(0 if num_fixed else 1, 4)
        sequences.append(Sequence(images, prompt, tokens(1, 6), num_fixed))
        if rng.random() < 0.3:  # the same tokens, with the border between prompt and response elsewhere
            known = rng.choice(sequences)
            both = known.prompt + known.response
            border = rng.randint(max(1, known.num_fixed), len(both) - 1)
            sequences.append(known._replace(prompt=both[:border], response=both[border:]))
    return sequences


def budget(seed: int) -> int | None:
    return [None, 1, 5, 8, 12, 20, 40, 1000][seed % 8]


def test_a_small_forest_written_out() -> None:
    prompt = [10, 11]
    sequences = [
        Sequence((), prompt, [20, 21, 22]),
        Sequence((), prompt, [20, 31]),
        Sequence((), prompt, [40]),
        Sequence((), [12], [50]),
        Sequence((), prompt, [20, 31]),
    ]
    forest = build_forest(sequences, pad_id=PAD)
    x = -100
    # row 0: the prompt; the first response; 20 again, for 31; 11 again, for 40. Row 1: the other prompt, and padding
    assert forest.input_ids.tolist() == [
        [10, 11, 20, 21, 22, 20, 31, 11, 40],
        [12, 50, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    # a copy stands where its original does
    assert forest.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 1, 2], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    # 10 is seen by all; 11 by all but its copy and what follows that; 20 by 21 and 22 only; padding by itself
    assert forest.last.tolist() == [[8, 6, 4, 4, 4, 6, 6, 8, 8], [1, 1, 2, 3, 4, 5, 6, 7, 8]]
    # nothing scores a prompt, or follows the end of a response
    assert forest.shift_labels.tolist() == [[x, 20, 21, 22, x, 31, x, 40, x], [50, x, x, x, x, x, x, x, x]]
    # 20 is scored once, at the slot of 11, for three sequences; row 1 starts at 9
    assert forest.places.tolist() == [[1, 2, 3], [1, 5, 0], [7, 0, 0], [9, 0, 0], [1, 5, 0]]
    assert forest.mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert forest.source.tolist() == [
        [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [2, 1], [2, 2]],
        [[3, 0], [3, 1], *[[0, 0]] * 7],
    ]
    assert forest.is_token.int().tolist() == [[1] * 9, [1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert forest.roots == [0, 3]
    assert sequences_of(forest) == [sequence.prompt + sequence.response for sequence in sequences]


def test_the_mask_of_one_branch_written_out() -> None:
    forest = build_forest([Sequence((), [1, 2], [3]), Sequence((), [1, 2], [4])], pad_id=PAD)
    assert forest.input_ids.tolist() == [[1, 2, 3, 2, 4]]
    assert visible(forest.last).int().tolist() == [
        [
            [1, 0, 0, 0, 0],  # 1 sees itself
            [1, 1, 0, 0, 0],  # 2 sees 1
            [1, 1, 1, 0, 0],  # 3 sees 1 2
            [1, 0, 0, 1, 0],  # the copy of 2 sees 1, and not the original
            [1, 0, 0, 1, 1],  # 4 sees 1 and the copy
        ]
    ]


def test_prompts_that_differ_branch_without_a_copy() -> None:
    forest = build_forest(
        [Sequence((), [1, 2], [3]), Sequence((), [1, 4], [3]), Sequence((), [1, 5], [6])], pad_id=PAD
    )
    assert forest.input_ids.tolist() == [[1, 2, 3, 4, 3, 5, 6]]
    assert forest.last.tolist() == [[6, 2, 2, 4, 4, 6, 6]]
    assert forest.shift_labels.tolist() == [[-100, 3, -100, 3, -100, 6, -100]]


def test_a_prompt_beside_responses_comes_before_their_copies() -> None:
    longer_prompt = Sequence((), [1, 9], [2])
    forest = build_forest([Sequence((), [1], [2]), Sequence((), [1], [3]), longer_prompt], pad_id=PAD)
    assert forest.input_ids.tolist() == [[1, 9, 2, 2, 1, 3]]
    assert forest.last.tolist() == [[3, 2, 2, 3, 5, 5]]  # the original of 1 is seen by 9 2 and by the first response
    assert forest.shift_labels.tolist() == [[2, 2, -100, -100, 3, -100]]


def test_a_token_that_is_prompt_here_and_response_there_is_shared() -> None:
    forest = build_forest([Sequence((), [1, 2], [3]), Sequence((), [1], [2, 3])], pad_id=PAD)
    assert forest.input_ids.tolist() == [[1, 2, 3]]
    assert forest.shift_labels.tolist() == [[2, 3, -100]]
    assert forest.places.tolist() == [[1, 0], [0, 1]]


def test_a_response_that_another_one_continues_takes_no_slot() -> None:
    forest = build_forest(
        [Sequence((), [1], [2, 3, 4]), Sequence((), [1], [2]), Sequence((), [1], [2, 3])], pad_id=PAD
    )
    assert forest.input_ids.tolist() == [[1, 2, 3, 4]]
    assert forest.mask.sum(dim=1).tolist() == [3, 1, 2]


def test_pictures_part_equal_tokens() -> None:
    sequences = [Sequence(images, [7, 7, 1], [2], 2) for images in ("cat", "dog", "cat", "bird")]
    forest = build_forest(sequences, pad_id=PAD, max_tokens=8)
    assert forest.input_ids.tolist() == [[7, 7, 1, 2, 7, 7, 1, 2], [7, 7, 1, 2, PAD, PAD, PAD, PAD]]
    assert forest.roots == [0, 1, 3]
    assert forest.last.tolist() == [[3, 3, 3, 3, 7, 7, 7, 7], [3, 3, 3, 3, 4, 5, 6, 7]]


def test_no_image_token_is_a_branching_token() -> None:
    """The first token after the pictures differs: a branch there would copy an image token, so these are two trees."""
    forest = build_forest([Sequence("cat", [7, 7], [1], 2), Sequence("cat", [7, 7], [2], 2)], pad_id=PAD)
    assert forest.input_ids.tolist() == [[7, 7, 1], [7, 7, 2]]
    assert forest.roots == [0, 1]


def test_a_tree_above_max_tokens_is_split_with_its_pictures_again() -> None:
    sequences = [Sequence("cat", [7, 1], [token], 1) for token in (2, 3, 4, 2)]
    whole = build_forest(sequences, pad_id=PAD, max_tokens=7)
    assert whole.input_ids.tolist() == [[7, 1, 2, 1, 3, 1, 4]]
    parts = build_forest(sequences, pad_id=PAD, max_tokens=6)
    assert parts.input_ids.tolist() == [[7, 1, 2, 1, 3], [7, 1, 4, PAD, PAD]]
    assert parts.roots == [0, 2]
    assert sequences_of(parts) == [[7, 1, 2], [7, 1, 3], [7, 1, 4], [7, 1, 2]]


def test_a_sequence_above_max_tokens_makes_the_rows_as_long_as_itself() -> None:
    sequences = [Sequence((), [1], [2, 3, 4, 5]), Sequence((), [6], [7]), Sequence((), [1], [2, 3, 4, 5])]
    forest = build_forest(sequences, pad_id=PAD, max_tokens=3)
    assert forest.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, PAD, PAD, PAD]]


def test_small_trees_fill_the_rows_that_large_ones_leave() -> None:
    sequences = [Sequence((), [first] * length, [0]) for first, length in ((1, 1), (2, 4), (3, 2), (4, 3))]
    forest = build_forest(sequences, pad_id=PAD, max_tokens=7)
    assert forest.input_ids.tolist() == [[2, 2, 2, 2, 0, 1, 0], [4, 4, 4, 0, 3, 3, 0]]
    assert forest.roots == [1, 0, 3, 2]


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt of sequence 1 has no token.*start it with one \(BOS\)"):
        build_forest([Sequence((), [1], [2]), Sequence((), [], [2])], pad_id=PAD)


def test_a_response_without_a_token_has_no_places() -> None:
    forest = build_forest([Sequence((), [1, 2], []), Sequence((), [1], [3])], pad_id=PAD)
    assert forest.mask.tolist() == [[False], [True]]
    assert sequences_of(forest) == [[], [1, 3]]


def test_no_sequences_make_an_empty_forest() -> None:
    forest = build_forest([], pad_id=PAD)
    assert (forest.input_ids.shape, forest.places.shape, forest.roots) == ((0, 0), (0, 0), [])


def test_the_layout_does_not_depend_on_hash_seeds() -> None:
    def layout(seed: int) -> list:
        pictures = [Picture(name, seed) for name in "abcdefg"]
        sequences = [Sequence(pictures[i % 7], [9, i % 3], [i % 5, i % 2], 1) for i in range(30)]
        forest = build_forest(sequences, pad_id=PAD, max_tokens=12)
        return [value.tolist() if isinstance(value, Tensor) else value for value in forest]

    assert layout(seed=1) == layout(seed=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sequence_comes_back(seed: int) -> None:
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=PAD, max_tokens=budget(seed))
    assert sequences_of(forest) == [sequence.prompt + sequence.response for sequence in sequences]
    assert forest.mask.sum(dim=1).tolist() == [len(sequence.response) for sequence in sequences]


@pytest.mark.parametrize("seed", SEEDS)
def test_each_slot_sees_its_own_path_once(seed: int) -> None:
    """The path is known from `source`: the tokens of that sequence to that index, each depth once."""
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=PAD, max_tokens=budget(seed))
    mask = visible(forest.last)
    for row, slot in (~forest.is_token).nonzero().tolist():
        assert mask[row, slot].nonzero().flatten().tolist() == [slot]
        assert forest.input_ids[row, slot] == PAD
    for row, slot in forest.is_token.nonzero().tolist():
        index, depth = forest.source[row, slot].tolist()
        sequence = sequences[index]
        seen = mask[row, slot].nonzero().flatten()
        assert forest.input_ids[row, seen].tolist() == (sequence.prompt + sequence.response)[: depth + 1]
        assert forest.positions[row, seen].tolist() == list(range(depth + 1))
        assert {sequences[other].images for other in forest.source[row, seen, 0].tolist()} == {sequence.images}


@pytest.mark.parametrize("seed", SEEDS)
def test_each_response_token_is_scored_where_its_prefix_is_seen(seed: int) -> None:
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=PAD, max_tokens=budget(seed))
    labels, used = forest.shift_labels.flatten(), set()
    seen, num_slots = visible(forest.last), forest.last.shape[1]
    for n, (_, prompt, response, _) in enumerate(sequences):
        places = forest.places[n, forest.mask[n]].tolist()
        assert labels[places].tolist() == response
        used.update(places)
        for i, place in enumerate(places):
            row, slot = divmod(place, num_slots)
            assert forest.input_ids[row, seen[row, slot]].tolist() == prompt + response[:i]
    assert used == set((labels != -100).nonzero().flatten().tolist())
    assert forest.places[~forest.mask].sum() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_of_a_trie_stands_there_once_beside_its_copies(seed: int) -> None:
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=PAD)
    nodes, to_score = set(), {}
    for images, prompt, response, num_fixed in sequences:
        tokens = tuple(prompt + response)
        tree = (images, tokens[: num_fixed + 1])
        for i in range(len(tokens)):
            nodes.add((tree, tokens[: i + 1]))
            if i >= len(prompt):
                to_score.setdefault((tree, tokens[:i]), set()).add(tokens[i])
    num_copies = sum(len(labels) - 1 for labels in to_score.values())
    assert forest.is_token.sum() == len(nodes) + num_copies
    trees = {tree for tree, _ in nodes}
    assert len(forest.roots) == len(trees)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_hold_max_tokens_or_one_sequence(seed: int) -> None:
    sequences, max_tokens = random_sequences(seed), budget(seed)
    forest = build_forest(sequences, pad_id=PAD, max_tokens=max_tokens)
    if max_tokens is not None:
        longest = max(len(sequence.prompt + sequence.response) for sequence in sequences)
        assert forest.input_ids.shape[1] <= max(max_tokens, longest)
    assert forest.is_token.any(dim=0).all(), "no column is padding only"


@pytest.mark.parametrize("seed", SEEDS)
def test_each_slot_knows_its_tree(seed: int) -> None:
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=0, max_tokens=budget(seed))
    for index, sequence in enumerate(sequences):
        trees = forest.tree[(forest.source[..., 0] == index) & forest.is_token]
        assert all(sequences[forest.roots[tree]].images == sequence.images for tree in trees.tolist())
    order = forest.tree[forest.is_token].tolist()
    assert order == sorted(order)
    assert set(order) == set(range(len(forest.roots)))


@pytest.mark.parametrize("seed", SEEDS)
def test_roots_follow_the_layout(seed: int) -> None:
    """Pictures are given in the order of `roots`, and the model puts them where it meets their tokens, row by row."""
    sequences = [sequence for sequence in random_sequences(seed) if sequence.num_fixed]
    forest = build_forest(sequences, pad_id=PAD, max_tokens=budget(seed))
    is_first_image_token = forest.is_token & (forest.positions == 0)
    owners = forest.source[is_first_image_token][:, 0].tolist()
    assert [sequences[i].images for i in owners] == [sequences[i].images for i in forest.roots]


class Attention(torch.nn.Module):
    """Two layers of causal attention over tokens, positions and pictures, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.nn.Embedding(PAD + 1, 8)
        self.positions = torch.nn.Embedding(32, 8)
        self.pictures = torch.nn.Embedding(3, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 24) for _ in range(2))
        self.double()

    def forward(self, input_ids: Tensor, positions: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
        """(R, L) three times and (R, L, L) -> log-probabilities, (R, L, vocabulary)."""
        hidden = self.tokens(input_ids) + self.positions(positions) + self.pictures(pictures)
        for layer in self.layers:
            queries, keys, values = layer(hidden).chunk(3, dim=-1)
            hidden = hidden + F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).tanh()
        return (hidden @ self.tokens.weight.T).log_softmax(dim=-1)


def picture_ids(sequences: list[Sequence]) -> list[list[int]]:
    """For each token of each sequence, which picture it shows; 0 for text."""
    names = {(): 0, ("a.png",): 1, ("b.png",): 2}
    return [[names[s.images]] * s.num_fixed + [0] * (len(s.prompt + s.response) - s.num_fixed) for s in sequences]


def forest_logps(model: Attention, sequences: list[Sequence], forest: Forest) -> Tensor:
    """(N, T), 0 where there is no token."""
    pictures = picture_ids(sequences)
    shown = torch.tensor([[pictures[n][i] for n, i in row] for row in forest.source.tolist()])
    logps = model(forest.input_ids, forest.positions, shown, visible(forest.last))
    scored = logps.gather(2, forest.shift_labels.clamp(min=0)[..., None]).flatten()
    return scored[forest.places].masked_fill(~forest.mask, 0.0)


def separate_logps(model: Attention, sequences: list[Sequence], num_labels: int) -> Tensor:
    """The same, one forward for each sequence."""
    rows = []
    for sequence, pictures in zip(sequences, picture_ids(sequences), strict=True):
        ids = torch.tensor([sequence.prompt + sequence.response])
        causal = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        logps = model(ids, torch.arange(ids.shape[1])[None], torch.tensor([pictures]), causal)[0, :-1]
        scored = logps.gather(1, ids[0, 1:, None]).flatten()[len(sequence.prompt) - 1 :]
        rows.append(F.pad(scored, (0, num_labels - len(scored))))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(8))
def test_a_model_gives_the_forest_the_log_probs_and_gradients_of_separate_forwards(seed: int) -> None:
    sequences = random_sequences(seed)
    forest = build_forest(sequences, pad_id=PAD, max_tokens=budget(seed))
    model = Attention()
    shared = forest_logps(model, sequences, forest)
    separate = separate_logps(model, sequences, forest.mask.shape[1])
    torch.testing.assert_close(shared, separate, rtol=0, atol=1e-10)
    weights = torch.rand(shared.shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((weights * shared).sum(), parameters)
    expected = torch.autograd.grad((weights * separate).sum(), parameters)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-9)


def row(question: str, chosen: str, rejected: str, *pictures: Any) -> dict[str, Any]:
    texts = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return {"images": list(pictures), "prompt": [{"role": "user", "content": question}], **turns}


def rows() -> list[dict[str, Any]]:
    """Every case: one, several and no pictures, a shared picture, shared halves, responses that are there twice."""
    one, other = picture(5), picture(6, (60, 44))
    return [
        *preference_rows(4),
        row("What is it?", "It is a red square.", "It is a circle.", one),  # half of it shared, as in DropoutNTP
        row("What is it?", "It is a red square.", "Nothing.", one),  # the chosen one again
        row("Which colour?", "Red.", "Blue.", one),
        row("What is it?", "It is a red square.", "Nothing.", other),  # the same tokens, another picture
        row("Compare.", "The first is larger.", "The first one.", one, other),
    ]


def scored(model: Any, batch: dict[str, Tensor], width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the responses' tokens, (2B, width), and gradients of a weighted sum of them."""
    model.zero_grad()
    logps = score_tokens(model, model, batch).logps
    kept = batch["completion_mask"][:, 1:].bool()
    found = torch.zeros(len(kept), width)
    for index, (values, mask) in enumerate(zip(logps, kept, strict=True)):
        found[index, : mask.sum()] = values[mask]
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model: Any, plain: Any, forest: Any, ready: Callable[[Any], None] = lambda model: None) -> None:
    width = forest["completion_mask"].size(1) - 1
    expected, expected_gradients = scored(model, plain, width)
    ready(model)
    found, gradients = scored(model, forest, width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * max(1.0, scale), rtol=0, msg=name)


def prepared(model: Any, attention: str) -> Any:
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are so small that nothing would show
            parameter.add_(0.05 * torch.randn_like(parameter))
    add_fused_lm_head(model)
    return model.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_gives_a_forest_what_it_gives_separate_rows(name: str, attention: str) -> None:
    processor, model = FAMILIES[name]()
    model = prepared(model, attention)
    collate = ForestCollator(processor, image_token_id=model.config.image_token_id)
    plain = DataCollatorForVisionPreference(processor)(rows())
    for max_tokens in (None, 4096):  # some trees to a row, and all of them in one
        collate.max_forest_tokens = max_tokens
        forest = collate(rows())
        assert forest["input_ids"].numel() < 0.8 * plain["input_ids"].numel()
        check_equal(model, plain, forest)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gemma3"}))
def test_queries_in_blocks_give_a_forest_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest_attention, "_BLOCK", 16)
    processor, model = FAMILIES[name]()
    model = prepared(model, "sdpa")
    collate = ForestCollator(processor, image_token_id=model.config.image_token_id)
    check_equal(model, DataCollatorForVisionPreference(processor)(rows()), collate(rows()), use_forest_attention)
    assert model.config.get_text_config()._attn_implementation == forest_attention.NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert forest_attention.NAME not in model.config.to_json_string(use_diff=False)


def test_queries_in_blocks_look_ahead_nowhere_so_gemma_keeps_its_attention() -> None:
    _, model = FAMILIES["gemma3"]()
    model.set_attn_implementation("sdpa")
    use_forest_attention(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}))
@torch.no_grad()
def test_flex_attention_gives_a_forest_the_same_where_a_family_has_it(name: str) -> None:
    """Forward only: on a CPU it has no gradients."""
    processor, model = FAMILIES[name]()
    model = prepared(model, "sdpa")
    collate = ForestCollator(processor, image_token_id=model.config.image_token_id, multiple_of=FLEX_BLOCK)
    forest = collate(rows())
    assert forest["input_ids"].size(1) % FLEX_BLOCK == 0
    expected = score_tokens(model, model, forest).logps
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # torch 2.13 compiles wrong C++ of masks that read tensors
        found = score_tokens(model, model, forest).logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        hf.LlamaConfig(**TEXT),
        hf.Qwen3Config(**TEXT, head_dim=8),
        hf.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        hf.MistralConfig(**TEXT, sliding_window=3),
        hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=3),
    ],
    ids=lambda config: config.model_type,
)
def test_texts_and_windows_shorter_than_the_row(config: Any, attention: str) -> None:
    torch.manual_seed(0)
    model = prepared(hf.AutoModelForCausalLM.from_config(config), attention)
    assert why_not(model) is None
    plain = DataCollatorForPreference(0)([dict(row) for row in ROWS])
    for max_tokens in (None, 64):
        check_equal(model, plain, TextForestCollator(0, max_forest_tokens=max_tokens)(ROWS))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4), "carry a state"),
        (
            hf.Qwen3NextConfig(**{**TEXT, "num_hidden_layers": 2}, head_dim=8, num_experts=2, num_experts_per_tok=1),
            "linear_attention|carry a state",
        ),
        (hf.Gemma3TextConfig(**TEXT, head_dim=8, use_bidirectional_attention=True), "see later ones"),
        (hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), "takes no positions"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_that_takes_no_tree_is_told_from_the_model(config: Any, reason: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    assert re.search(reason, why_not(model))


def test_a_family_that_was_not_shown_to_be_exact_is_not_trusted() -> None:
    config = hf.PaliGemmaConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        projection_dim=16,
    )
    with torch.device("meta"):
        model = hf.PaliGemmaForConditionalGeneration(config)
    assert "not among the families" in why_not(model)


def test_an_attention_backend_without_masks_is_not_used() -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**TEXT))
    model.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2' takes no mask for trees" in why_not(model)
