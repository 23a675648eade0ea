import ast
import builtins
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from dat_lightning.cli import explore_parser, main
from dat_lightning.explore import serving
from dat_lightning.explore.serving import address, explore, free_port, is_loopback, served
from dat_lightning.weights import shipped_models
from tests.test_cli import STAGE2, TINY, refusal


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Lets everything happen but the serving; holds the script and the settings that Streamlit got."""
    starlette = pytest.importorskip("streamlit.starlette")
    calls: list[tuple[str, dict[str, Any]]] = []

    class Page:
        def __init__(self, script: str, middleware: list[Any]) -> None:
            self.script = script
            (self.guard,) = middleware

        def run(self, config: dict[str, Any]) -> None:
            calls.append((self.script, {**config, **self.guard.kwargs}))

    monkeypatch.setattr(starlette, "App", Page)
    return calls


def test_the_command_serves_on_this_machine_alone_and_tells_nobody(
    checkpoint: Path, started: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["explore", "--ckpt_path", str(checkpoint), "--port", "0"])
    ((script, options),) = started
    assert Path(script).is_file()
    assert options["server.address"] == "127.0.0.1"
    assert options["browser.gatherUsageStats"] is False
    assert options["server.headless"] is True
    assert options["only_loopback"] is True
    port = options["server.port"]
    assert port > 0
    assert f"{checkpoint} is open at http://127.0.0.1:{port} (Ctrl-C stops)" in capsys.readouterr().out
    assert [opened.name for opened in served()] == [str(checkpoint)]


def test_without_arguments_the_models_that_ship_are_served(
    started: list[tuple[str, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Nothing here can stand in a model's way.
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    main(["explore", "--port", "0"])
    assert len(started) == 1
    assert tuple(opened.name for opened in served()) == shipped_models()
    for opened in served():
        assert opened.examples is not None
        assert opened.explorer.seeds is not None
        assert opened.notes == ()
    said = capsys.readouterr().out
    assert f"{', '.join(shipped_models())} {'is' if len(shipped_models()) == 1 else 'are'} open at http://127" in said


def test_another_address_is_warned_of(checkpoint: Path, started: list[tuple[str, dict[str, Any]]]) -> None:
    with pytest.warns(UserWarning, match=r"--host 0\.0\.0\.0 can be reached from other machines"):
        explore(str(checkpoint), host="0.0.0.0", port=0)
    assert started[0][1]["server.address"] == "0.0.0.0"
    assert started[0][1]["only_loopback"] is False


def test_configurations_may_be_given_several_times(
    bare_checkpoint: Path, started: list[tuple[str, dict[str, Any]]]
) -> None:
    main(["explore", "--ckpt_path", str(bare_checkpoint), "--config", STAGE2, "--config", TINY, "--port", "0"])
    assert served()[0].examples is not None


def test_without_the_extra_a_sentence_names_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("streamlit", "starlette"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    said = refusal(capsys, "explore", "--ckpt_path", str(checkpoint))
    assert said == "explore needs its page's library: pip install 'dat-lightning[explore]'"


@pytest.mark.usefixtures("started")
def test_mistakes_cost_one_sentence(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("no weights")
    path = ["--ckpt_path", str(checkpoint)]
    for args, said in (
        (["--config", "run.yaml", "--port", "0"], "config and image_size say what a checkpoint is about: name one"),
        (["--image_size", "8", "--port", "0"], "name one with --ckpt_path"),
        (["--ckpt_path", "nowhere.ckpt", "--port", "0"], "no checkpoint at nowhere.ckpt"),
        (["--ckpt_path", str(tmp_path / "text.ckpt"), "--port", "0"], "not a readable checkpoint"),
        ([*path, "--port", "70000"], "port must lie in 0 … 65535, got 70000"),
        ([*path, "--port", "many"], "port"),
        ([*path, "--host", "no.such.host.invalid"], "cannot listen on host 'no.such.host.invalid', port 7860"),
        ([*path, "--port", "0", "--device", "abacus"], "device must be one that torch can use here"),
        ([*path, "--colour", "red"], "colour"),
    ):
        assert said in refusal(capsys, "explore", *args)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"cannot listen on host '127\.0\.0\.1', port {port}: .* --port \(0 for any\)"
        ):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


def test_the_commands_on_the_page_are_accepted() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pages" / "explore.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:dat-lightning|-m dat_lightning) explore (--.*)", text.replace("\\\n", " "))
    assert len(found) == 2
    parsed = [explore_parser().parse_args(line.split()) for line in found]
    assert parsed[0].port == 7860
    assert parsed[1].device == "cuda"


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_command_is_in_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "explore             Serves a web page" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "inside", "shown"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:1"),
        ("127.3.0.1", True, "http://127.3.0.1:1"),
        ("localhost", True, "http://localhost:1"),
        ("::1", True, "http://[::1]:1"),
        ("0.0.0.0", False, "http://127.0.0.1:1"),
        ("::", False, "http://[::1]:1"),
        ("192.168.0.7", False, "http://192.168.0.7:1"),
        ("example.org", False, "http://example.org:1"),
    ],
)
def test_addresses(host: str, inside: bool, shown: str) -> None:
    assert is_loopback(host) == inside
    assert address(host, 1) == shown


def test_the_package_is_imported_without_the_extra() -> None:
    room = Path(serving.__file__).parent
    page = {"page", "app", "same_origin", "filling", "brush", "parts"}
    for path in room.glob("*.py"):
        imported = {name for node in ast.parse(path.read_text(encoding="utf-8")).body for name in _imports(node)}
        packages = {name.split(".")[0] for name in imported}
        assert not packages & {"streamlit", "altair", "starlette"} or path.stem in page
        assert not imported & {f"dat_lightning.explore.{name}" for name in page} or path.stem in page


def _imports(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
