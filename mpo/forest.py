"""Sequences that share prefixes, laid out so that a model computes every shared token once.

The sequences of a micro-batch form tries, one for each question with its pictures: the prompt first, then the
responses as branches. Each trie is laid out depth first, and one integer per token says what may see it: `last`, the
index of the last token below it. Token q may see token k iff k <= q <= last[k]. That one rule is the causal mask, the
sharing and the packing of several tries into one row.

A token where a trie branches would have to predict several next tokens. The first branch follows in place; each other
one starts with a copy of that token, at the same position and blind to the original. So each slot has one label, and
any model or kernel that scores one label per slot scores the forest. A branch that starts inside a prompt has nothing
to score there and needs no copy.

Nothing here knows models: the mask is built from `last` where the model is, and what else goes with a token (its type,
its M-RoPE position) is gathered through `source`.

Shapes: N sequences, T tokens in the longest response, R rows, L tokens in the longest row.
"""

from array import array
from bisect import bisect_right
from collections.abc import Hashable, Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100  # what torch's cross entropy ignores


class Sequence(NamedTuple):
    """One prompt with one response to it.

    `images` is the identity of its pictures: image tokens are shared only where it is equal. `num_fixed` counts the
    tokens at the start, through the last image token, that no branch may repeat.
    """

    images: Hashable
    prompt: list[int]
    response: list[int]
    num_fixed: int = 0


class Forest(NamedTuple):
    """The layout that `build_forest` makes; see there for an example."""

    input_ids: Tensor  # (R, L)
    positions: Tensor  # (R, L), how many tokens stand before this one in its sequences; 0 for padding
    last: Tensor  # (R, L), index in the row of the last token below this one; of padding, its own
    shift_labels: Tensor  # (R, L), the next token, which this slot has to score; -100 where there is none
    places: Tensor  # (N, T), the slot of the flattened (R * L) that scores this token of a response; 0 where not mask
    mask: Tensor  # (N, T) bool, which of the places are real
    source: Tensor  # (R, L, 2), the sequence, and the index in its prompt + response, that a token was taken from
    is_token: Tensor  # (R, L) bool, False for padding
    tree: Tensor  # (R, L), which of the roots a slot belongs to; 0 for padding
    roots: list[int]  # one sequence of each trie, row by row: the order in which the model takes the pictures


class _Trie(NamedTuple):
    """Sequences sorted by their tokens, so that those with a common prefix are neighbours."""

    members: list[int]  # which sequences these are
    tokens: list[np.ndarray]  # their prompt + response
    starts: list[int]  # where their responses start
    shared: list[int]  # how many tokens each has in common with the one before it; of the first, any number


class _Segment(NamedTuple):
    """Tokens without a branch between them: `first` to `stop` of a sequence. Sequences are indices in a `_Trie`."""

    sequence: int
    first: int
    stop: int
    parent: int  # index of the segment above; -1 at the root
    is_copy: bool  # the first token repeats the last one of the parent
    complete: range  # the sequences that end here


def build_forest(
    sequences: Iterable[Sequence], *, pad_id: int, max_tokens: int | None = None, multiple_of: int = 1
) -> Forest:
    """Lay sequences out so that every prefix that several of them share stands there once.

    Two sequences are of one trie if they have the same pictures and the same first `num_fixed + 1` tokens. So no image
    token is ever copied, and the pictures of a trie are given to the model once.

    Args:
        sequences: In the order that `places` keeps. One whose response has no token has no places.
        pad_id: Fills the ends of the shorter rows.
        max_tokens: Tokens in a row, at most. Tries of more tokens are split, each part with the pictures again; a
            single sequence of more tokens makes all rows that long. None: as many as the largest trie has.
        multiple_of: Rows are filled up to a multiple of it, for kernels that are compiled for each length.

    Returns:
        The layout, the same for the same sequences whatever the process.

    Raises:
        ValueError: A prompt has no token.

    Three responses to the prompt 1 2. After 2 comes 3 or 6, after 3 comes 4 or 5, so 3 and 2 each have one copy:

    >>> forest = build_forest([Sequence((), [1, 2], r) for r in ([3, 4], [3, 5], [6])], pad_id=0)
    >>> forest.input_ids.tolist()
    [[1, 2, 3, 4, 3, 5, 2, 6]]
    >>> forest.positions.tolist()
    [[0, 1, 2, 3, 2, 3, 1, 2]]
    >>> forest.last.tolist()
    [[7, 5, 3, 3, 5, 5, 7, 7]]
    >>> forest.shift_labels.tolist()
    [[-100, 3, 4, -100, 5, -100, 6, -100]]
    >>> forest.places.tolist()
    [[1, 2], [1, 4], [6, 0]]
    """
    sequences = list(sequences)
    tries = [part for trie in _plant(sequences) for part in _split(trie, max_tokens)]
    layouts = [_grow(trie) for trie in tries]
    rows = _pack([_size(layout) for layout in layouts], max_tokens or 0)
    num_slots = max((sum(_size(layouts[i]) for i in row) for row in rows), default=0)
    num_slots = -(-num_slots // multiple_of) * multiple_of
    num_labels = max((len(sequence.response) for sequence in sequences), default=0)
    forest = _bare(len(rows), num_slots, len(sequences), num_labels, pad_id)
    for index, row in enumerate(rows):
        offset = index * num_slots
        for i in row:
            forest.roots.append(min(tries[i].members))
            _write(forest, tries[i], layouts[i], offset, index * num_slots)
            offset += _size(layouts[i])
    return forest


def visible(last: Tensor) -> Tensor:
    """Which tokens each token may see: the attention mask.

    Args:
        last: Of a `Forest`, (R, L).

    Returns:
        (R, L, L), True at [row, q, k] where token q may see token k.

    >>> visible(torch.tensor([[2, 1, 2]])).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    """
    index = torch.arange(last.shape[-1], device=last.device)
    q, k = index[:, None], index[None, :]
    return (k <= q) & (q <= last[:, None, :])


def sequences_of(forest: Forest) -> list[list[int]]:
    """Read the sequences back from the layout: what the slots see and what they are to score.

    Args:
        forest: What `build_forest` returned.

    Returns:
        Prompt + response of each sequence; nothing for one without a response, which no slot scores.
    """
    num_slots = forest.last.shape[-1]
    index = torch.arange(num_slots)
    found = []
    for places, mask in zip(forest.places, forest.mask, strict=True):
        tokens: list[int] = []
        for place in places[mask][-1:].tolist():
            row, slot = divmod(place, num_slots)
            path = (index <= slot) & (slot <= forest.last[row])
            tokens = [*forest.input_ids[row, path].tolist(), int(forest.shift_labels[row, slot])]
        found.append(tokens)
    return found


def _plant(sequences: list[Sequence]) -> list[_Trie]:
    """Group the sequences into tries, in the order in which the first of each was given."""
    tokens, groups = [], {}
    for index, sequence in enumerate(sequences):
        if not sequence.prompt:
            raise ValueError(
                f"the prompt of sequence {index} has no token, so that nothing can score the first token of its "
                "response. Most likely it was cut off; keep a token of it, or start it with one (BOS)."
            )
        tokens.append(np.frombuffer(array("q", sequence.prompt + sequence.response), dtype=np.int64))
        key = (sequence.images, tokens[-1][: sequence.num_fixed + 1].tobytes())
        groups.setdefault(key, []).append(index)
    tries = []
    for group in groups.values():
        members = sorted(group, key=lambda index: tokens[index].tobytes())  # any order that joins prefixes will do
        paths = [tokens[index] for index in members]
        starts = [len(sequences[index].prompt) for index in members]
        tries.append(_Trie(members, paths, starts, [0, *(_num_shared(a, b) for a, b in pairwise(paths))]))
    return tries


def _num_shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    differences = np.flatnonzero(a[:length] != b[:length])
    return int(differences[0]) if len(differences) else length


def _split(trie: _Trie, max_tokens: int | None) -> list[_Trie]:
    """Cut a trie into parts of at most `max_tokens`, each with as many neighbours as fit."""
    if max_tokens is None or _size(_grow(trie)) <= max_tokens:
        return [trie]
    parts, first = [], 0
    while first < len(trie.members):
        limit = max(max_tokens, len(trie.tokens[first]))  # one that is too long, and its equals, stay together
        stops = range(first + 1, len(trie.members) + 1)
        stop = first + bisect_right(stops, limit, key=lambda stop, first=first: _size(_grow(_part(trie, first, stop))))
        parts.append(_part(trie, first, stop))
        first = stop
    return parts


def _part(trie: _Trie, first: int, stop: int) -> _Trie:
    """Some neighbours of a trie, as a trie of their own."""
    return _Trie(*(column[first:stop] for column in trie))


def _grow(trie: _Trie) -> list[_Segment]:
    """The segments of a trie, depth first, with children that need no copy before those that do."""
    segments: list[_Segment] = []
    stack = [(0, len(trie.members), 0, -1, False)]
    while stack:
        low, high, first, parent, is_copy = stack.pop()
        stop = min(trie.shared[low + 1 : high], default=len(trie.tokens[low]))
        rest = next((i for i in range(low, high) if len(trie.tokens[i]) > stop), high)
        segments.append(_Segment(low, first, stop, parent, is_copy, range(low, rest)))
        heads = [i for i in range(rest, high) if i == rest or trie.shared[i] == stop]
        silent, scored = [], []
        for child in pairwise([*heads, high]):
            (scored if min(trie.starts[slice(*child)]) <= stop else silent).append(child)
        here = len(segments) - 1
        children = [(*child, stop, here, False) for child in silent + scored[:1]]
        children += [(*child, stop - 1, here, True) for child in scored[1:]]
        stack.extend(reversed(children))
    return segments


def _size(segments: list[_Segment]) -> int:
    """How many slots the segments take."""
    return sum(segment.stop - segment.first for segment in segments)


def _pack(sizes: list[int], max_tokens: int) -> list[list[int]]:
    """First fit decreasing: the indices of the tries of each row."""
    capacity = max([max_tokens, *sizes])
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, room in enumerate(free) if sizes[i] <= room), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= sizes[i]
    return rows


def _bare(num_rows: int, num_slots: int, num_sequences: int, num_labels: int, pad_id: int) -> Forest:
    """A forest of nothing but padding."""
    slots, labels = (num_rows, num_slots), (num_sequences, num_labels)
    return Forest(
        input_ids=torch.full(slots, pad_id),
        positions=torch.zeros(slots, dtype=torch.long),
        last=torch.arange(num_slots).repeat(num_rows, 1),
        shift_labels=torch.full(slots, NO_LABEL),
        places=torch.zeros(labels, dtype=torch.long),
        mask=torch.zeros(labels, dtype=torch.bool),
        source=torch.zeros((*slots, 2), dtype=torch.long),
        is_token=torch.zeros(slots, dtype=torch.bool),
        tree=torch.zeros(slots, dtype=torch.long),
        roots=[],
    )


def _write(forest: Forest, trie: _Trie, segments: list[_Segment], offset: int, row_offset: int) -> None:
    """Write a trie into the flattened rows from slot `offset` on, in the row that starts at `row_offset`."""
    columns = (forest.input_ids, forest.positions, forest.last, forest.shift_labels, forest.is_token, forest.tree)
    input_ids, positions, last, labels, is_token, tree = (column.view(-1).numpy() for column in columns)
    source = forest.source.view(-1, 2).numpy()
    places, mask = forest.places.numpy(), forest.mask.numpy()
    bounds = list(accumulate((segment.stop - segment.first for segment in segments), initial=offset))
    paths: list[np.ndarray] = []  # for each segment, the slots from the root that lead to its end
    spans = zip(segments, pairwise(bounds), _ends(segments, bounds), strict=True)
    for segment, (start, stop), (whole, in_place) in spans:
        tokens = trie.tokens[segment.sequence]
        input_ids[start:stop] = tokens[segment.first : segment.stop]
        positions[start:stop] = np.arange(segment.first, segment.stop)
        last[start : stop - 1], last[stop - 1] = whole - row_offset - 1, in_place - row_offset - 1
        is_token[start:stop], tree[start:stop] = True, len(forest.roots) - 1
        source[start:stop, 0], source[start:stop, 1] = trie.members[segment.sequence], positions[start:stop]
        above = paths[segment.parent][: segment.first] if paths else np.arange(0)
        paths.append(np.concatenate([above, np.arange(start, stop)]))
        for i in segment.complete:
            scoring = paths[-1][trie.starts[i] - 1 : -1]
            labels[scoring] = tokens[trie.starts[i] :]
            places[trie.members[i], : len(scoring)] = scoring
            mask[trie.members[i], : len(scoring)] = True


def _ends(segments: list[_Segment], bounds: list[int]) -> list[tuple[int, int]]:
    """For each segment, the slot after all that is below it, and the slot after those that see its last token."""
    whole, in_place = bounds[1:], bounds[1:]
    for i in range(len(segments) - 1, 0, -1):
        parent = segments[i].parent
        whole[parent] = max(whole[parent], whole[i])
        if not segments[i].is_copy:
            in_place[parent] = max(in_place[parent], whole[i])
    return list(zip(whole, in_place, strict=True))
