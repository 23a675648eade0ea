"""A page to look at one checkpoint: a core that computes, uploads as the network's images, and a thin page around."""

from dat_lightning.explore.explorer import Explorer, Reading, Samples, Walk
from dat_lightning.explore.opening import Examples, Opened, open_checkpoint
from dat_lightning.explore.serving import explore
from dat_lightning.explore.uploads import Upload, read_upload

__all__ = [
    "Examples",
    "Explorer",
    "Opened",
    "Reading",
    "Samples",
    "Upload",
    "Walk",
    "explore",
    "open_checkpoint",
    "read_upload",
]
