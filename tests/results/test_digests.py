"""Digests change with what they stand for, and with nothing else."""

import copy
import hashlib
from pathlib import Path

import torch
from torch import nn

from dat_lightning.results.digests import data_digest, digest, file_digest, identity, network_digest
from tests.data.test_fingerprint import Counting


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())


def test_where_a_part_ends_matters_and_so_does_its_kind() -> None:
    parts = [["ab", "c"], ["a", "bc"], ["abc"], [b"abc"], [torch.tensor([1, 2])], [torch.tensor([[1, 2]])]]
    assert len({digest(part) for part in parts}) == len(parts)  # type: ignore[arg-type]
    assert digest(["a", torch.ones(2)]) == digest(["a", torch.ones(4)[::2]])


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 9000)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_identity_is_a_name_and_a_short_digest() -> None:
    assert identity("Judge", "0123456789abcdef" * 4) == "Judge sha256:0123456789abcdef"
    assert identity("", "ab" * 32) == f"sha256:{'ab' * 8}"


def test_the_digest_of_a_small_data_set_feels_every_image() -> None:
    digests = {data_digest(Counting(7, {i: -1.0})) for i in range(7)}
    digests |= {data_digest(Counting(7)), data_digest(Counting(8))}
    assert len(digests) == 9
    assert data_digest(Counting(7)) == data_digest(Counting(7))


def test_the_digest_of_a_large_data_set_reads_evenly_spaced_images_and_the_length() -> None:
    dataset = Counting(100)
    digest = data_digest(dataset, whole_up_to=99, num_samples=10)
    assert dataset.read == list(range(0, 100, 10))
    assert digest != data_digest(Counting(100, {10: -1.0}), whole_up_to=99, num_samples=10)
    # 101 images are sampled at the same places, so only the length tells.
    longer = Counting(101)
    assert digest != data_digest(longer, whole_up_to=99, num_samples=10)
    assert longer.read == dataset.read


def test_equal_networks_have_equal_digests_whatever_their_mode() -> None:
    assert network_digest(network()) == network_digest(network().eval())
    assert network_digest(network().bfloat16()) != network_digest(network())


def test_the_digest_of_a_network_feels_weights_buffers_structure_and_class() -> None:
    base = network()
    weight, buffer = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        next(weight.parameters())[0, 0, 0, 0] += 1e-3
        next(buffer.buffers())[0] += 1e-3
    structure = nn.Sequential(*list(copy.deepcopy(base).children())[:2], nn.SiLU())

    class Sequential(nn.Sequential):
        pass

    subclass = Sequential(*copy.deepcopy(base).children())
    networks = (base, weight, buffer, structure, subclass)
    assert len({network_digest(n) for n in networks}) == len(networks)
