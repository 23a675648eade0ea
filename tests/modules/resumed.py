"""A run of the command line that stops after an epoch and goes on, against one that does not stop."""

from pathlib import Path

import torch

from dat_lightning.cli import main


def check_resumed_after_an_epoch(arguments: list[str]) -> None:
    """Goes on with a run of one epoch that has ended here, and compares it with two epochs in one; T has to grow."""
    last = Path("runs/checkpoints/last.ckpt")
    main([*arguments, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    resumed = torch.load(last, weights_only=True)
    last.unlink()
    main([*arguments, "--trainer.max_epochs=2"])
    whole = torch.load(last, weights_only=True)
    assert int(whole["state_dict"]["curriculum.num_steps"]) > 0
    assert resumed["network_evaluations"] == whole["network_evaluations"] > 0
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
