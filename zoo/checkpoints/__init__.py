"""Checkpoints that are whole or absent, say what made them, and run no code when they are read.

``AtomicCheckpointIO`` is a plugin of any Trainer's, ``Trainer(plugins=[AtomicCheckpointIO()])``, and ``SafeLoading``
is for modules (``io.py``). ``damage``, ``newest``, ``configuration`` and so on look at what lies on the disk
(``looking.py``), ``claim`` and the like see to folders and files (``files.py``), and ``objects`` knows what a
checkpoint may hold (``plain.py``). What made a checkpoint is put into it by :class:`zoo.callbacks.Provenance`.
"""

from zoo.checkpoints.files import claim, give_name, sweep
from zoo.checkpoints.io import AtomicCheckpointIO, SafeLoading, TorchCheckpointIO, read
from zoo.checkpoints.looking import (
    best_in,
    best_path,
    configuration,
    content_of,
    damage,
    free_path,
    hyperparameters_of,
    is_distributed,
    made_by,
    moved,
    newest,
    saved_at,
)
from zoo.checkpoints.plain import objects

__all__ = [
    "AtomicCheckpointIO",
    "SafeLoading",
    "TorchCheckpointIO",
    "best_in",
    "best_path",
    "claim",
    "configuration",
    "content_of",
    "damage",
    "free_path",
    "give_name",
    "hyperparameters_of",
    "is_distributed",
    "made_by",
    "moved",
    "newest",
    "objects",
    "read",
    "saved_at",
    "sweep",
]
