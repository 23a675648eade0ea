"""``~`` in any path among settings, and file systems that are chained where one place belongs."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from dat_lightning.core.errors import InputError
from dat_lightning.explore import opening
from dat_lightning.runs.paths import with_home
from tests.frozen.record import ROOT, printed
from tests.test_cli import refusal

STAGE1 = str(ROOT / "configs" / "digits" / "stage1.yaml")

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


class Images:
    def __init__(self, root: str) -> None:
        self.root = root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_settings_of_all_kinds_of_nesting_are_expanded(home: Path) -> None:
    settings = Namespace()  # type: ignore[no-untyped-call]
    settings["data.init_args.root"] = "~/data"
    settings["data.paths"] = ["~/a", Path("~/b"), Path("~no_such_user/b"), {"c": "~"}]
    others = {"number": 3, "nothing": None, "plain": "a~/b", "stranger": "~no_such_user/x"}
    settings["others"] = others
    found = with_home(settings).as_dict()
    paths = [f"{home}/a", home / "b", Path("~no_such_user/b"), {"c": str(home)}]
    assert found == {"data": {"init_args": {"root": f"{home}/data"}, "paths": paths}, "others": others}


def test_paths_of_the_command_line_and_of_files_may_begin_at_home(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "top.yaml").write_text(yaml.safe_dump({"base": "~/below.yaml"}))
    (home / "below.yaml").write_text(
        yaml.safe_dump({"base": STAGE1, "model": {"init_args": {"init_from": "~/w.ckpt"}}})
    )
    assert printed(Path("~/top.yaml"))["model"]["init_args"]["init_from"] in ("~/w.ckpt", f"{home}/w.ckpt")
    for given, said in (
        ([], f"no checkpoint at {home}/w.ckpt"),
        (["--ckpt_path=~/c.ckpt"], f"{home}/c.ckpt"),
        (["--model.init_from=~/other.ckpt"], f"no checkpoint at {home}/other.ckpt"),
    ):
        args = ("fit", "--config=~/top.yaml", "--trainer.default_root_dir=~/runs", *given)
        assert said in refusal(capsys, *args)
    # Where the run's own files went.
    assert list(home.glob("runs/logs/version_0/config.yaml"))
    assert not Path("~").exists()


def test_so_may_those_of_explore(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("streamlit", reason="needs the extra explore")
    assert f"no checkpoint at {home}/c.ckpt" in refusal(capsys, "explore", "--ckpt_path=~/c.ckpt", "--port=0")
    args = ("explore", "--ckpt_path=digits", "--config=~/no.yaml", "--port=0")
    assert f"--config names {home}/no.yaml, which is no file" in refusal(capsys, *args)
    assert "~no_such_user/x.yaml" in refusal(capsys, "fit", "--config=~no_such_user/x.yaml")
    images = {"class_path": f"{__name__}.Images", "init_args": {"root": "~/data"}}
    assert opening._instantiated(Images, "images", [images]).root == f"{home}/data"


@pytest.mark.parametrize("chain", ["x::y", "zip::run", "simplecache::s3://bucket/run"])
def test_chains_of_file_systems_are_a_sentence(chain: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": chain}}
    Path("top.yaml").write_text(yaml.safe_dump({"base": STAGE1, "trainer": {"callbacks": [saver]}}))
    for given, name in (
        (["--config=top.yaml"], "trainer.callbacks.0.init_args.dirpath"),
        ([f"--config={STAGE1}", f"--trainer.default_root_dir={chain}"], "trainer.default_root_dir"),
        ([f"--config={STAGE1}", f"--ckpt_path={chain}"], "ckpt_path"),
    ):
        said = f"{name} must be one path or URL, got {chain!r}: '::' chains file systems"
        assert said in refusal(capsys, "fit", *given)
    assert sorted(path.name for path in home.parent.iterdir()) == ["home", "top.yaml"]
    with pytest.raises(InputError, match="save_dir must be one path"):
        with_home({"save_dir": chain})
    assert with_home({"data_files": chain, "dirpath": "file:///run"})["data_files"] == chain


def test_places_that_nothing_here_reads_are_a_sentence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "trainer.default_root_dir is 'foo://bucket/run', which cannot be reached from here: Protocol not known: foo"
    assert said in refusal(capsys, "fit", f"--config={STAGE1}", "--trainer.default_root_dir=foo://bucket/run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(
            InputError, match="dirpath is 's3://bucket/run', which cannot be reached from here: Install"
        ):
            with_home({"dirpath": "s3://bucket/run"})
    assert with_home({"ckpt_path": "https://example.org/x.ckpt"}) == {"ckpt_path": "https://example.org/x.ckpt"}
