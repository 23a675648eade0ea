"""What the hardware computes by itself: bfloat16, which torch emulates elsewhere."""

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

# Linux's names of instructions that compute with bfloat16: of x86-64 and of 64-bit Arm.
_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# torch's kernels below these use none of them, whatever the processor has.
_WITHOUT = ("DEFAULT", "NO AVX", "AVX2")


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16 by itself; ``True`` where that cannot be found out."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported
    if device.type != "cpu":
        return True
    flags = cpu_flags()
    if _is_x86() and torch.backends.cpu.get_cpu_capability() in _WITHOUT:
        return False
    return not flags or not flags.isdisjoint(_INSTRUCTIONS)


def prefers_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes faster in bfloat16 than in float32: not by AVX-512 alone, but by AMX."""
    without_amx = device.type == "cpu" and _is_x86() and "amx_bf16" not in cpu_flags()
    return has_bfloat16(device) and not without_amx


def emulation_warning(precisions: Mapping[str, str | None], device: torch.device) -> str | None:
    """Returns a sentence if a run is to compute in bfloat16 on a device that has none, ``None`` otherwise.

    Args:
        precisions: Setting → its value.
        device: Where the network runs.
    """
    chosen = [f"{name} {value}" for name, value in precisions.items() if value and value.startswith(("bf16", "bfloat"))]
    if not chosen or has_bfloat16(device):
        return None
    verb = "asks" if len(chosen) == 1 else "ask"
    where, slower = ("processor", ", 11 to 15 times slower than float32") if device.type == "cpu" else ("GPU", "")
    return (
        f"{' and '.join(chosen)} {verb} for bfloat16, which this {where} does not have: torch emulates it{slower};"
        " compute in float32 here (execution.attack_precision: auto takes bfloat16 only where it is fast)"
    )


@cache  # asked at every ascent, and the processor stays
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the names of what the processor can do, as Linux tells them; none elsewhere."""
    try:
        with cpuinfo.open(encoding="utf-8") as lines:
            found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return frozenset()
    return frozenset(found.partition(":")[2].split())


def _is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}
