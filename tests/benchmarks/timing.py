"""Times of contenders that take turns, their memory, and what the device could do."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contenders import Call

MIB = 2**20


@dataclass
class Timing:
    """Seconds of one contender, one value per round.

    Attributes:
        first: Elapsed time of the first, untimed call, in which compiling happens.
        wall: Elapsed time.
        cpu: Processor time of all threads, which other programs on the machine disturb less.
        memory: Largest memory of the first two calls in bytes, more than there was before the contender was made: so
            with weights, optimiser and recorded graphs. NaN on a CPU, which does not give back what was used before.
        result: What the first call gave.
    """

    first: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float = float("nan")
    result: Tensor | None = None


def take_turns(contenders: Mapping[str, Callable[[], Call]], rounds: int, device: str = "cpu") -> dict[str, Timing]:
    """Returns the times of ``rounds`` calls of each contender after two others; one that lacks memory is left out.

    They take turns, in an order that is reversed from round to round, so that whatever else the machine does falls on
    all of them alike.

    Args:
        contenders: Make what is called.
        rounds: Calls of each.
        device: Where they compute.
    """
    calls: dict[str, Call] = {}
    timings: dict[str, Timing] = {}
    for name, make in contenders.items():
        with _dropped_without_memory(name, calls, timings):
            before = _reset_peak(device)
            calls[name] = make()
            first, _, result = _timed(calls[name], 0, device)
            calls[name](0)
            timings[name] = Timing(first, memory=_peak(device) - before, result=result)
    for number in range(rounds):
        order = list(calls)
        for name in order if number % 2 == 0 else reversed(order):
            with _dropped_without_memory(name, calls, timings):
                wall, cpu, _ = _timed(calls[name], number, device)
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
    return timings


@contextmanager
def _dropped_without_memory(name: str, calls: dict[str, Call], timings: dict[str, Timing]) -> Iterator[None]:
    """Removes a contender for which there is not enough memory on the device."""
    try:
        yield
    except Exception as error:
        if not _is_lack_of_memory(error):
            raise
        calls.pop(name, None)
        timings.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what a compiler wraps in one, says that the device has no room."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


def matmul_rate(device: str, dtype: torch.dtype, size: int, repetitions: int = 15) -> float:
    """Returns the floating-point operations per second of a dense matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [_timed(lambda _: a @ b, 0, device)[0] for _ in range(repetitions + 3)]
    return 2 * size**3 / min(times[3:])


def convolution_rate(device: str, dtype: torch.dtype, channels: int, repetitions: int = 15) -> float:
    """Returns the floating-point operations per second of a wide 3×3 convolution, the best of several.

    On some CPUs it is far above that of a matrix product, which another library computes.
    """
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device, dtype)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(8, channels, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times = [_timed(lambda _: layer(x), 0, device)[0] for _ in range(repetitions + 3)]
    return 2 * 9 * channels**2 * x[:, 0].numel() / min(times[3:])


def summarise(
    timings: Mapping[str, Timing], batch: int, flops: float, rates: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Returns a row of figures per contender.

    Args:
        timings: Their times, among them "plain".
        batch: Images per call.
        flops: Floating-point operations of a call.
        rates: Contender → the device's rate in its precision.
    """
    plain = timings.get("plain")
    rows: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        median = statistics.median(timing.wall)
        rows[name] = {"median s": median}
        if plain is not None:
            ratios = [p / t for p, t in zip(plain.wall, timing.wall, strict=True)]
            rows[name] |= {
                "x plain": statistics.median(plain.wall) / median,
                "median of ratios": statistics.median(ratios),
                "x plain (cpu time)": statistics.median(plain.cpu) / statistics.median(timing.cpu),
            }
        rows[name] |= {
            "steps/s": 1 / median,
            "images/s": batch / median,
            "memory MiB": timing.memory / MIB,
            "utilisation %": 100 * flops / rates[name] / median,
            "first s": timing.first,
        }
    return rows


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the rows as text."""
    columns = next(iter(rows.values()), {}).keys()
    lines = [f"{title:40}" + "".join(f"{column:>20}" for column in columns)]
    lines += [f"  {name:38}" + "".join(f"{row[column]:>20.4g}" for column in columns) for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _timed(call: Call, number: int, device: str) -> tuple[float, float, Tensor]:
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(number)
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> float:
    """Forgets the peak of memory, and returns what is in use."""
    if torch.device(device).type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak(device: str) -> float:
    return float(torch.cuda.max_memory_allocated()) if torch.device(device).type == "cuda" else float("nan")
