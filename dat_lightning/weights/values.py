"""What numbers in a file cannot be weights of a network."""

import torch
from torch import Tensor


def fault_of(name: str, value: object, target: Tensor, *, allow_nan: bool = False) -> str | None:
    """Returns why a value of a file cannot take the place of a tensor of the network, or ``None``; not for its shape.

    Args:
        name: Of the tensor in the network's state dict.
        value: From the file.
        target: The tensor.
        allow_nan: Whether numbers need not be finite.
    """
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)
    if not isinstance(value, Tensor) or not plain or value.is_nested:
        return f"{name} holds no plain numbers"
    if value.is_floating_point() != target.is_floating_point() or value.is_complex() != target.is_complex():
        return f"{name} holds {value.dtype} instead of {target.dtype}"
    if target.is_floating_point():
        # As the network will hold them: float32 has no 1e300.
        numbers = value.to("cpu", target.dtype)
        if not allow_nan and not bool(numbers.isfinite().all()):
            return f"{name} holds NaN or infinite numbers"
        if name.endswith("running_var") and bool((numbers < 0).any()):
            return f"{name} holds negative variances"
        if name.rpartition(".")[2] == "std" and bool((numbers <= 0).any()):
            return f"{name}, which images are divided by, holds numbers that are not positive"
    elif name.endswith("num_batches_tracked") and bool((value < 0).any()):
        return f"{name} holds a negative count"
    return None
