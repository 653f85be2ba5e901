"""OpenAI-compatible servers that share work: which one gets which request, and what happens when one fails.

What is asked and what is made of the answers is not decided here (`data_builders.server_sampler`). A failed request is
sent again, to another server where there is one. A server that fails several times in a row is left out for a while,
then asked whether it is there, then tried with one request at a time until it has answered one. Only when all have
failed for `PATIENCE` seconds does the work stop.
"""

import asyncio
import heapq
import itertools
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from data_builders.records import InputError

logger = logging.getLogger(__name__)

# all times in seconds
BACKOFF = 0.5  # before the second try of a request; doubles with each
MAX_BACKOFF = 30.0
MAX_TRIES = 6  # of a request, at servers that live
STRIKES = 3  # failures in a row after which a server is left out
REST = 1.0  # for which it is left out the first time; doubles with each
MAX_REST = 60.0
PATIENCE = 300.0  # without any answer from any server, until the work stops
CONNECT = 10.0  # to get through to a server, or to hear whether it is there
MAX_ANSWER_BYTES = 32 * 2**20  # 32 answers of 32,000 tokens take a third of it

_GATEWAY = {502, 503, 504}  # said by a proxy, or by a server that is only just starting
_AGAIN = {408, 409, 425, 429}

JobT = TypeVar("JobT")


class RefusalError(Exception):
    """A server that lives does not take this request as it is.

    Attributes:
        status: The HTTP status, 400 or above.
        words: What the server says about it.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.status, self.words = status, words


class FailureError(Exception):
    """A request failed for a reason that may pass.

    Attributes:
        status: The HTTP status; None when there was no whole answer.
        wait: For how long the server asks to be left alone, in seconds; 0 when it does not say.
    """

    def __init__(self, reason: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.wait = status, min(wait, PATIENCE)

    @property
    def of_a_living_server(self) -> bool:
        """Whether a server answered, if only with an error, and not nobody or a proxy before it."""
        return self.status is not None and self.status not in _GATEWAY


def server_address(text: str) -> str:
    """The address under which a server's API lies.

    Raises:
        InputError: It is no address of a server, or holds a password.

    >>> server_address("localhost:8000"), server_address("https://example.org/api/v1/")
    ('http://localhost:8000/v1', 'https://example.org/api/v1')
    """
    try:
        parts = urlsplit(text.strip() if "://" in text else f"http://{text.strip()}")
        named = parts.hostname and parts.port != 0 and " " not in parts.netloc
    except ValueError:
        named = False
    if named and "@" in parts.netloc:
        raise InputError(
            f"`server` for {parts.hostname} holds a password, which would end up in messages: take it out of the "
            "address and name the environment variable that holds the key as `api_key_env`."
        )
    if not named or parts.scheme not in {"http", "https"} or parts.query or parts.fragment:
        raise InputError(f"`server` {text!r} is no address of a server: give it as http://host:8000/v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    versioned = path.rpartition("/")[2][:2] in {f"v{digit}" for digit in range(1, 10)}
    return f"{parts.scheme}://{parts.netloc}{path}{'' if versioned else '/v1'}"


@dataclass(eq=False)
class Server:
    """One server, and how it fares.

    Attributes:
        address: Where its API lies.
        concurrency: Requests that it works on at a time, at most.
        timeout: Seconds that a request may take.
        load: Requests that it works on now.
        strikes: Failures since its last answer; of those that come at once only one counts.
        pauses: How often since then it has said that it has too much to do.
        failing_since: When the first of either happened; None while it answers.
        resting_until: When it may be asked again.
        trouble: What went wrong last.
        client: Its connections, while there are any.
    """

    address: str
    concurrency: int
    timeout: float
    load: int = 0
    strikes: int = 0
    pauses: int = 0
    failing_since: float | None = None
    resting_until: float = 0.0
    trouble: str = ""
    client: Any = field(default=None, repr=False)

    @asynccontextmanager
    async def connected(self, key: str | None) -> AsyncIterator[None]:
        """Holds connections to the server open; they belong to the event loop that runs now."""
        import openai

        timeout = openai.Timeout(self.timeout, connect=min(CONNECT, self.timeout))
        hooks = {"response": [lambda response: _receive(response, self.address, key)]}
        http = openai.DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False, event_hooks=hooks)
        # without a key of its own the client would look for one in variables that the user has not named
        settings = {"api_key": key or "none", "base_url": self.address, "timeout": timeout, "max_retries": 0}
        async with openai.AsyncOpenAI(http_client=http, **settings) as self.client:
            yield

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Asks `/chat/completions`.

        Raises:
            RefusalError: The server does not take it.
            FailureError: There was no answer that could be read.
            InputError: The server wants another key or address.
        """
        create = self.client.chat.completions.with_streaming_response.create
        return await self._exchange(create(model=body["model"], messages=body["messages"], extra_body=body))

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Asks `/completions`; raises as `chat`."""
        create = self.client.completions.with_streaming_response.create
        return await self._exchange(create(model=body["model"], prompt=body["prompt"], extra_body=body))

    async def models(self) -> dict[str, Any]:
        """Asks `/models`; raises as `chat`."""
        return await self._exchange(self.client.models.with_streaming_response.list(), within=CONNECT)

    async def _exchange(self, call: Any, *, within: float | None = None) -> dict[str, Any]:
        import openai

        limit = min(self.timeout, within or self.timeout)
        try:
            async with asyncio.timeout(limit), call as response:
                answer = json.loads(response.http_response.extensions["body"])
        except (TimeoutError, openai.APITimeoutError) as error:
            raise FailureError(f"no answer within {limit:g} seconds") from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, InputError | RefusalError | FailureError):  # openai 2 wraps these as well
                raise error.__cause__ from None
            raise FailureError(f"the connection broke: {error.__cause__ or error!s:.200}") from error
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise FailureError(f"the answer is no JSON: {error!s:.100}", 200) from error
        if not isinstance(answer, dict):
            raise FailureError(f"the answer is no JSON object: {answer!r:.80}", 200)
        return answer

    async def answers(self) -> bool:
        """Whether anything is there, be it only an error."""
        try:
            await self.models()
        except FailureError as error:
            self.trouble = str(error)
            return error.of_a_living_server
        except (InputError, RefusalError):
            pass
        return True

    @property
    def suspected(self) -> bool:
        """Whether it has failed so often in a row that it must show that it is back."""
        return self.strikes >= STRIKES

    def has_room(self, now: float) -> bool:
        """Whether it can take another request."""
        return now >= self.resting_until and self.load < (1 if self.suspected else self.concurrency)

    def recover(self) -> None:
        """Takes note of an answer."""
        if self.suspected:
            logger.warning("%s is back.", self.address)
        self.strikes, self.pauses, self.failing_since, self.trouble = 0, 0, None, ""

    def fail(self, error: FailureError, now: float) -> None:
        """Takes note of a failure: the server rests if it asks for it or has failed too often."""
        self.trouble = str(error)
        self.failing_since = self.failing_since or now
        if now < self.resting_until:
            return
        if error.status == 429:  # it lives, and has too much to do
            self.resting_until = now + (error.wait or _growing(REST, self.pauses, MAX_REST))
            self.pauses += 1
            return
        self.strikes += 1
        if self.strikes == STRIKES:
            logger.warning("%s is left out until it answers again: %s.", self.address, error)
        if self.suspected:
            self.resting_until = now + max(error.wait, _growing(REST, self.strikes - STRIKES, MAX_REST))

    def hopeless(self, now: float) -> bool:
        """Whether it has been failing for too long, and nothing that it works on can change that."""
        waited = self.failing_since is not None and now - self.failing_since > PATIENCE
        return waited and (self.load == 0 or self.strikes > STRIKES)


@asynccontextmanager
async def all_connected(servers: Sequence[Server], key: str | None) -> AsyncIterator[None]:
    """Holds connections to all servers open."""
    async with AsyncExitStack() as stack:
        for server in servers:
            server.load = 0
            await stack.enter_async_context(server.connected(key))
        yield


async def _receive(response: Any, address: str, key: str | None) -> None:
    """Reads an answer as far as one may be long, before the client would read all of it."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise FailureError(f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes", response.status_code)
    if response.status_code >= 300:
        words = _words(bytes(body))
        words = words.replace(key, "[key]") if key else words
        raise _complaint(address, response.status_code, response.headers.get("retry-after"), words)
    response.extensions["body"] = bytes(body)


def _complaint(address: str, status: int, retry_after: str | None, words: str) -> Exception:
    """What a status that is no success means."""
    if status in {401, 403}:
        return InputError(
            f"{address} refuses the key (HTTP {status}: {words}). Does the environment variable that `api_key_env` "
            "names hold the right one?"
        )
    if status < 400:
        return InputError(
            f"{address} answers with a redirect (HTTP {status}), which is not followed because it would take key and "
            "data elsewhere: give the address that it leads to as `server`."
        )
    if status >= 500 or status in _AGAIN:
        return FailureError(f"HTTP {status}: {words}", status, _seconds(retry_after))
    return RefusalError(status, words)


@dataclass(order=True)
class _Try(Generic[JobT]):
    """One job, and how often it has failed."""

    ready_at: float
    number: int
    job: JobT = field(compare=False)
    failures: int = field(default=0, compare=False)
    last: Server | None = field(default=None, compare=False)


class Dispatcher(Generic[JobT]):
    """Works off jobs: each goes to the least loaded server that lives, and to another one when it failed there.

    Args:
        servers: Connected servers.
        do: Does a job at a server, and gives the jobs that follow from it. Raises FailureError to be tried again.
        give_up: Is told of a job that failed too often, and why.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        do: Callable[[Server, JobT], Awaitable[Sequence[JobT]]],
        give_up: Callable[[JobT, str], None],
    ) -> None:
        self.servers, self.do, self.give_up = servers, do, give_up
        self.numbers = itertools.count()
        self.fresh: deque[_Try[JobT]] = deque()
        self.later: list[_Try[JobT]] = []  # a heap
        self.running: dict[asyncio.Task[Sequence[JobT] | None], tuple[Server, _Try[JobT]]] = {}

    async def work_off(self, jobs: Iterable[JobT]) -> None:
        """Returns when all jobs are done or given up.

        Raises:
            InputError: No server has answered for `PATIENCE` seconds, or a job raised it.
        """
        self.fresh.extend(self._tries(jobs))
        try:
            while self.fresh or self.later or self.running:
                self._start()
                await self._wait()
        finally:
            for task in self.running:
                task.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    def _tries(self, jobs: Iterable[JobT]) -> list[_Try[JobT]]:
        return [_Try(0.0, next(self.numbers), job) for job in jobs]

    def _start(self) -> None:
        """Hands out what can be handed out now."""
        now = time.monotonic()
        while ready := self.later if self.later and self.later[0].ready_at <= now else self.fresh:
            free = [server for server in self.servers if server.has_room(now)]
            if not free:
                return
            trial = heapq.heappop(self.later) if ready is self.later else self.fresh.popleft()
            server = min(free, key=lambda server: (server is trial.last, server.load))
            server.load += 1
            self.running[asyncio.create_task(self._attempt(server, trial))] = (server, trial)

    async def _attempt(self, server: Server, trial: _Try[JobT]) -> Sequence[JobT] | None:
        """What follows from the job; None when the server was not there, which is no fault of the job's."""
        if server.suspected and not await server.answers():
            return None
        return await self.do(server, trial.job)

    async def _wait(self) -> None:
        """Waits until something is done, or a job or a server has waited long enough."""
        now = time.monotonic()
        moments = [trial.ready_at for trial in self.later[:1]]
        if self.fresh or self.later:
            moments += [server.resting_until for server in self.servers]
        pause = min((moment - now for moment in moments if moment > now), default=None)
        if not self.running:
            await asyncio.sleep(pause or 0)
            return
        done, _ = await asyncio.wait(self.running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            server, trial = self.running.pop(task)
            server.load -= 1
            self._settle(task, server, trial)

    def _settle(self, task: asyncio.Task[Sequence[JobT] | None], server: Server, trial: _Try[JobT]) -> None:
        now = time.monotonic()
        try:
            following = task.result()
        except FailureError as error:
            server.fail(error, now)
            self._try_again(trial, server, error, now)
        else:
            if following is not None:
                server.recover()
                self.fresh.extendleft(reversed(self._tries(following)))
                return
            server.fail(FailureError(server.trouble), now)
            self.fresh.appendleft(trial)
        if all(server.hopeless(now) for server in self.servers):
            troubles = "; ".join(f"{server.address}: {server.trouble}" for server in self.servers)
            raise InputError(
                f"no server has answered for {PATIENCE:g} seconds ({troubles}). See to them; the same command then "
                "goes on where this one stopped."
            )

    def _try_again(self, trial: _Try[JobT], server: Server, error: FailureError, now: float) -> None:
        trial.last = server
        if error.status == 429:
            self.fresh.appendleft(trial)  # the server rests, not the job
            return
        trial.failures += 1
        if trial.failures >= MAX_TRIES:
            self.give_up(trial.job, f"failed {MAX_TRIES} times, at last with: {error}")
            return
        trial.ready_at = now + max(error.wait, _growing(BACKOFF, trial.failures - 1, MAX_BACKOFF))
        heapq.heappush(self.later, trial)


def _growing(first: float, times: int, most: float) -> float:
    """A time that doubles, and varies so that those who failed together do not come back together."""
    return min(most, first * 2**times) * random.uniform(0.75, 1.25)


def _seconds(retry_after: str | None) -> float:
    """What the header says, which is a number of seconds or a date; 0 when it says nothing.

    >>> _seconds("2.5"), _seconds("soon")
    (2.5, 0.0)
    """
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _words(body: bytes) -> str:
    """What the body of an error says, without the request that some servers repeat in it.

    >>> _words(b'{"detail": [{"loc": ["body", "n"], "msg": "Extra inputs are not permitted", "input": 4}]}')
    'body.n: Extra inputs are not permitted'
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body[:300].decode(errors="replace").strip() or "no reason given"
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found.get("message") or found
    if isinstance(found, dict):
        param = f" (param: {found['param']})" if found.get("param") else ""
        found = f"{found.get('message') or found}{param}"
    if isinstance(found, list):
        found = "; ".join(_complaint_of_pydantic(part) for part in found)
    return f"{found}"[:500]


def _complaint_of_pydantic(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("loc"), list):
        return f"{part}"
    return f"{'.'.join(map(str, part['loc']))}: {part.get('msg')}"
