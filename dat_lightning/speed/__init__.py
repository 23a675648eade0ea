"""Compiled and folded forms of a network: the same function, faster."""

from dat_lightning.speed.execution import Execution
from dat_lightning.speed.folding import FoldedNetwork
from dat_lightning.speed.hardware import emulation_warning, has_bfloat16
from dat_lightning.speed.network_forms import CompiledNetwork, CompileMode, NetworkForms

__all__ = [
    "CompileMode",
    "CompiledNetwork",
    "Execution",
    "FoldedNetwork",
    "NetworkForms",
    "emulation_warning",
    "has_bfloat16",
]
