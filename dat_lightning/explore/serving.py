"""The server of the page: on this machine alone unless told otherwise, and without a word to anybody else."""

import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from dat_lightning.core.errors import InputError
from dat_lightning.explore.markup import FIRST
from dat_lightning.explore.opening import Opened, open_checkpoint
from dat_lightning.explore.uploads import MAX_MEGABYTES
from dat_lightning.weights.hub import MODELS
from dat_lightning.weights.shipped import shipped_models

logger = logging.getLogger(__name__)

_served: list[Opened] = []  # one, or the models that ship

# Streamlit's settings; those in a user's own files count less.
_OPTIONS = {
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",
    "client.toolbarMode": "minimal",
    "global.developmentMode": False,
    "logger.hideWelcomeMessage": True,
    "logger.level": "warning",
    "runner.magicEnabled": False,
    # Without a look for a display or a browser, and without a look for an address outside.
    "server.headless": True,
    "server.fileWatcherType": "none",
    "server.maxUploadSize": MAX_MEGABYTES,
    "server.runOnSave": False,
    "theme.dark.primaryColor": FIRST,
    "theme.light.primaryColor": FIRST,
}


def explore(
    ckpt_path: str | None = None,
    config: Sequence[str] = (),
    image_size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "cpu",
) -> None:
    """Serves a web page to look at a checkpoint: readings of images, counterfactuals and samples.

    Args:
        ckpt_path: Checkpoint of a run, folder that export wrote, name of a model that ships, or, with a configuration,
            any weights; by default all models that ship, of which the page lets you choose.
        config: Configuration of the run, for its network and data; may be given several times, later ones win.
        image_size: Height and width of the images, where nothing else says it.
        host: Address to listen on; the default can be reached from this machine alone.
        port: Port to listen on; 0 chooses a free one.
        device: Where to compute, such as cpu or cuda.

    Raises:
        InputError: If the extra ``explore`` is not installed.
        FileNotFoundError: If a file is missing.
        InputError: If the checkpoint is damaged, of another kind, or does not fit; or an argument is wrong, or its
            address cannot be listened on.
    """
    try:
        from starlette.middleware import Middleware
        from streamlit.starlette import App

        from dat_lightning.explore.same_origin import SameOrigin
    except ModuleNotFoundError as error:
        raise InputError("explore needs its page's library: pip install 'dat-lightning[explore]'") from error
    port = free_port(host, port)
    if ckpt_path is None and (config or image_size is not None):
        raise InputError("config and image_size say what a checkpoint is about: name one with --ckpt_path")
    paths = [MODELS / name for name in shipped_models()] if ckpt_path is None else [ckpt_path]
    opened = [open_checkpoint(path, config, image_size, device) for path in paths]
    if not is_loopback(host):
        rank_zero_warn(
            f"--host {host} can be reached from other machines, and the page asks nobody for a password: whoever"
            " reaches it can use this machine's time"
        )
    _served[:] = opened
    names = ", ".join(each.name for each in opened)
    logger.info("%s %s open at %s (Ctrl-C stops)", names, "is" if len(opened) == 1 else "are", address(host, port))
    script = str(Path(__file__).with_name("app.py"))
    page = App(script, middleware=[Middleware(SameOrigin, only_loopback=is_loopback(host))])
    arguments, sys.argv = sys.argv, [script]
    try:
        page.run(config={**_OPTIONS, "server.address": host, "server.port": port})
    except KeyboardInterrupt:
        pass  # the way to stop it
    finally:
        sys.argv = arguments


def served() -> tuple[Opened, ...]:
    """Returns what this process serves: a checkpoint, or the models that ship.

    Raises:
        InputError: If it serves none: the page was started in another way than by :func:`explore`.
    """
    if not _served:
        raise InputError("the page belongs to a command: dat-lightning explore")
    return tuple(_served)


def free_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0.

    Raises:
        InputError: If it is no port, or the address cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port must lie in 0 … 65535, got {port}")
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # As the server does: connections of an earlier one that are still closing do not matter.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            chosen: int = listener.getsockname()[1]
            return chosen
    except OSError as error:
        raise InputError(
            f"cannot listen on host {host!r}, port {port}: {error.strerror}; choose another with --port (0 for any)"
        ) from error


def is_loopback(host: str) -> bool:
    """Returns whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(host: str, port: int) -> str:
    """Returns what to type into a browser on this machine."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
    shown = everywhere.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
