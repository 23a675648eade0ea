"""Who is answered, by the server as it runs and by the guard alone; and whom the server asks: nobody."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.explore.server import serving, wait_for

pytest.importorskip("starlette", reason="no Streamlit here: pip install '.[explore]'")

from dat_lightning.explore.same_origin import SameOrigin

# Python itself tells of each connection and name that is looked up, whatever library it is for.
SPY = """
import json, os, sys
asked = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
def spy(event, args):
    if event in asked:
        with open(os.environ["SPY"], "a") as file:
            file.write(json.dumps([event, str(args[asked[event]])]) + "\\n")
sys.addaudithook(spy)
"""

OWN, FOREIGN = 101, 403


def ask(place: tuple[str, int], path: str, host: str, origin: str | None, *more: str, method: str = "GET") -> int:
    """The status that a server answers a request with."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *([] if origin is None else [f"Origin: {origin}"]), *more]
    with socket.create_connection(place, timeout=120) as client:
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int(client.recv(100).split()[1])


def open_stream(place: tuple[str, int], host: str, origin: str | None) -> int:
    """The status that a WebSocket's handshake is answered with."""
    key, upgrade = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", ("Connection: Upgrade", "Upgrade: websocket")
    return ask(place, "/_stcore/stream", host, origin, *upgrade, key, "Sec-WebSocket-Version: 13")


def test_pages_of_others_are_refused_and_nobody_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY)
    heard = tmp_path / "heard"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with serving(checkpoint, PYTHONPATH=path, SPY=str(heard)) as address:
        place = wait_for(address)
        port = place[1]
        # 9999: as if forwarded from there.
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "localhost:9999", "LOCALHOST"):
            assert open_stream(place, host, None) == OWN, host
            assert open_stream(place, host, f"http://{host}") == OWN, host
            for origin in ("http://evil.example", "https://127.0.0.1.evil.example", "null", "http://[", ""):
                assert open_stream(place, host, origin) == FOREIGN, (host, origin)
        for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", "192.0.2.1", "", "["):
            for said in (None, f"http://{host}", "http://evil.example", f"http://localhost:{port}"):
                assert open_stream(place, host, said) == FOREIGN, (host, said)
        for page in ("/", "/_stcore/health", "/_stcore/host-config", "/_stcore/metrics", "/media/x", "/app/static/x"):
            assert ask(place, page, f"localhost:{port}", None, "Connection: close") in (200, 404)
            assert ask(place, page, "evil.example", None) == FOREIGN
            assert ask(place, page, f"localhost:{port}", "http://evil.example") == FOREIGN
        upload = "/_stcore/upload_file/session/file"
        assert ask(place, upload, f"localhost:{port}", "http://evil.example", method="PUT") == FOREIGN
        # Without the page's token, Streamlit's own check.
        assert ask(place, upload, f"localhost:{port}", None, "Content-Length: 0", method="PUT") == 403
    found = [json.loads(line) for line in heard.read_text().splitlines()]
    # The spy hears: the address to listen on was looked up.
    assert ["socket.getaddrinfo", "127.0.0.1"] in found
    assert [name for _, name in found if not name.startswith(("127.0.0.1", "('127.0.0.1'"))] == []


@pytest.mark.parametrize(
    ("host", "origin", "on_loopback", "elsewhere"),
    [
        ("localhost:7860", None, True, True),
        ("localhost:9999", "http://localhost:9999", True, True),
        ("127.8.9.1", "https://127.8.9.1", True, True),
        ("[::1]:7860", "http://[::1]:7860", True, True),
        ("node7.cluster:7860", "http://node7.cluster:7860", False, True),
        ("node7.cluster:7860", None, False, True),
        ("192.0.2.1", None, False, True),
        ("localhost:7860", "http://localhost:7861", False, False),
        ("[::1]:7860", "http://[::1]:9999", False, False),
        ("node7.cluster", "http://evil.example", False, False),
        ("evil.example/x", "http://evil.example", False, False),
        ("localhost@evil.example", None, False, True),
        ("evil.example", "null", False, False),
    ],
)
def test_the_guard_compares_host_and_origin(host: str, origin: str | None, on_loopback: bool, elsewhere: bool) -> None:
    for only_loopback, answered in ((True, on_loopback), (False, elsewhere)):
        for kind in ("http", "websocket"):
            assert _is_answered(kind, host, origin, only_loopback) == answered


def _is_answered(kind: str, host: str, origin: str | None, only_loopback: bool) -> bool:
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()), *([] if origin is None else [(b"origin", origin.encode())])]
    running = SameOrigin(app, only_loopback)({"type": kind, "headers": headers}, None, send)
    with pytest.raises(StopIteration):
        running.send(None)
    if not reached:
        assert sent[0].get("status", sent[0].get("code")) in (403, 1008)
    return bool(reached)
