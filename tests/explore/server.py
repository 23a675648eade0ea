"""A page in a process of its own, and a browser to look at it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Seconds, long enough for a machine that is busy with other things.
_START = 240


@contextmanager
def serving(checkpoint: Path, **variables: str) -> Iterator[str]:
    """Serves a checkpoint through the command line on a free port; gives the address.

    Args:
        checkpoint: The file.
        variables: Of the environment.
    """
    command = [sys.executable, "-m", "dat_lightning", "explore", "--ckpt_path", str(checkpoint), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as server:
        alarm = threading.Timer(_START, server.kill)
        alarm.start()
        assert server.stdout is not None
        said = []
        try:
            for line in server.stdout:
                said.append(line)
                if found := re.search(r"is open at (http://127\.0\.0\.1:\d+) ", line):
                    break
            else:
                raise RuntimeError(f"the page did not open: {''.join(said)}")
            alarm.cancel()
            # Nobody reads on, and a full pipe would stop the server.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield found[1]
        finally:
            alarm.cancel()
            server.terminate()


@contextmanager
def chromium() -> Iterator[Any]:
    """The distribution's Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have no user that Chromium's sandbox could switch to.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def wait_for(address: str) -> tuple[str, int]:
    """Waits until the server, which has said where it will be, is there; gives host and port."""
    host, _, port = address.removeprefix("http://").partition(":")
    for _ in range(10 * _START):
        with socket.socket() as client:
            if client.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.1)
    return host, int(port)


def visit(page: Any, address: str) -> None:
    """Opens the page."""
    wait_for(address)
    page.goto(address)
