"""Who is answered: a browser that shows this server's own page, and programs; never the page of another site."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from dat_lightning.explore.serving import is_loopback


class SameOrigin:
    """Refuses requests and WebSockets of other sites' pages before Streamlit sees them.

    A page says in ``Origin`` where it comes from, and that must be what the request names as ``Host``; whatever else it
    says, Streamlit would look up this machine's public address at another host to compare. Only a site whose name is
    made to lead here (DNS rebinding) has both alike: so where the server is on a loopback address, ``Host`` must be one
    too. Ports do not matter, they may be forwarded.

    Args:
        app: The server.
        only_loopback: Whether ``Host`` must be a loopback address.
    """

    def __init__(self, app: ASGIApp, only_loopback: bool) -> None:
        self.app = app
        self.only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or refuses with status 403."""
        app: ASGIApp = self.app
        if scope["type"] in ("http", "websocket") and not self._is_own(Headers(scope=scope)):
            refusal = "this server answers its own page alone"
            app = PlainTextResponse(refusal, 403) if scope["type"] == "http" else WebSocketClose(1008, refusal)
        await app(scope, receive, send)

    def _is_own(self, headers: Headers) -> bool:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname
            place = urlsplit(headers.get("origin", f"//{host}")).netloc
        except ValueError:
            return False
        return place == host and (not self.only_loopback or is_loopback(name or ""))
