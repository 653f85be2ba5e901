"""Rows of a source into rows to learn from: kept, or rewritten by a model, or left out with a reason.

Every row that comes out has an `id` that begins with its source's name, its `category`, and `rewritten`. A rewritten
one also has its `original` messages, to compare, and under `rewrite` the model, the prompt's version, the grammar,
whether the pictures were shown, and how tokens were drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_builders.conversations import Turn, messages_of
from data_builders.formats.protocol import AS_READ, RefusedError
from data_builders.prompts.templates import PromptTemplate
from data_builders.records import Row
from data_builders.rewriting.asking import check_rewritable, check_same_answer, request_for, rewrite_prompt
from data_builders.rewriting.datasets import RewriteSource
from data_builders.rewriting.grammars import Grammar, parse
from data_builders.samplers import Completion, Sampler, SamplingSettings

MAX_SHOWN_REPLY = 2_000  # characters of what a model wrote that a dropped row keeps

Images = Callable[[str], str]
"""The path of an image to the path of the one to be used; raises RefusedError where there is none."""


@dataclass(frozen=True)
class Writer:
    """A model that rewrites.

    Attributes:
        sampler: The model.
        settings: How its tokens are drawn.
        provenance: What rows say about both.
    """

    sampler: Sampler
    settings: SamplingSettings
    provenance: Row


@dataclass(frozen=True)
class _Task:
    name: str
    row: Row
    grammar: Grammar
    prompt: PromptTemplate

    @property
    def blind(self) -> bool:
        """Whether the pictures are kept from the model."""
        return self.grammar == "caption"


def keep_rows(
    labelled: Sequence[Row], sources: Mapping[str, RewriteSource], images: Images
) -> tuple[list[Row], list[Row]]:
    """The rows as they are, with images of usable sizes, and the reason for each of the others.

    Args:
        labelled: Rows under `row`, with the name of their source under `source`.
        sources: By name.
        images: Makes the images usable.
    """
    kept, dropped = [], []
    for name, row in _by_source(labelled):
        try:
            kept.append({**_placed(row, name, sources[name], images), "rewritten": False})
        except RefusedError as error:
            dropped.append(_left_out(_id(row, name), name, error))
    return kept, dropped


def rewrite_rows(
    labelled: Sequence[Row],
    sources: Mapping[str, RewriteSource],
    images: Images,
    writers: Callable[[bool], Writer],
) -> tuple[list[Row], list[Row]]:
    """The rows as a model rewrote them, and the reason for each of the others.

    Args:
        labelled: As for `keep_rows`.
        sources: By name.
        images: Makes the images usable.
        writers: The model that rewrites captions without their pictures (True), and the one for all else (False).
    """
    tasks, dropped, done = [], [], []
    for name, row in _by_source(labelled):
        try:
            tasks.append(_task(row, name, sources[name], images))
        except RefusedError as error:
            dropped.append(_left_out(_id(row, name), name, error))
    for task, reply, provenance in _asked(tasks, writers):
        try:
            done.append(_rewritten(task, reply, provenance))
        except RefusedError as error:
            said = {"error": reply.error} if reply.error else {"reply": reply.text[:MAX_SHOWN_REPLY]}
            dropped.append({**_left_out(task.row["id"], task.name, error), **said})
    return done, dropped


def _by_source(labelled: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(one["source"], one["row"]) for one in labelled]


def _placed(row: Row, name: str, source: RewriteSource, images: Images) -> Row:
    """A row with its images, category and an id that no other source has; what another format said of it is void."""
    names = [images(image) for image in source.under_root(row.get("images") or [])]
    own = {"id": _id(row, name), "images": names, "source": row.get("source") or name, "category": source.category}
    return {key: value for key, value in {**row, **own}.items() if key != AS_READ}


def _id(row: Row, name: str) -> str:
    return f"{name}/{row['id']}"


def _left_out(own: str, name: str, error: RefusedError) -> Row:
    detail = {"detail": error.detail} if error.detail else {}
    return {"id": own, "source": name, "reason": error.reason, **detail}


def _task(row: Row, name: str, source: RewriteSource, images: Images) -> _Task:
    check_rewritable(row, source.reads)
    placed = _placed(row, name, source, images)
    return _Task(name, placed, source.reads, rewrite_prompt(source.prompt or source.reads))


def _asked(tasks: Sequence[_Task], writers: Callable[[bool], Writer]) -> list[tuple[_Task, Completion, Row]]:
    """Each task with its reply and who gave it, in the order of the tasks."""
    replies: dict[int, tuple[Completion, Row]] = {}
    for blind in (False, True):
        places = [place for place, task in enumerate(tasks) if task.blind == blind]
        if not places:
            continue
        writer = writers(blind)
        requests = [request_for(tasks[place].row, tasks[place].grammar, tasks[place].prompt) for place in places]
        for place, (reply,) in zip(places, writer.sampler.sample(requests, 1, writer.settings), strict=True):
            replies[place] = reply, writer.provenance
    return [(task, *replies[place]) for place, task in enumerate(tasks)]


def _rewritten(task: _Task, reply: Completion, provenance: Row) -> Row:
    """A row to learn from.

    Raises:
        RefusedError: There is no reply, it does not keep to its grammar, or it changes the final answer.
    """
    if reply.error:
        raise RefusedError("failed")
    if reply.finish_reason == "length":
        raise RefusedError("reply cut off")
    said = parse(task.grammar, reply.text)
    if isinstance(said, str):
        raise RefusedError(f"reply: {said}")
    if task.grammar == "math":
        check_same_answer(task.row, said[0].text)
    shown = {"prompt": task.prompt.id, "grammar": task.grammar, "with_image": not task.blind}
    original = messages_of(task.row)
    rest = {key: value for key, value in task.row.items() if key not in ("prompt", "completion", "messages")}
    spoken = _spoken(said, original[:-1] if task.grammar == "math" else [])
    return {**rest, **spoken, "rewritten": True, "rewrite": {**provenance, **shown}, "original": original}


def _spoken(said: list[Turn], before: list[Row]) -> Row:
    """What is said, in the shape of a single answer where there is one."""
    messages = [{"role": turn.role, "content": turn.text} for turn in said]
    if len(said) > 2:
        return {"messages": messages}
    return {"prompt": [*before, *messages[:-1]], "completion": messages[-1:]}
