"""The documentation is true: its example does what it says, its Python compiles, its names, tests and configs exist."""

import ast
import importlib
import itertools
import pkgutil
import re
import runpy
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dat_lightning import AUCCurriculum, DualAdversarialModule
from dat_lightning.cli import main
from dat_lightning.weights.hub import MODELS
from dat_lightning.weights.shipped import shipped_models
from tests import lines_of_a_step, tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "subclassing.py"
PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))
CARDS = [MODELS / name / "README.md" for name in shipped_models()]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [*PAGES, *CARDS, ROOT / "README.md"]}
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
STEPS, STEP_SIZE = 3, 0.4


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """(the rest of the fence's first line, the code) of each fenced block of a language."""
    return [(m[3], re.sub(rf"^{m[1]}", "", m[4], flags=re.MULTILINE)) for m in FENCE.finditer(text) if m[2] == language]


def commands(text: str) -> list[list[str]]:
    """The words of each ``dat-lightning`` command, with continued lines joined."""
    lines = "\n".join(code for _, code in blocks(text, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[w.index("dat-lightning") + 1 :] for w in words if "dat-lightning" in w and "--config" in w]


# The example.


def build(module_class: type[DualAdversarialModule]) -> DualAdversarialModule:
    curriculum = AUCCurriculum(max_steps=STEPS, initial_steps=STEPS)
    return module_class(
        tiny.energy_model(),
        curriculum,
        contrastive_step_size=STEP_SIZE,
        optimizer=tiny.SGD,
        threat_model=tiny.ATTACK,
    )


@pytest.fixture(scope="module")
def subclass() -> type[DualAdversarialModule]:
    found: type[DualAdversarialModule] = runpy.run_path(str(EXAMPLE))["LogOddsModule"]
    return found


def climb_log_odds(net: nn.Module, x: Tensor, label: int) -> Tensor:
    """One image (1, C, H, W) after the steps, from the definition of the log odds and nothing of the package."""
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        p = net(x)[0].softmax(0)
        (p[label] / (p.sum() - p[label])).log().backward()
        assert x.grad is not None
        x = (x + STEP_SIZE * x.grad / x.grad.norm()).clamp(0, 1)
    return x.detach()


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 30


def test_its_contrastive_samples_follow_the_changed_objective(subclass: type[DualAdversarialModule]) -> None:
    module, base = build(subclass).eval(), build(DualAdversarialModule).eval()
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 3, 5, 8, 9])
    samples = module.contrastive_samples(x, y)
    expected = torch.cat([climb_log_odds(module.energy_model, x[i : i + 1], int(y[i])) for i in range(6)])
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-4)
    apart = (samples - base.contrastive_samples(x, y)).flatten(1).norm(dim=1)
    assert apart.min() > 0.05  # of at most 2 · 3 · 0.4


def test_it_trains(subclass: type[DualAdversarialModule], tmp_path: Path) -> None:
    """Two batches of each class: other contrastive samples give other weights."""
    weights = []
    for module_class in (subclass, DualAdversarialModule):
        module = build(module_class)
        before = [p.detach().clone() for p in module.parameters()]
        trainer = tiny.trainer(tmp_path, limit_train_batches=2)
        trainer.fit(module, datamodule=tiny.digits())
        assert trainer.global_step == 2
        assert all(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
        weights.append([p.detach() for p in module.parameters()])
    assert any(not torch.allclose(a, b) for a, b in zip(*weights, strict=True))


def test_it_is_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    figures = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert figures["train/contrastive_steps"] == 5
    assert figures["train/loss"] > 0
    assert not list(tmp_path.rglob("*.ckpt"))


# The pages.


@pytest.mark.parametrize("page", TEXTS)
def test_python_on_the_pages_compiles_and_imports_what_exists(page: str) -> None:
    for _, code in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(code, page)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dat_lightning"):
                module = importlib.import_module(node.module or "")
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page}: {node.module} has no {missing}"


def test_python_for_other_projects_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of one page, from top to bottom, beside folders of pictures as it describes them."""
    generator = np.random.default_rng(0)
    for folder, count in {"train": 8, "val": 2, "test": 2, "ood_train": 8, "ood_held_out": 2}.items():
        for label in range(4):
            path = tmp_path / "images" / folder / str(label)
            path.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "extending"}
    for _, code in blocks(TEXTS["docs/pages/extending.md"], "python"):
        exec(compile(code, "extending.md", "exec"), names)
    images = torch.stack([names["Folders"]("images").held_out_seeds()(i)[0] for i in range(8)])
    assert 0.3 < names["brightness"].value < 0.7
    assert names["brightness"].value != pytest.approx(float(images.mean()), abs=1e-4)
    assert list(names["fid"].scores) == [5]
    f = names["classifier"]
    own = names["y"].unsqueeze(1)
    assert (f(names["generated"]).gather(1, own) > f(names["x"]).gather(1, own)).all()
    assert (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6


def test_python_for_edits_runs() -> None:
    """By the page alone, and it restores: nearer to the originals than the smoothest filling."""
    names: dict[str, Any] = {}
    for _, code in blocks(TEXTS["docs/pages/results/editing.md"], "python"):
        exec(compile(code, "editing.md", "exec"), names)
    x, mask, start = names["x"], names["mask"], names["inpainting"](names["x"], names["mask"]).start
    errors = [float((image - x).square().mean()) for image in (names["completed"], names["guessed"], start)]
    assert errors == sorted(errors)
    assert all(torch.equal(names[name][..., ~mask], x[..., ~mask]) for name in ("completed", "guessed"))


@pytest.mark.parametrize("page", TEXTS)
def test_names_on_the_pages_exist(page: str) -> None:
    for name in sorted(set(re.findall(r"\bdat_lightning(?:\.[A-Za-z_]\w*)+", TEXTS[page]))):
        assert pkgutil.resolve_name(name) is not None


def test_functions_of_the_numerics_exist() -> None:
    """That page leaves the package's name out."""
    names = set(re.findall(r"\| [^|]*`((?:core\.|[A-Z])[\w.]*)`[^|]* \|", TEXTS["docs/pages/numerics.md"]))
    assert len(names) > 20
    for name in sorted(names):
        pkgutil.resolve_name(f"dat_lightning.{name}")


def test_tests_and_files_named_on_the_pages_exist() -> None:
    tests = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for page, text in TEXTS.items():
        named = set(re.findall(r"`(test_\w+)`", text))
        assert named <= tests, f"{page}: {sorted(named - tests)}"
        for path in re.findall(r"`((?:configs|dat_lightning|docs|tests)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
    assert len(re.findall(r"`(test_\w+)`", TEXTS["docs/pages/numerics.md"])) > 30


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if commands(text)])
def test_commands_on_the_pages_are_accepted(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command with a configuration parses; files that a page shows by their name count as existing."""
    for title, code in blocks(TEXTS[page], "yaml"):
        if name := re.search(r'title="([\w.-]+\.yaml)"', title):
            (tmp_path / name[1]).write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    for words in {tuple(words): words for words in commands(TEXTS[page])}.values():
        for option, value in itertools.pairwise(words):
            assert option != "--config" or Path(value).is_file(), f"{page}: no {value}"
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        said = capsys.readouterr()
        assert stop.value.code == 0, f"{page}: {shlex.join(words)}: {said.err}"


def test_the_checks_can_fail() -> None:
    text = "```bash\ndat-lightning fit \\\n  --config a.yaml # b\n```\n\n  ```python\n  x = 1\n    y\n  ```\n"
    assert commands(text) == [["fit", "--config", "a.yaml"]]
    ((_, code),) = blocks(text, "python")
    with pytest.raises(SyntaxError):
        ast.parse(code)
    with pytest.raises(AttributeError):
        pkgutil.resolve_name("dat_lightning.PGDSamplers")
    assert isinstance(pkgutil.resolve_name("dat_lightning.demo"), ModuleType)


def test_the_page_says_how_much_code_a_step_is() -> None:
    assert lines_of_a_step.table() in TEXTS["docs/pages/extending.md"]
    counted = [code for code, _ in lines_of_a_step.counts().values()]
    assert len(counted) == 6
    assert sum(counted) <= 400, "docs/pages/extending.md says 400 lines: what is not the step belongs elsewhere"


def test_a_line_of_code_is_neither_text_nor_import() -> None:
    source = '''"""Module,
over two lines."""

import os


def f(x: int) -> int:
    """Function."""
    # Why.
    return g(
        x,  # the argument
    )
'''
    assert lines_of_a_step.code_lines(source) == 4


def test_a_new_method_is_one_small_file() -> None:
    """JEM: in under 120 lines of code."""
    assert lines_of_a_step.code_lines((lines_of_a_step.PACKAGE / "modules" / "jem.py").read_text("utf-8")) < 120
