"""A small Chrome DevTools client over a pipe: a test opens a page as a reader would. Standard library only."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT = 20  # seconds for one answer of the browser
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]  # fmt: skip
# The browser reads commands from descriptor 3 and writes answers to descriptor 4.
_ON_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_browser() -> str | None:
    """The path of a Chromium or Chrome, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """The tab that is looked at. `events` holds everything that the browser reported about what is open in it."""

    def __init__(self, commands: int, answers: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.new_tab()

    def new_tab(self) -> None:
        """Starts over in an empty tab: no size, theme or event of the tab before is left."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def open(self, path: Path) -> None:
        """Loads a file and waits until it and its pictures are there; events of earlier pages are forgotten."""
        self.events.clear()
        loader = self.call("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        while not any(_is_load(event, loader) for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; works where the page itself may run no script."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """What went wrong in the page: exceptions, and what the console was told."""
        thrown = [
            event["params"]["exceptionDetails"]["text"]
            for event in self.events
            if event["method"] == "Runtime.exceptionThrown"
        ]
        return thrown + [
            event["params"]["entry"]["text"] for event in self.events if event["method"] == "Log.entryAdded"
        ]

    def requests(self) -> list[str]:
        """Every address the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer within {TIMEOUT} seconds"
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser has gone"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        content = json.loads(message)
        if "method" in content:
            self.events.append(content)
        return content


def _is_load(event: dict[str, Any], loader: str) -> bool:
    params = event["params"]
    return event["method"] == "Page.lifecycleEvent" and (params["name"], params["loaderId"]) == ("load", loader)


@contextmanager
def open_browser(program: str) -> Iterator[Page]:
    """A headless browser with one empty tab and a profile of its own."""
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        launcher = [sys.executable, "-S", "-c", _ON_3_AND_4, str(commands_out), str(answers_in)]
        process = subprocess.Popen(
            [*launcher, program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands_out, answers_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(answers_in)
        try:
            yield Page(commands_in, answers_out)
        finally:
            os.close(commands_in)  # the browser quits when nobody can command it any more
            os.close(answers_out)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
