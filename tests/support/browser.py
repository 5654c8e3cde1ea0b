"""Open pages in a real browser (headless Chromium) and report what they did.

seen = open_page(file, tmp_path)
assert seen.requests == [] and seen.console == []
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
    ),
    *("--disable-default-apps", "--disable-dev-shm-usage", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
"""No sandbox, which works neither for root nor in most containers. No host names are resolved."""
BROWSER_ITSELF = "not an origin"
"""The initiator of a request that no page made."""
DARK = "--blink-settings=preferredColorScheme=0"


def missing_browser() -> bool:
    """Return whether this host has no Chromium."""
    return shutil.which("chromium") is None


@dataclass(frozen=True)
class Seen:
    """What a page did."""

    dom: str
    screenshot: Path
    console: list[str]
    """Console messages of the page, or of the browser about it."""
    requests: list[str]
    """URLs that the page requested over a network, without files."""

    def count(self, red: int, green: int, blue: int) -> int:
        """Return the number of pixels of the screenshot with exactly this colour."""
        return int((pixels(self.screenshot.read_bytes()) == (red, green, blue)).all(axis=2).sum())

    def corner(self) -> int:
        """Return the brightness of the first pixel, 0 to 255."""
        return int(pixels(self.screenshot.read_bytes())[0, 0].mean())


def open_page(file: Path, folder: Path, *flags: str, size: tuple[int, int] = (800, 900)) -> Seen:
    """Open a file in a browser whose profile and home are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, log = folder / "page.png", folder / "net.json"
    url = file.resolve().as_uri()
    command = [
        *("chromium", *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
        *(f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", "--dump-dom", *flags, url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.exists(), done.stderr
    asked = json.loads(log.read_text())
    started = asked["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event.get("params", {}) for event in asked["events"] if event["type"] == started]
    urls = [one["url"] for one in begun if "url" in one and one["initiator"] != BROWSER_ITSELF]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout, picture, console, urls)


def pixels(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode a PNG of 8-bit red, green and blue as uint8 [height, width, 3]."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) == (8, 2)
    place, data = 8, b""
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += length + 12
    filtered = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + 3 * width)
    found = np.zeros((height + 1, 3 * width), np.uint8)
    for row, line in enumerate(filtered):
        found[row + 1] = _unfilter(line[0], line[1:], found[row])
    return found[1:].reshape(height, width, 3)


def _unfilter(kind: int, line: np.ndarray[Any, Any], above: np.ndarray[Any, Any]) -> Any:
    """Undo a row filter (section 9 of the PNG specification) for pixels of three bytes."""
    if kind < 3:
        return (line, np.cumsum(line.reshape(-1, 3), axis=0, dtype=np.uint8).reshape(-1), line + above)[kind]
    made, upper = [0, 0, 0], [0, 0, 0, *above.tolist()]
    for at, byte in enumerate(line.tolist()):
        left, up, corner = made[at], upper[at + 3], upper[at]
        guess = (left + up) // 2
        if kind == 4:
            by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = (
                left if by_left <= by_up and by_left <= by_corner else up if by_up <= by_corner else corner
            )
        made.append(byte + guess & 255)
    return made[3:]
