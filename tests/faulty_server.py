"""An OpenAI-compatible server on loopback that fails as it is told to, and keeps what it was asked."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Fault = Callable[["Handler"], None]  # answers, or does not


class Handler(BaseHTTPRequestHandler):
    """One request; connections are closed after it, so that a server that has stopped is really gone."""

    server: "_HTTPServer"
    body: Body

    def do_GET(self) -> None:
        self.body = {}
        self.server.owner.handle_models(self)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.owner.handle(self)

    def reply(self, content: object, status: int = 200, **headers: str) -> None:
        """Sends text as it is, and everything else as JSON."""
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class _HTTPServer(ThreadingHTTPServer):
    owner: "FaultyServer"
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that hung up is what some tests are about."""


class FaultyServer:
    """Each request to it takes the next of `faults`, if one is left, and else gets what `answer` makes of its body.

    Attributes:
        calls: Bodies of the requests, in the order in which they came.
        paths: Where they went.
        times: When they came, in seconds.
        headers: What came with them, with names in lower case.
        most_at_once: How many requests it worked on at the same time.
        models: What `/v1/models` answers: names, or a fault.
    """

    def __init__(self, *faults: Fault, answer: Callable[[Body], object] | None = None) -> None:
        self.faults, self.answer = list(faults), answer or answer_all
        self.models: list[str] | Fault = ["tiny"]
        self.calls: list[Body] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._http: _HTTPServer | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FaultyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to listen; at the same port as before."""
        self._http = _HTTPServer(("127.0.0.1", self.port), Handler)
        self._http.owner, self.port = self, self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections from now on."""
        if self._http:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def handle_models(self, handler: Handler) -> None:
        if callable(self.models):
            self.models(handler)
        else:
            handler.reply({"data": [{"id": name} for name in self.models]})

    def handle(self, handler: Handler) -> None:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.calls.append(handler.body)
            self.paths.append(handler.path)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
        try:
            if fault:
                fault(handler)
            else:
                answer = self.answer(handler.body)
                answer(handler) if callable(answer) else handler.reply(answer)
        finally:
            with self._lock:
                self._at_once -= 1


def question(body: Body) -> str:
    """The text that the user sent."""
    if "prompt" in body:
        return body["prompt"]
    content = next(message["content"] for message in body["messages"] if message["role"] == "user")
    return content if isinstance(content, str) else content[-1]["text"]


def choice(text: str | None, reason: str | None = "stop", **message: object) -> Body:
    return {"finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}


def answer_all(body: Body) -> Body:
    """As many choices as were asked for: the question, the seed and a number."""
    texts = [f"{question(body)} {body.get('seed')} {number}" for number in range(body.get("n", 1))]
    return {"choices": [choice(text) | {"text": text} for text in texts]}


def answer_one(body: Body) -> Body:
    """One choice, however many were asked for."""
    return answer_all({**body, "n": 1})


def drop(handler: Handler) -> None:
    """Hangs up without a word."""
    handler.close_connection = True


def half(handler: Handler) -> None:
    """Hangs up in the middle of the answer."""
    handler.reply('{"choices": [{"mess', Content_Length="1000")


def late(seconds: float) -> Fault:
    def fault(handler: Handler) -> None:
        time.sleep(seconds)
        handler.reply(answer_all(handler.body))

    return fault


def says(content: object, status: int = 200, **headers: str) -> Fault:
    """Answers with this text or JSON."""
    return lambda handler: handler.reply(content, status, **headers)


def refuses(*names: str) -> Callable[[Body], object]:
    """Takes no request that holds one of these parameters, and says which."""

    def answer(body: Body) -> object:
        unknown = [name for name in names if name in body]
        words = {"error": {"message": f"Unrecognized request argument supplied: '{unknown[0]}'" if unknown else ""}}
        return says(words, 400) if unknown else answer_all(body)

    return answer
