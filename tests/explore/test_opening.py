from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dat_lightning import (
    DigitsDataModule,
    DualAdversarialModule,
    EnergyModel,
    Momentum,
    Perceptron,
    RandomLength,
    SmallResNet,
    Steepest,
    pretrained,
)
from dat_lightning.core.errors import InputError
from dat_lightning.explore import open_checkpoint, opening
from dat_lightning.features import DigitsJudge
from dat_lightning.weights import load_weights
from tests.explore.conftest import network
from tests.recipes import write_folders
from tests.test_cli import STAGE2, STEP_SIZE, TINY

NOISE = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def answers(opened: Any) -> torch.Tensor:
    return torch.stack([opened.explorer.classify(x).logits for x in NOISE])


def test_a_run_s_checkpoint_gives_averaged_weights_data_and_first_steps(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    with torch.no_grad():
        averaged, raw = (network(checkpoint, entry)(NOISE) for entry in ("state_dict", "current_model_state"))
    torch.testing.assert_close(answers(opened), averaged, atol=1e-6, rtol=1e-5)
    assert float((answers(opened) - raw).abs().max()) > 1e-4
    assert opened.notes == ()
    assert opened.network.startswith("SmallResNet, ")
    # Four times the attack's radius, and step and rule of contrastive samples.
    assert (opened.eps, opened.step_size, opened.rule) == (
        4.0,
        STEP_SIZE,
        RandomLength(0.3, Momentum(0.4, nesterov=True)),
    )
    assert opened.explorer.class_names == tuple("0123456789")


def test_samples_of_a_run_begin_with_as_many_steps_as_its_chain_has_at_most(checkpoint: Path, tmp_path: Path) -> None:
    """More than the network was trained against are beyond what it knows; of a sweep the page takes the middle."""
    contents = torch.load(checkpoint, weights_only=True)
    assert open_checkpoint(checkpoint).num_steps == contents["hyper_parameters"]["curriculum"]["init_args"]["max_steps"]
    sampler = {"class_path": "dat_lightning.PGDSampler", "init_args": {"num_steps": [9, 0, 4, 2, 7]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [sampler]}}))
    assert open_checkpoint(checkpoint, [tmp_path / "sweep.yaml"]).num_steps == 4


def test_a_configuration_on_top_of_another_may_name_a_part_of_the_attack(checkpoint: Path, tmp_path: Path) -> None:
    network(checkpoint).save_pretrained(tmp_path / "model")
    lower = {"model": {"init_args": {"threat_model": {"norm": "L2", "eps": 1.0, "step_size": 0.5}}}}
    upper = {"base": "lower.yaml", "model": {"init_args": {"threat_model": {"eps": 0.5}}}}
    for name, contents in (("lower", lower), ("upper", upper)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(contents))
    assert open_checkpoint(tmp_path / "model", [tmp_path / "upper.yaml"]).eps == 2.0


def test_examples_are_the_test_images_each_once(checkpoint: Path) -> None:
    examples = open_checkpoint(checkpoint).examples
    assert examples is not None
    test = DigitsDataModule().in_distribution("test")
    expected = {(tuple(image.flatten().tolist()), int(label)) for image, label in (test[i] for i in range(len(test)))}
    found = [examples[i] for i in range(len(examples))]
    assert {(tuple(image.flatten().tolist()), label) for image, label in found} == expected
    assert len(found) == len(test) == 360


def test_samples_start_from_held_out_photographs(checkpoint: Path) -> None:
    starts = open_checkpoint(checkpoint).explorer.starting_images(0, 5)
    held_out, train = (DigitsDataModule().out_of_distribution(split) for split in ("held_out", "train"))
    assert held_out is not None
    assert train is not None
    crops = {tuple(held_out[i][0].flatten().tolist()) for i in range(len(held_out))}
    assert all(tuple(start.flatten().tolist()) in crops for start in starts)


def test_an_exported_folder_gives_the_same_answers_and_says_what_it_lacks(checkpoint: Path, tmp_path: Path) -> None:
    network(checkpoint).save_pretrained(tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    torch.testing.assert_close(answers(opened), answers(open_checkpoint(checkpoint)))
    assert opened.examples is None
    assert opened.explorer.image_shape == (1, 16, 16)
    assert [note.split(":")[0] for note in opened.notes] == [
        "No data are known for this checkpoint",
        "Images of 16×16 pixels are a guess from the network; --image_size changes it.",
    ]
    assert opened.explorer.generate(0, 1, 1).images.shape == (1, 1, 16, 16)
    assert open_checkpoint(tmp_path / "model", image_size=20).explorer.image_shape == (1, 20, 20)
    with_data = open_checkpoint(tmp_path / "model", [STAGE2])
    assert with_data.examples is not None
    assert with_data.notes == ()


def test_a_model_that_ships_has_images_seeds_and_first_steps_of_its_own(tmp_path: Path) -> None:
    opened = open_checkpoint("digits")
    with torch.no_grad():
        torch.testing.assert_close(answers(opened), pretrained("digits")(NOISE), atol=1e-6, rtol=1e-5)
    assert (opened.name, opened.notes, opened.at_once) == ("digits", (), True)
    assert (opened.eps, opened.step_size, opened.num_steps, opened.rule) == (4.0, 1.6, 6, RandomLength(0.5))
    assert opened.examples is not None
    assert len(opened.examples) == 360
    samples = opened.explorer.generate(3, 20, opened.num_steps, opened.step_size, rule=opened.rule).images
    assert int((DigitsJudge()(samples).argmax(1) == 3).sum()) >= 16
    # A configuration that is given stands in the place of the model's.
    config = written(tmp_path / "own.yaml", model={"init_args": {"threat_model": {"norm": "L2", "eps": 0.5}}})
    own = open_checkpoint("digits", [config])
    assert (own.eps, own.examples, len(own.notes)) == (2.0, None, 2)


def test_a_model_may_ship_with_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "tiles"
    monkeypatch.setattr(opening, "MODELS", folder.parent)
    EnergyModel(SmallResNet(num_classes=3, in_channels=3, widths=(4, 8))).save_pretrained(folder)
    for k, name in enumerate(("examples", "seeds")):
        write_folders(folder / name, 3, 2, (24, 24), k)
    examples = {"class_path": "dat_lightning.LabelledFolder", "init_args": {"root": "${folder}/examples"}}
    seeds = {"class_path": "dat_lightning.ImageFolder", "init_args": {"root": "${folder}/seeds"}}
    arguments = {"train": examples, "test": examples, "ood": seeds, "held_out": seeds, "image_size": 24}
    written(folder / "explore.yaml", data={"class_path": "dat_lightning.ImageDataModule", "init_args": arguments})
    opened = open_checkpoint(folder)
    assert (opened.name, opened.notes) == ("tiles", ())
    assert opened.explorer.image_shape == (3, 24, 24)
    assert opened.explorer.class_names == ("class0", "class1", "class2")
    assert opened.explorer.starting_images(0, 2).shape == (2, 3, 24, 24)


def test_a_configuration_says_which_network_bare_weights_belong_to(bare_checkpoint: Path) -> None:
    opened = open_checkpoint(bare_checkpoint, [STAGE2, TINY])
    with torch.no_grad():
        torch.testing.assert_close(answers(opened), network(bare_checkpoint)(NOISE), atol=1e-6, rtol=1e-5)
    assert opened.examples is not None


def written(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_a_configuration_s_own_chain_and_attack_come_first(bare_checkpoint: Path, tmp_path: Path) -> None:
    plain = []
    for path in (STAGE2, TINY):
        sections = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        plain.append(written(tmp_path / Path(path).name, model=sections["model"], data=sections["data"]))

    def first(trainer: dict[str, Any] | None = None, **arguments: Any) -> tuple[float, float]:
        own = written(tmp_path / "own.yaml", model={"init_args": arguments}, trainer=trainer)
        opened = open_checkpoint(bare_checkpoint, [*plain, own])
        return opened.step_size, opened.eps

    attack = {"norm": "L2", "eps": 0.75}
    assert first(contrastive_step_size=0.3, threat_model=attack) == (0.3, 3.0)
    sampler = {"class_path": "dat_lightning.PGDSampler", "init_args": {"step_size": 0.8}}
    assert first({"callbacks": [sampler]}, contrastive_step_size=0.3) == (0.8, 4.0)
    # One that does not say its step has the default's.
    assert first({"callbacks": [{"class_path": "dat_lightning.PGDSampler"}]}, contrastive_step_size=0.3) == (0.2, 4.0)
    assert first({"callbacks": [{"class_path": "SampleGrid"}]}, contrastive_step_size=0.3) == (0.3, 4.0)
    assert first(contrastive_step_size=0.3, threat_model={"norm": "Linf", "eps": 0.1}) == (0.3, 4.0)


def test_samples_climb_by_the_rule_of_the_run(checkpoint: Path, bare_checkpoint: Path, tmp_path: Path) -> None:
    """Of the sampler, its defaults among them; without one, of the contrastive chain, also as a checkpoint tells it."""

    def rule(*callbacks: Any) -> Any:
        sections = {"model": yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["model"]}
        own = {"contrastive_rule": {"class_path": "dat_lightning.Momentum", "init_args": {"momentum": 0.7}}}
        sections["model"].setdefault("init_args", {}).update(own)
        sections["trainer"] = {"callbacks": list(callbacks)}
        network = written(tmp_path / "network.yaml", model=yaml.safe_load(Path(STAGE2).read_text())["model"])
        return open_checkpoint(bare_checkpoint, [network, written(tmp_path / "rule.yaml", **sections)]).rule

    random = {"class_path": "dat_lightning.RandomLength", "init_args": {"spread": 0.25}}
    sampler: dict[str, Any] = {"class_path": "dat_lightning.PGDSampler"}
    assert rule() == Momentum(0.7)
    assert rule(sampler) == Steepest()
    assert rule({**sampler, "init_args": {"rule": random}}) == RandomLength(0.25)
    contents = torch.load(checkpoint, weights_only=True)
    for described, expected in ((random, RandomLength(0.25)), ({"class_path": "other.Rule"}, Steepest())):
        contents["hyper_parameters"]["contrastive_rule"] = described
        torch.save(contents, tmp_path / "described.ckpt")
        assert open_checkpoint(tmp_path / "described.ckpt").rule == expected


def test_colour_images_with_class_names_come_from_folders(tmp_path: Path) -> None:
    for k, name in enumerate(("train", "test", "ood")):
        write_folders(tmp_path / name, 3, 2, (40, 30), k)
    model = EnergyModel(SmallResNet(num_classes=3, in_channels=3, widths=(4, 8)), mean=[0.5] * 3, std=[0.2] * 3)
    model.save_pretrained(tmp_path / "model")
    labelled = {
        name: {"class_path": "dat_lightning.LabelledFolder", "init_args": {"root": str(tmp_path / name)}}
        for name in ("train", "test")
    }
    ood = {"class_path": "dat_lightning.ImageFolder", "init_args": {"root": str(tmp_path / "ood")}}
    arguments: dict[str, Any] = {**labelled, "ood": ood, "num_held_out": 2, "image_size": 24}
    config = tmp_path / "data.yaml"
    config.write_text(
        yaml.safe_dump({"data": {"class_path": "dat_lightning.ImageDataModule", "init_args": arguments}}),
        encoding="utf-8",
    )
    opened = open_checkpoint(tmp_path / "model", [config])
    assert opened.explorer.image_shape == (3, 24, 24)
    assert opened.explorer.class_names == ("class0", "class1", "class2")
    assert opened.explorer.seeds is not None
    assert opened.examples is not None
    assert opened.examples[0][0].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="image_size is 32, but the images of the data are 24×24"):
        open_checkpoint(tmp_path / "model", [config], image_size=32)
    arguments["train"]["init_args"]["root"] = "nowhere"
    config.write_text(
        yaml.safe_dump({"data": {"class_path": "dat_lightning.ImageDataModule", "init_args": arguments}}),
        encoding="utf-8",
    )
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        open_checkpoint(tmp_path / "model", [config])


def changed(checkpoint: Path, path: Path, **entries: Any) -> Path:
    contents = torch.load(checkpoint, weights_only=True)
    contents["hyper_parameters"]["energy_model"] |= entries
    torch.save(contents, path)
    return path


def test_a_file_s_word_imports_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for entry in ({"class_path": "trap.Model"}, {"init_args": {"backbone": {"class_path": "trap.Net"}}}):
        path = changed(checkpoint, tmp_path / "trap.ckpt", **entry)
        with pytest.raises(ValueError, match=r"has weights of trap\.\w+, which is not imported at a file's word: give"):
            open_checkpoint(path)


def test_a_network_that_is_not_of_this_version_is_named(checkpoint: Path, tmp_path: Path) -> None:
    backbone = {"class_path": "dat_lightning.Unheard", "init_args": {}}
    path = changed(checkpoint, tmp_path / "new.ckpt", init_args={"backbone": backbone})
    with pytest.raises(ValueError, match="describes no network of this version: architecture 'Unheard' is not regis"):
        open_checkpoint(path)


def test_pretrained_weights_are_not_downloaded_again(tmp_path: Path) -> None:
    network = {"name": "resnet10t", "num_classes": 3}
    described = {"class_path": "dat_lightning.timm_model", "init_args": {**network, "pretrained": True}}
    section = {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": described}}
    from dat_lightning import timm_model

    model = EnergyModel(timm_model(**network))  # type: ignore[arg-type]
    state = {f"energy_model.{name}": value for name, value in model.state_dict().items()}
    contents = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "hyper_parameters": {"energy_model": section},
    }
    torch.save(contents, tmp_path / "run.ckpt")
    opened = open_checkpoint(tmp_path / "run.ckpt", image_size=64)
    assert opened.explorer.image_shape == (3, 64, 64)
    assert opened.network == "resnet10t, 4.9 M parameters"
    x = torch.rand(3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(opened.explorer.classify(x).logits, model.eval()(x[None])[0], atol=1e-5, rtol=1e-4)


def test_without_a_file_s_hints_steps_grow_with_the_image(tmp_path: Path) -> None:
    model = EnergyModel(SmallResNet(num_classes=3, in_channels=3, widths=(4, 8)))
    model.save_pretrained(tmp_path / "model")
    # 1 % of the box's diagonal, √(3·32·32).
    assert open_checkpoint(tmp_path / "model", image_size=32).step_size == 0.55


def test_images_that_no_page_can_show_are_refused(tmp_path: Path) -> None:
    """Points of the plane, as configs/density has them, and whatever a network's first layer says."""
    said = r"explore shows images of 1 or 3 channels, and those of .*model have 2"
    EnergyModel(Perceptron(2, widths=(4,)), mean=[0.5, 0.5], std=[0.1, 0.1]).save_pretrained(tmp_path / "model")
    (tmp_path / "plane.yaml").write_text("data: {class_path: dat_lightning.PlaneDataModule}\n")
    with pytest.raises(InputError, match=said):
        open_checkpoint(tmp_path / "model", [tmp_path / "plane.yaml"])
    EnergyModel(SmallResNet(num_classes=3, in_channels=2, widths=(4, 8))).save_pretrained(tmp_path / "second_model")
    with pytest.raises(InputError, match=said):
        open_checkpoint(tmp_path / "second_model")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("threat_model", {"norm": "L2", "eps": "x"}),
        ("threat_model", {"norm": "L2", "eps": float("inf")}),
        ("threat_model", {"norm": "L2", "eps": {"a": 1}}),
        ("threat_model", "x"),
        ("contrastive_step_size", float("nan")),
        ("contrastive_step_size", [1]),
        ("contrastive_step_size", -1.0),
        ("contrastive_rule", {"class_path": "dat_lightning.Momentum", "init_args": {"momentum": "x"}}),
        ("contrastive_rule", {"class_path": "dat_lightning.Momentum", "init_args": {"nothing": 1}}),
        ("contrastive_rule", {"class_path": ["x"], "init_args": 3}),
    ],
)
def test_first_steps_that_are_none_are_not_believed(setting: str, value: Any, checkpoint: Path, tmp_path: Path) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    del contents["DigitsDataModule"]
    contents["hyper_parameters"][setting] = value
    torch.save(contents, tmp_path / "a.ckpt")
    opened = open_checkpoint(tmp_path / "a.ckpt")
    assert opened.eps == 4.0
    usual = {"contrastive_step_size": 0.16, "contrastive_rule": STEP_SIZE, "threat_model": STEP_SIZE}
    assert opened.step_size == usual[setting]
    if setting == "contrastive_rule":
        assert opened.rule == Steepest()


def test_files_that_are_no_checkpoints_are_a_sentence(checkpoint: Path, bare_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    damaged = tmp_path / "half.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:2000])
    for path, said in (
        (tmp_path / "nowhere.ckpt", "no checkpoint at .*nowhere"),
        (tmp_path / "empty", "no checkpoint at .*empty"),
        (tmp_path / "text.ckpt", "not a readable checkpoint"),
        (damaged, "not a readable checkpoint"),
        (tmp_path / "foreign.pt", "does not say which network its weights belong to: give the run's configuration"),
        (bare_checkpoint, "does not say which network its weights belong to"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_checkpoint(path)
    with pytest.raises(ValueError, match="does not fit the network"):
        open_checkpoint(checkpoint, [STAGE2])


def test_wrong_configurations_and_devices_are_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "wrong.yaml").write_text("data: {class_path: dat_lightning.DigitsDataModule, init_args: {batch: 3}}\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": ["nowhere.yaml"]}, "--config names nowhere.yaml, which is no file"),
        ({"config": [tmp_path / "list.yaml"]}, "must be a mapping of settings, got list"),
        ({"config": [tmp_path / "broken.yaml"]}, "broken.yaml, line 2 is no YAML"),
        ({"config": [tmp_path / "wrong.yaml"]}, "batch"),
        ({"device": "abacus"}, "device must be one that torch can use here, such as 'cpu', got 'abacus'"),
        ({"device": "meta"}, "device must be"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": 8}, "image_size is 8, but the images of the data are 16×16"),
    ]
    for arguments, said in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_checkpoint(checkpoint, **arguments)


def test_the_averaged_weights_are_those_of_load_weights(checkpoint: Path) -> None:
    module = DualAdversarialModule(EnergyModel(SmallResNet(widths=(4, 8)), mean=[0.3], std=[0.35]))
    load_weights(module.energy_model, checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(answers(open_checkpoint(checkpoint)), module.energy_model.eval()(NOISE))
