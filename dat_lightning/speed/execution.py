"""How a module's network is run: settings that change the time and the last bits, not what is computed."""

from dataclasses import dataclass
from typing import Literal

import torch

from dat_lightning.core.ascent import AUTOCAST_DTYPES, Precision
from dat_lightning.speed.hardware import prefers_bfloat16
from dat_lightning.speed.network_forms import CompileMode


@dataclass(frozen=True)
class Execution:
    """How a module runs its network.

    Attributes:
        memory_format: Layout of convolution weights; ``channels_last`` is faster for most networks.
        compile: Whether to compile the network with ``torch.compile``, or the mode to compile it in; batches of other
            sizes than those of training, evaluation and sampling run uncompiled.
        fold_batch_norm: Whether ascents in eval mode climb a copy in which batch norm is part of the convolutions: the
            same function up to rounding, and faster.
        attack_precision: Precision of ascents' passes, in training and evaluation; by default the Trainer's. ``auto``
            is bfloat16 on devices that compute faster in it: on x86-64, processors with AMX.
    """

    memory_format: Literal["contiguous", "channels_last"] = "channels_last"
    compile: CompileMode = False
    fold_batch_norm: bool = False
    attack_precision: Precision | Literal["auto"] | None = None

    def attack_dtype(self, device: torch.device) -> torch.dtype | None:
        """Returns the type of ascents' passes on a device, ``None`` for the surrounding one."""
        if self.attack_precision == "auto":
            return torch.bfloat16 if prefers_bfloat16(device) else None
        return AUTOCAST_DTYPES[self.attack_precision]
