import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import nn

from dat_lightning.data.digits import load_images, split_indices
from dat_lightning.features import DigitsJudge
from dat_lightning.results.digests import network_digest


def test_the_judge_of_digits_is_a_support_vector_machine_on_the_original_images() -> None:
    images, labels = load_images()
    test = torch.as_tensor(split_indices(0)["test"])
    read = DigitsJudge()(images[test]).argmax(1)
    raw = load_digits()
    train = split_indices(0)["train"]
    machine = SVC(C=10, gamma="scale").fit(raw.data[train] / 16, raw.target[train])
    smaller = nn.functional.avg_pool2d(images[test], 2).flatten(1).double().numpy()
    assert read.tolist() == machine.predict(smaller).tolist()
    assert (read == labels[test]).double().mean() > 0.97


def test_judges_are_told_apart_by_what_they_learnt() -> None:
    assert network_digest(DigitsJudge()) == network_digest(DigitsJudge())
    assert "support_vectors" in DigitsJudge().state_dict()
