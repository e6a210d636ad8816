"""The Lightning that the user's Trainer comes from.

``lightning.pytorch`` and ``pytorch_lightning`` ship the same code twice, and each Trainer refuses the other's modules.
The zoo follows the one the program imported first: ``import pytorch_lightning`` before ``import zoo`` is enough. When
both are imported, ``lightning`` is taken unless the environment says ``ZOO_LIGHTNING=pytorch_lightning``.
``datamodules/_lightning.py`` is this file's twin, since neither package imports the other.
"""

import os
import sys
from typing import TYPE_CHECKING

_only_pytorch_lightning = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
NAMESPACE = os.environ.get("ZOO_LIGHTNING", "pytorch_lightning" if _only_pytorch_lightning else "lightning")

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
elif NAMESPACE == "pytorch_lightning":
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import Checkpoint, RichProgressBar
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    raise ValueError(f"ZOO_LIGHTNING={NAMESPACE!r}: expected 'lightning' or 'pytorch_lightning'")

__all__ = [
    "NAMESPACE",
    "Callback",
    "Checkpoint",
    "LightningDataModule",
    "LightningModule",
    "RichProgressBar",
    "Trainer",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
