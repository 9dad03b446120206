"""A headless Chromium spoken to over DevTools' pipe: no driver, no port, no network."""

import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The null byte parts messages; 3 and 4 are the descriptors that Chromium reads and writes.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    " --disable-background-networking"
)


class Tab:
    """One tab: `call` a DevTools method; every event that came meanwhile is in `events`."""

    def __init__(self, send: int, receive: int) -> None:
        self.send, self.receive, self.session = send, receive, ""
        self.number, self.buffer, self.events = 0, b"", []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive], [], [], 60)
            data = os.read(self.receive, 1 << 20) if ready else b""
            assert data, "Chromium went away, or said nothing for a minute"
            self.buffer += data
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, address: str, width: int, height: int = 900) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        self.call("Page.navigate", url=address)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.next()

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"][
            "value"
        ]


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A fresh tab of a fresh Chromium whose profile lies in an empty directory."""
    read_by_it, send = os.pipe()
    receive, written_by_it = os.pipe()
    command = f'exec "$0" {FLAGS} --remote-debugging-pipe "--user-data-dir=$1" about:blank'
    command += f" 3<&{read_by_it} 4>&{written_by_it}"
    process = subprocess.Popen(
        ["bash", "-c", command, str(CHROMIUM), str(profile)],
        pass_fds=(read_by_it, written_by_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        page = Tab(send, receive)
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page.session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(send)
        os.close(receive)
