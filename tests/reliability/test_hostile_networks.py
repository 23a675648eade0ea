"""A file decides neither how large a network is built nor which classes are: within limits of memory and time."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_lightning import AUCCurriculum, DualAdversarialModule, EnergyModel, RobustClassifierModule, SmallResNet
from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.backbones.sizes import build_within
from dat_lightning.core.errors import InputError
from dat_lightning.weights.classes import check_classes
from tests import tiny
from tests.reliability.test_hostile_files import in_a_child

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "depth": ("WideResNet", {"depth": 6 * 10**6 + 4}),
    "blocks": ("SmallResNet", {"widths": [1] * 20_000}),
    "widths": ("SmallResNet", {"widths": [100_000] * 3}),
    "classes": ("SmallResNet", {"widths": [4, 8], "num_classes": 10**10}),
    "beyond_any_list": ("WideResNet", {"depth": 10**15 + 4}),
    "as_wide_as_memory": ("SmallResNet", {"widths": [40_000, 40_000]}),
    "a_timm_network": ("timm_model", {"name": "convnext_tiny", "num_classes": 10**8}),
}

CHILD = """
import json, resource, sys
from pathlib import Path
import torch
import timm
from dat_lightning import EnergyModel, RobustClassifierModule
from dat_lightning.explore import open_checkpoint
from tests import tiny

folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
model = tiny.energy_model()
model.save_pretrained(folder / "model")
torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
allowed = pages * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
said = {{}}
for name, (network, arguments) in sizes.items():
    description = {{"name": network, "arguments": arguments}}
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({{**config, "backbone": description}}))
    backbone = {{"class_path": f"dat_lightning.{{network}}", "init_args": arguments}}
    settings = {{
        "_class_path": "dat_lightning.RobustClassifierModule",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "energy_model": {{"class_path": "dat_lightning.EnergyModel", "init_args": {{"backbone": backbone}}}},
    }}
    weights = {{f"energy_model.{{key}}": value for key, value in model.state_dict().items()}}
    entries = {{"state_dict": weights, "hyper_parameters": settings, "pytorch-lightning_version": "2.6.6"}}
    torch.save(entries, folder / "run.ckpt")
    readers = {{
        "folder": lambda: EnergyModel.from_pretrained(folder / "model"),
        "page": lambda: open_checkpoint(folder / "run.ckpt"),
        "module": lambda: RobustClassifierModule.load_from_checkpoint(folder / "run.ckpt"),
    }}
    for reader, read in readers.items():
        try:
            read()
            said[f"{{name}} {{reader}}"] = "read"
        except ValueError as error:
            said[f"{{name}} {{reader}}"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import json

    folder = tmp_path_factory.mktemp("networks")
    return dict(in_a_child(CHILD, str(folder), json.dumps(SIZES), megabytes=700))


@pytest.mark.parametrize("reader", ["folder", "page", "module"])
@pytest.mark.parametrize("name", SIZES)
def test_a_network_is_not_built_beyond_its_file(name: str, reader: str, said: dict[str, str]) -> None:
    parts = ["larger than its file", "weights in all", "more than 2000 settings"]
    # Before the file is asked how many weights it has for them, the system has none.
    parts += ["can't allocate memory"] * (reader == "module")
    assert any(part in said[f"{name} {reader}"] for part in parts), said[f"{name} {reader}"]


def test_a_network_of_the_files_size_is_built() -> None:
    model = tiny.energy_model()
    sizes = [value.numel() for value in model.state_dict().values()]
    built = build_within(lambda: SmallResNet(widths=(4, 8)), sizes, {"widths": [4, 8]})
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in model.backbone.parameters())
    assert next(built.parameters()).device.type == "cpu"
    wide = torch.nn.Linear(4000, 4000)  # what is built afterwards has no limit
    assert wide.weight.numel() == 16_000_000


def test_another_thread_may_build_what_it_likes_meanwhile() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def build() -> torch.nn.Module:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.nn.Linear, 4000, 4000).result().weight.numel() == 16_000_000
        return SmallResNet(widths=(4, 8))

    build_within(build, [5000], {})


# Which classes.

NESTED = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 12) if n else 1}]" for n in range(12))


def saved(path: Path, **settings: Any) -> Path:
    backbone = {"class_path": "dat_lightning.SmallResNet", "init_args": {"widths": [4, 8]}}
    network = {"backbone": backbone, "mean": [0.3], "std": [0.35]}
    settings = {
        "_class_path": "dat_lightning.DualAdversarialModule",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "energy_model": {"class_path": "dat_lightning.EnergyModel", "init_args": network},
        **settings,
    }
    module = DualAdversarialModule(tiny.energy_model(seed=3))
    entries = {"state_dict": module.state_dict(), "hyper_parameters": settings, "pytorch-lightning_version": "2.6.6"}
    torch.save(entries, path)
    return path


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that can be imported, and leaves a trace when it is."""
    text = "from pathlib import Path\nfrom dat_lightning import AUCCurriculum\n"
    text += "Path(__file__).with_name('imported').touch()\nclass Curriculum(AUCCurriculum):\n    pass\n"
    (tmp_path / "stranger.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return tmp_path / "imported"


def test_a_class_of_the_files_own_is_imported_only_if_it_is_allowed(stranger: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", curriculum={"class_path": "stranger.Curriculum", "init_args": {"max_steps": 3}})
    with pytest.raises(InputError, match=r"names the class stranger\.Curriculum, .*; .* allowed_classes=\['stranger"):
        DualAdversarialModule.load_from_checkpoint(path)
    assert not stranger.exists()
    for allowed in ("stranger.Curriculum", "stranger"):
        module = DualAdversarialModule.load_from_checkpoint(path, allowed_classes=[allowed])
        assert type(module.curriculum).__name__ == "Curriculum"
    assert stranger.exists()


def test_a_class_that_is_loaded_is_not_made_either(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", curriculum={"class_path": "subprocess.Popen", "init_args": {"args": "true"}})
    with pytest.raises(InputError, match=r"names the class subprocess\.Popen"):
        DualAdversarialModule.load_from_checkpoint(path)


class Unregistered(torch.nn.Module):
    """Loaded, and a network, but nobody has registered it."""

    def __init__(self) -> None:
        raise AssertionError("a file has made this")


@pytest.mark.parametrize(
    "setting",
    [
        {"_class_path": "os.path"},
        {"_class_path": "stranger.Module"},
        {"_instantiator": "os.system"},
        {"contrastive_rule": {"class_path": "dat_lightning.explore.explore"}},
        # What makes objects of settings imports a text wherever a class or function is expected.
        *(
            {name: "stranger.Curriculum"}
            for name in ("optimizer", "lr_scheduler", "attack_rule", "execution", "curriculum")
        ),
        {"energy_model": "stranger.Curriculum"},
        {"energy_model": {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": "stranger.Curriculum"}}},
        {"energy_model": {"init_args": {"backbone": {"class_path": "Unregistered"}}}},
        {"energy_model": {"init_args": {"backbone": "Unregistered"}}},
        {"lr_scheduler": "antigravity.geohash"},
        *(
            {"lr_scheduler": {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": {"lr_lambda": value}}}
            for name in ("LambdaLR", "MultiplicativeLR")
            for value in ("stranger.Curriculum", ["stranger.Curriculum"])
        ),
        {"threat_model": {"norm": "L2", "eps": "stranger.Curriculum"}},
        {"contrastive_rule": {"class_path": "dat_lightning.nothing.at.all"}},
        {"x": [{"y": ({"class_path": "antigravity.x"},)}]},
    ],
)
def test_no_name_is_believed(setting: dict[str, Any], stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the file (names the class|wants to be made by)"):
        DualAdversarialModule.load_from_checkpoint(saved(tmp_path / "a.ckpt", **setting))
    assert not stranger.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfex\x00", "has no hyperparameters that can be read"),
        (b"a: [", "has no hyperparameters that can be read"),
        (b"energy_model: {class_path: stranger.Net}", r"names the class stranger\.Net"),
        (
            "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 12) if n else 1}]" for n in range(12)]).encode(),
            "settings",
        ),
    ],
)
def test_a_file_of_hyperparameters_is_believed_as_little(
    text: bytes, message: str, stranger: Path, tmp_path: Path
) -> None:
    (tmp_path / "hparams.yaml").write_bytes(text)
    with pytest.raises(InputError, match=message):
        DualAdversarialModule.load_from_checkpoint(saved(tmp_path / "a.ckpt"), None, tmp_path / "hparams.yaml")
    assert not stranger.exists()


def test_what_the_command_line_saves_is_made(tmp_path: Path) -> None:
    rule = {"class_path": "dat_lightning.RandomLength", "init_args": {"spread": 0.3}}
    path = saved(
        tmp_path / "a.ckpt",
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}},
        lr_scheduler={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}},
        contrastive_rule=rule,
        curriculum={"class_path": "dat_lightning.AUCCurriculum", "init_args": {"max_steps": 7}},
    )
    stem = tiny.energy_model(seed=3).state_dict()["backbone.stem.weight"]
    with path.open("rb") as opened:
        for source in (path, str(path), opened, f"file://{path}"):
            module = DualAdversarialModule.load_from_checkpoint(source)
            assert (module.curriculum.max_steps, type(module.contrastive_rule).__name__) == (7, "RandomLength")
            assert torch.equal(module.energy_model.state_dict()["backbone.stem.weight"], stem)


def test_a_network_of_ones_own_that_is_registered_is_known(tmp_path: Path) -> None:
    @register_architecture("OfThisTest")
    class OfThisTest(SmallResNet):
        def __init__(self, width: int = 4) -> None:
            super().__init__(widths=(width, 8))

    setattr(sys.modules[__name__], "OfThisTest", OfThisTest)  # noqa: B010 - where its name says it is
    by_lightning = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    check_classes({"x": {"class_path": f"{__name__}.OfThisTest"}, **by_lightning}, (), DualAdversarialModule)
    with pytest.raises(InputError, match="names the class"):
        check_classes({"x": {"class_path": f"{__name__}.Path"}, **by_lightning}, (), DualAdversarialModule)


class WithNotes(DualAdversarialModule):
    """Has settings of its own, one of them without a type."""

    def __init__(self, energy_model: EnergyModel, note="some.note", **shared: Any) -> None:  # type: ignore[no-untyped-def]
        super().__init__(energy_model=energy_model, **shared)
        self.save_hyperparameters(ignore=["energy_model"])
        self.note = note


def test_settings_of_ones_own_are_given_back_as_they_are(tmp_path: Path) -> None:
    module = WithNotes(tiny.energy_model(), note="another.note")
    trainer = tiny.trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = WithNotes.load_from_checkpoint(tmp_path / "a.ckpt", energy_model=tiny.energy_model(seed=1))
    assert again.note == "another.note"


def test_no_weights_are_fetched_at_a_files_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    import timm

    def create(name: str, **arguments: Any) -> torch.nn.Module:
        asked.append(arguments)
        return torch.nn.Flatten()

    monkeypatch.setattr(timm, "create_model", create)
    backbone = {"class_path": "dat_lightning.timm_model", "init_args": {"name": "resnet18", "pretrained": True}}
    network = {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": backbone}}
    with pytest.raises(RuntimeError):  # weights of another network
        DualAdversarialModule.load_from_checkpoint(saved(tmp_path / "a.ckpt", energy_model=network))
    assert {each["pretrained"] for each in asked} == {False}


def test_who_allows_code_is_not_asked(stranger: Path, tmp_path: Path) -> None:
    import stranger as loaded  # type: ignore[import-not-found]

    path = saved(tmp_path / "a.ckpt", curriculum={"class_path": "stranger.Curriculum"})
    module = DualAdversarialModule.load_from_checkpoint(path, weights_only=False)
    assert isinstance(module.curriculum, loaded.Curriculum | AUCCurriculum)
    assert isinstance(module, DualAdversarialModule)
    assert not isinstance(module, RobustClassifierModule)
    assert isinstance(module.energy_model, EnergyModel)
