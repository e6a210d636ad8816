"""The Lightning that the user's Trainer comes from.

``lightning.pytorch`` and ``pytorch_lightning`` ship the same code twice, and each Trainer refuses the other's modules.
The data modules follow the one the program imported first: ``import pytorch_lightning`` before ``import datamodules``
is enough. When both are imported, ``lightning`` is taken unless the environment says
``ZOO_LIGHTNING=pytorch_lightning``. ``zoo/_lightning.py`` is this file's twin, since neither package imports the other.
"""

import os
import sys
from typing import TYPE_CHECKING

_only_pytorch_lightning = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
NAMESPACE = os.environ.get("ZOO_LIGHTNING", "pytorch_lightning" if _only_pytorch_lightning else "lightning")

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
elif NAMESPACE == "pytorch_lightning":
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
else:
    raise ValueError(f"ZOO_LIGHTNING={NAMESPACE!r}: expected 'lightning' or 'pytorch_lightning'")

PRIVATE = {
    "loops.fit_loop._FitLoop": ("_combined_loader",),  # its limits of batches, for the order of a continued epoch
    "loops.training_epoch_loop._TrainingEpochLoop": ("_num_ready_batches_reached",),
}
"""What Lightning keeps private and we need, by where it lies under Lightning's package.
tests/test_house.py asks for each, and lets nothing else be used."""

__all__ = [
    "NAMESPACE",
    "PRIVATE",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "rank_zero_info",
    "rank_zero_warn",
]
