"""A headless Chromium that opens a page and gives what a reader sees of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program() -> str:
    """The browser's path; empty where none is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), "")


def seen(address: str, ready: Callable[[str], bool], seconds: float = 120.0) -> str:
    """The visible text of the page at `address` as soon as `ready(text)` holds, or after so long."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [
                *(program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--window-size=1900,1000", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert browser.stderr is not None
            found = (re.search(r"DevTools listening on ws://([^/]+)", line) for line in browser.stderr)
            return asyncio.run(_watch(next(m[1] for m in found if m), address, ready, seconds))
        finally:
            browser.kill()
            browser.wait()


async def _watch(host: str, address: str, ready: Callable[[str], bool], seconds: float) -> str:
    end = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json") as answer:
            pages = json.loads(await answer.text())
        page = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        async with session.ws_connect(page, max_msg_size=0) as socket:
            numbers = itertools.count(1)

            async def ask(method: str, **parameters: Any) -> Any:
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (answer := json.loads((await socket.receive()).data)).get("id") != number:
                    pass
                return answer["result"]

            await ask("Page.navigate", url=address)
            text = ""
            while time.monotonic() < end and not ready(text):
                await asyncio.sleep(0.5)
                value = await ask("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
                text = value["result"].get("value", "")
            return text
