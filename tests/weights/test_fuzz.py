"""Files whose bytes were changed at random: an error or the same numbers; nothing runs, hangs or changes shape."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_lightning import EnergyModel, SmallResNet
from dat_lightning.runs import AtomicCheckpointIO
from dat_lightning.weights import load_weights
from tests import tiny

Change = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    data[place : place + chance.randint(1, 64)] = chance.randbytes(chance.randint(1, 64))


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def move(data: bytearray, chance: random.Random) -> None:
    """Puts a piece of the file elsewhere in it: what is there is valid, but not there."""
    a, b = chance.randrange(len(data)), chance.randrange(len(data))
    size = chance.randint(1, 200)
    data[b : b + size] = data[a : a + size]


def at_the_ends(data: bytearray, chance: random.Random) -> None:
    """Flips a bit where the pickle and the archive's directory are, which say what the rest means."""
    place = chance.randrange(min(3000, len(data)))
    data[place if chance.random() < 0.5 else len(data) - 1 - place] ^= 1 << chance.randrange(8)


CHANGES: list[Change] = [flip, overwrite, cut, move, at_the_ends]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real one, of a run of Stage 2."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(folder, limit_train_batches=1)
    trainer.fit(tiny.stage2(), datamodule=tiny.digits())
    AtomicCheckpointIO().save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(False), folder / "run.ckpt")
    return (folder / "run.ckpt").read_bytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def outcomes(data: bytes, path: Path, tries: int, seed: int, read: Callable[[Path], Any]) -> tuple[int, int]:
    """Changes a file again and again, and returns how often that was an error and how often it changed nothing.

    Any error but ValueError, and any other contents than the original's, fails here.
    """
    path.write_bytes(data)
    original = read(path)
    errors = harmless = 0
    for k in range(tries):
        chance = random.Random(f"{seed} {k}")
        changed = bytearray(data)
        chance.choice(CHANGES)(changed, chance)
        path.write_bytes(changed)
        try:
            found = read(path)
        except ValueError as error:
            said = str(error)
            assert str(path) in said
            errors += 1
        else:
            assert same(original, found), f"try {k} loads something else"
            harmless += 1
    return errors, harmless


# Bytes that nothing depends on, such as padding and dates, are few in a checkpoint; the rest has checksums.
@pytest.mark.parametrize(("seed", "tries"), [(0, 300), pytest.param(1, 6000, marks=pytest.mark.slow)])
def test_a_changed_checkpoint_is_an_error_or_unchanged(
    seed: int, tries: int, checkpoint: bytes, tmp_path: Path
) -> None:
    def read(path: Path) -> Any:
        return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)

    errors, harmless = outcomes(checkpoint, tmp_path / "run.ckpt", tries, seed, read)
    assert errors > 0.5 * tries
    assert harmless < 0.5 * tries


def weights_in(path: Path) -> dict[str, Any]:
    model = EnergyModel(SmallResNet(widths=(4, 8)), mean=[0.3], std=[0.35])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_weights(model, path)
    except ValueError:
        assert same(before, dict(model.state_dict()))  # all or nothing
        raise
    return dict(model.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("seed", "tries"), [(2, 150), pytest.param(3, 3000, marks=pytest.mark.slow)])
def test_changed_weights_are_an_error_or_fit(
    seed: int, tries: int, zipped: bool, checkpoint: bytes, tmp_path: Path
) -> None:
    """The archive has checksums; torch's older format has none, so numbers may differ there, but not shapes."""
    path = tmp_path / "weights.ckpt"
    if zipped:
        errors, _ = outcomes(checkpoint, path, tries, seed, weights_in)
    else:
        torch.save(tiny.energy_model().state_dict(), path, _use_new_zipfile_serialization=False)
        errors, _ = outcomes(path.read_bytes(), path, tries, seed, shapes_in)
    assert errors > 0


def shapes_in(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    found = weights_in(path)
    assert all(value.isfinite().all() for value in found.values())
    return {name: (value.shape, value.dtype) for name, value in found.items()}


@pytest.mark.parametrize(("seed", "tries"), [(4, 200), pytest.param(5, 4000, marks=pytest.mark.slow)])
def test_changed_safetensors_are_an_error_or_fit(seed: int, tries: int, tmp_path: Path) -> None:
    """Safetensors has no checksums: numbers may differ, but not names, shapes and types, nor may any be infinite."""
    tiny.energy_model().save_pretrained(tmp_path / "exported")
    data = (tmp_path / "exported" / "model.safetensors").read_bytes()
    errors, _ = outcomes(data, tmp_path / "model.safetensors", tries, seed, shapes_in)
    assert errors > 0


@pytest.mark.parametrize("length", [2**63 - 1, 10**12, 0])
def test_a_header_that_claims_to_be_long_costs_no_memory(length: int, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length or len(header)) + header)
    with pytest.raises(ValueError, match="is not a readable checkpoint: it is damaged"):
        load_weights(tiny.energy_model(), tmp_path / "model.safetensors")


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("tries", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_hostile_file_stays_harmless_when_it_is_changed(tries: int, tmp_path: Path) -> None:
    """Changes might slip a name past a filter that looks for names."""
    ran, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    for zipped in (True, False):
        torch.save({"state_dict": {}, "evil": Hostile(ran)}, path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        for k in range(tries):
            chance, changed = random.Random(k), bytearray(data)
            chance.choice(CHANGES)(changed, chance)
            path.write_bytes(changed)
            for read in (lambda p: AtomicCheckpointIO().load_checkpoint(p), weights_in):
                with pytest.raises(ValueError, match=r"evil\.ckpt"):
                    read(path)
            assert not ran.exists()
