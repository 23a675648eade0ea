"""bfloat16 where it is and where it is emulated, with processors that are files and torch's own restriction."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dat_lightning.speed import Execution, emulation_warning, hardware, has_bfloat16
from tests import tiny

CPU = torch.device("cpu")
X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 {}\npower management:\n\nprocessor\t: 1\n"


def processor(monkeypatch: pytest.MonkeyPatch, flags: str, machine: str = "x86_64", kernels: str = "AVX512") -> None:
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (X86.format("avx512f avx512_bf16"), {"fpu", "avx2", "avx512f", "avx512_bf16"}),
        ("processor : 0\nFeatures\t: fp asimd bf16\nCPU part : 1\n", {"fp", "asimd", "bf16"}),
        ("processor : 0\n", set()),
    ],
)
def test_flags_as_linux_tells_them(text: str, flags: set[str], tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert hardware.cpu_flags(path) == flags
    assert hardware.cpu_flags(tmp_path / "none") == set()


@pytest.mark.parametrize(
    ("flags", "machine", "kernels", "has", "fast"),
    [
        ("avx2 fma", "x86_64", "AVX2", False, False),
        ("avx2 avx512f avx512bw", "x86_64", "AVX512", False, False),
        ("avx2 avx512f avx512_bf16", "x86_64", "AVX512", True, False),
        ("avx2 avx512f amx_tile amx_bf16", "x86_64", "AVX512", True, True),
        # Restricted by ATEN_CPU_CAPABILITY.
        ("avx2 avx512f amx_tile amx_bf16", "x86_64", "AVX2", False, False),
        ("fp asimd", "aarch64", "DEFAULT", False, False),
        ("fp asimd bf16", "aarch64", "DEFAULT", True, True),
        ("", "arm64", "DEFAULT", True, True),  # not Linux: nothing is known
        ("", "AMD64", "AVX512", True, False),
    ],
)
def test_processors(
    flags: str, machine: str, kernels: str, has: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, flags, machine, kernels)
    assert has_bfloat16(CPU) is has
    assert Execution(attack_precision="auto").attack_dtype(CPU) == (torch.bfloat16 if fast else None)
    assert Execution().attack_dtype(CPU) is None
    assert Execution(attack_precision="bfloat16").attack_dtype(CPU) == torch.bfloat16
    assert has_bfloat16(torch.device("meta"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch's kernels have such names on x86-64")
def test_torch_confined_to_avx2_has_none() -> None:
    shown = "import torch; from dat_lightning.speed import has_bfloat16; print(has_bfloat16(torch.device('cpu')))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


def test_the_sentence_names_what_asks_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, "avx2")
    both = {"trainer.precision": "bf16-mixed", "execution.attack_precision": "bfloat16"}
    assert emulation_warning(both, CPU) == (
        "trainer.precision bf16-mixed and execution.attack_precision bfloat16 ask for bfloat16, which this processor"
        " does not have: torch emulates it, 11 to 15 times slower than float32; compute in float32 here"
        " (execution.attack_precision: auto takes bfloat16 only where it is fast)"
    )
    one = emulation_warning({"trainer.precision": "bf16-true", "execution.attack_precision": None}, CPU)
    assert one is not None
    assert one.startswith("trainer.precision bf16-true asks for")
    for value in ("32-true", "16-mixed", "auto", None):
        assert emulation_warning({"trainer.precision": value}, CPU) is None
    processor(monkeypatch, "avx512_bf16")
    assert emulation_warning(both, CPU) is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("attacks", [None, "auto", "bfloat16"])
def test_a_run_says_so_before_its_first_step(
    precision: str, attacks: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, "avx2")
    said: list[str] = []
    monkeypatch.setattr("dat_lightning.modules.trained.rank_zero_warn", said.append)
    module = tiny.stage1(execution=Execution(attack_precision=attacks))  # type: ignore[arg-type]
    trainer = tiny.trainer(tmp_path, precision=precision, limit_train_batches=0, limit_test_batches=0)
    trainer.fit(module, tiny.digits())
    assert len(said) == (precision == "bf16-mixed" or attacks == "bfloat16")
    assert all(("trainer.precision" in each) is (precision == "bf16-mixed") for each in said)
    assert all(("execution.attack_precision bfloat16" in each) is (attacks == "bfloat16") for each in said)
