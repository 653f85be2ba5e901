"""Answers from OpenAI-compatible servers: vLLM, SGLang, LMDeploy, `transformers serve`, and others.

Here stands what they are asked, and what is done when one cannot do it. Which of them is asked, and what happens when
one fails: `data_builders.servers`. How it looks on the wire: `data_builders.chat_format`.

Such servers take the same requests but do not do the same with them, so answers are looked at: whether there are as
many as were asked for, whether they differ, whether a beginning that was given was really continued.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from data_builders.chat_format import (
    choices_of,
    completion_of,
    data_url,
    load_tokenizer,
    prompt_tokens,
    rendered_prompt,
    tiled_messages,
    user_messages,
)
from data_builders.records import InputError
from data_builders.samplers import Completion, Request, SamplingSettings, word_ends
from data_builders.servers import (
    STRIKES,
    Dispatcher,
    FailureError,
    RefusalError,
    Server,
    all_connected,
    server_address,
)
from data_builders.tiling.views import load_tiling

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

_SAME = 4  # as many equal samples of every question are no accident
_WITHOUT = {  # parameters that a server may refuse, how it names them, and what is different without
    "n": (r"(?:^|[\s'\"`.(])n(?:['\"`:),]| (?:must|should|is|has|can)\b|\s*[=<>])", "it is asked once per response"),
    "seed": (r"\bseed\b", "the same seed will not give the same responses"),
    "top_k": (r"\btop_k\b", "its own default counts, whatever the rows say"),
    "generation_config": (r"\bgeneration_config\b", "its own defaults count, whatever the rows say"),
    "logprobs": (r"logprobs\b", "how sure the model is stays unknown"),
    "max_tokens": (r"(?s)max_tokens.*not supported.*max_completion_tokens", "`max_completion_tokens` says the same"),
}
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass
class _Abilities:
    """What a server was found to do.

    Attributes:
        refused: Parameters that it does not take.
        one_choice: It gives one completion to a request, however many are asked for.
        is_transformers: It is `transformers serve`, which only samples if a generation config says so.
        continues: It continues a message that the assistant has begun; None until that was tried.
    """

    refused: set[str] = field(default_factory=set)
    one_choice: bool = False
    is_transformers: bool = False
    continues: bool | None = None


class ServerSampler:
    """Answers with a model that one or more servers hold.

    Args:
        model: The name under which the servers know it.
        servers: Their addresses; they share the work, and one that dies is left out until it is back.
        image_root: The folder that image paths are relative to.
        concurrency: Requests that each server works on at a time.
        timeout: Seconds that a request may take.
        tokenizer: Folder or Hub name of the model's tokenizer. With it texts are cut by the model's own tokens, and
            any server that has `/v1/completions` can continue a given beginning (where there is no image). A folder
            that says how pictures are cut (`tiling.json`; or `model`, if it is one) has them sent in tiles.
        api_key_env: The environment variable that holds the key, if the servers want one.

    Raises:
        InputError: No server answers, or one has no such model or wants another key, or a setting is out of range.
    """

    def __init__(
        self,
        model: str,
        servers: Sequence[str],
        *,
        image_root: Path,
        concurrency: int = 64,
        timeout: float = 600.0,
        tokenizer: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
    ) -> None:
        if concurrency < 1 or not timeout > 0:
            raise InputError(f"`concurrency` ({concurrency}) must be at least 1 and `timeout` ({timeout}) above 0.")
        _need_client()
        self.name = model
        self.servers = [Server(each, concurrency, timeout) for each in dict.fromkeys(map(server_address, servers))]
        self.abilities = {server: _Abilities() for server in self.servers}
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self.image_root, self.tiling = image_root, load_tiling(model) or load_tiling(tokenizer)
        self.data_url = lru_cache(maxsize=16)(partial(data_url, image_root))
        self.key = os.environ.get(api_key_env, "").strip() or None
        self._warned: set[str] = set()
        self._turn = threading.Lock()  # what servers may be given at a time holds for all threads together
        _run(self._look_around())

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters; without a tokenizer, each word and mark."""
        if self.tokenizer is None:
            return word_ends(text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]

    def sample(self, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[list[Completion]]:
        """`num` completions for each request; those of one that is refused, or fails again and again, are errors.

        Raises:
            InputError: No server answers any more, or one cannot do what all requests ask for.
        """
        greedy = settings.temperature == 0
        with self._turn:
            found = _run(_Round(self, requests, 1 if greedy else num, settings).answer())
        if greedy:
            return [group * num for group in found]
        self._compare(found, num, settings)
        return found

    def messages(self, request: Request) -> list[dict[str, Any]]:
        """The user's turn, its pictures cut as those of the model's training were, if a folder says so."""
        if self.tiling and request.images:
            return tiled_messages(request.prompt, request.images, self.image_root, self.tiling)
        return user_messages(request.prompt, [self.data_url(name) for name in request.images])

    def warn(self, subject: str, words: str) -> None:
        """Says something the first time that it is so."""
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning(words)

    def _compare(self, found: list[list[Completion]], num: int, settings: SamplingSettings) -> None:
        """Warns of samples that were not drawn."""
        texts = [{each.text for each in group} for group in found if not any(each.error for each in group)]
        if num >= _SAME and texts and all(len(group) == 1 for group in texts):
            self.warn(
                "same samples",
                f"all {num} responses to each of {len(texts)} questions are the same at temperature "
                f"{settings.temperature:g}. Most likely the server ignores `temperature` or `seed`: such responses "
                "give no pairs.",
            )

    async def _look_around(self) -> None:
        """Which servers are there, and whether they have the model."""
        async with all_connected(self.servers, self.key):
            there = await asyncio.gather(*(self._look_at(server) for server in self.servers))
        if not any(there):
            troubles = "; ".join(f"{server.address}: {server.trouble}" for server in self.servers)
            raise InputError(f"no server answers ({troubles}). Are they running, and is `server` right?")

    async def _look_at(self, server: Server) -> bool:
        try:
            entries = (await server.models()).get("data")
        except RefusalError:
            return True
        except FailureError as error:
            if not error.of_a_living_server:
                server.strikes, server.trouble = STRIKES, str(error)
                self.warn(server.address, f"{server.address} does not answer and is left out until it does: {error}.")
            return error.of_a_living_server
        entries = entries if isinstance(entries, list) else []
        names = [str(each["id"]) for each in entries if isinstance(each, dict) and "id" in each]
        if names and self.name not in names:
            await self._try_model(server, names)
        return True

    async def _try_model(self, server: Server, names: list[str]) -> None:
        """Tries a model that is not listed: `transformers serve` lists what is in the cache, gateways not everything.

        Raises:
            InputError: The server does not have it.
        """
        try:
            await server.chat({"model": self.name, "messages": user_messages("Hi"), "max_tokens": 1})
        except RefusalError as error:
            raise InputError(
                f"{server.address} does not serve {self.name!r} ({error}). It names {', '.join(names[:8])}: give what "
                "it serves as `model`."
            ) from error
        except FailureError as error:
            self.warn(f"model at {server.address}", f"{server.address} does not list {self.name!r}, and: {error}.")


@dataclass(frozen=True)
class _Job:
    """Completions that are still wanted: whose, and which."""

    place: int
    indices: tuple[int, ...]


class _Round:
    """One call of `sample`."""

    def __init__(
        self, sampler: ServerSampler, requests: Sequence[Request], num: int, settings: SamplingSettings
    ) -> None:
        self.sampler, self.requests, self.settings = sampler, requests, settings
        self.found: list[dict[int, Completion]] = [{} for _ in requests]
        self.jobs = [_Job(place, tuple(range(num))) for place in range(len(requests)) if num]
        self.probes: dict[Server, asyncio.Task[bool]] = {}

    async def answer(self) -> list[list[Completion]]:
        """All completions, in the order of the requests."""
        servers = self.sampler.servers
        async with all_connected(servers, self.sampler.key):
            await Dispatcher(servers, self._do, self._lose).work_off(self.jobs)
        return [[group[index] for index in sorted(group)] for group in self.found]

    async def _do(self, server: Server, job: _Job) -> list[_Job]:
        """Asks for the completions of a job, and gives a job for what is still missing."""
        request, can = self.requests[job.place], self.sampler.abilities[server]
        if self._goes_on_in_chat(request):
            await self._need_continuing(server)
        asked = job.indices[:1] if can.one_choice else job.indices
        body = self._body(request, can, asked)
        try:
            answer = await (server.complete(body) if "prompt" in body else server.chat(body))
        except RefusalError as refusal:
            return self._after_refusal(server, job, body, refusal)
        completions = [completion_of(choice, request.prefix, "prompt" in body) for choice in choices_of(answer)]
        self.found[job.place].update(zip(asked, completions, strict=False))
        can.one_choice |= len(completions) < len(asked)
        missing = job.indices[min(len(completions), len(asked)) :]
        if can.one_choice:
            return [_Job(job.place, (index,)) for index in missing]
        return [_Job(job.place, missing)] if missing else []

    def _lose(self, job: _Job, reason: str) -> None:
        self.found[job.place].update({index: Completion("", "error", reason) for index in job.indices})

    def _goes_on_in_chat(self, request: Request) -> bool:
        """Whether a beginning is given to the server as a message, and not as a part of a prompt rendered here."""
        return bool(request.prefix.strip()) and (self.sampler.tokenizer is None or bool(request.images))

    def _body(self, request: Request, can: _Abilities, indices: tuple[int, ...]) -> dict[str, Any]:
        body = {"model": self.sampler.name, **self._prompt(request), **self._drawing(request, can, indices)}
        if self.settings.top_logprobs and "messages" in body:
            body |= {"logprobs": True, "top_logprobs": self.settings.top_logprobs}
        for name in can.refused & body.keys():
            value = body.pop(name)
            if name == "max_tokens":
                body["max_completion_tokens"] = value
            if name == "logprobs":
                del body["top_logprobs"]
        return body

    def _prompt(self, request: Request) -> dict[str, Any]:
        begun = request.prefix.rstrip()  # templates cut off what is behind it, or do not
        if begun and not self._goes_on_in_chat(request):
            return {"prompt": rendered_prompt(self.sampler.tokenizer, request.prompt) + request.prefix}
        messages = self.sampler.messages(request)
        if not begun:
            return {"messages": messages}
        return {"messages": [*messages, {"role": "assistant", "content": begun}], **_CONTINUE}

    def _drawing(self, request: Request, can: _Abilities, indices: tuple[int, ...]) -> dict[str, Any]:
        settings = self.settings
        if settings.temperature == 0:
            return {"temperature": 0, "max_tokens": settings.max_new_tokens}
        drawing: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p}
        if can.is_transformers:
            config = {"do_sample": True, **drawing, "top_k": settings.top_k}
            drawing["generation_config"] = json.dumps(config)
        else:  # -1, since servers that are not told otherwise take top_k from the model's own generation config
            drawing["top_k"] = settings.top_k or -1
        if len(indices) > 1:
            drawing["n"] = len(indices)
        return {**drawing, "max_tokens": settings.max_new_tokens, "seed": _seed(settings.seed, request, indices[0])}

    def _after_refusal(self, server: Server, job: _Job, body: dict[str, Any], refusal: RefusalError) -> list[_Job]:
        """The job again, if it can be asked in another way; else its completions are errors.

        Raises:
            InputError: Every request would be refused for the same reason.
        """
        can, words = self.sampler.abilities[server], refusal.words
        if "Unexpected fields in the request" in words and "top_k" in body:  # in these words by no other server
            can.is_transformers = True
            return [job]
        for name, (pattern, difference) in _WITHOUT.items():
            if name in body and re.search(pattern, words):
                can.refused.add(name)
                self.sampler.warn(
                    f"{name} at {server.address}",
                    f"{server.address} refuses `{name}` ({words}) and is asked without it: {difference}.",
                )
                return [job]
        if refusal.status == 404 or "pinned to" in words:
            raise InputError(f"{server.address} cannot be asked for {self.sampler.name!r} ({refusal}): is it served?")
        if wrong := next((name for name in ("temperature", "top_p") if re.search(rf"\b{name}\b", words)), None):
            raise InputError(f"{server.address} refuses `{wrong}` ({refusal}): give a value that it takes.")
        self._lose(job, str(refusal))
        return []

    async def _need_continuing(self, server: Server) -> None:
        """Finds out, once, whether a server continues what it is given.

        Raises:
            InputError: It does not.
        """
        can = self.sampler.abilities[server]
        if can.continues is None:
            probe = self.probes.get(server) or asyncio.create_task(self._continues(server))
            self.probes[server] = probe
            try:
                can.continues = await probe
            finally:
                self.probes.pop(server, None)
        if not can.continues:
            way = "leave the images out" if self.sampler.tokenizer else "give the model's `tokenizer`"
            raise InputError(
                f"{server.address} does not continue a message that has been begun, as vLLM and SGLang do with "
                f"`continue_final_message`: {way}, then the prompt is rendered here and continued by /v1/completions."
            )

    async def _continues(self, server: Server) -> bool:
        """Compares lengths of prompts: a message that is continued adds its one word, one that is closed much more."""
        body = {"model": self.sampler.name, "messages": user_messages("Hi"), "max_tokens": 1, "temperature": 0}
        begun = {"messages": [*body["messages"], {"role": "assistant", "content": "A"}], **_CONTINUE}
        try:
            before, after = [prompt_tokens(await server.chat(body | more)) for more in ({}, begun)]
        except RefusalError:
            return False
        return before > 0 and after <= before + 2


def _seed(seed: int, request: Request, index: int) -> int:
    """A seed of its own for each request and completion, in a range that every server takes."""
    digest = hashlib.sha256(repr((seed, request, index)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _need_client() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise InputError("`server` needs a client that is not installed: pip install 'mpo[serve]'.") from error


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Runs asynchronous work to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
