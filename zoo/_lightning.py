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
    from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, RichProgressBar, Timer
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
elif NAMESPACE == "pytorch_lightning":
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, RichProgressBar, Timer
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    raise ValueError(f"ZOO_LIGHTNING={NAMESPACE!r}: expected 'lightning' or 'pytorch_lightning'")

PRIVATE = {
    # Resuming from the middle of an epoch: where the loops and the loader's prefetching are.
    "loops.loop._Loop": ("_restarting",),
    "loops.fit_loop._FitLoop": ("_data_fetcher",),
    "loops.training_epoch_loop._TrainingEpochLoop": (
        "_batches_that_stepped",
        "_broadcast_sigterm_tensor",  # collective on some strategies: all ranks have to come to it
        "_num_ready_batches_reached",
        "_should_accumulate",
        "_should_check_val_fx",
    ),
    "loops.evaluation_loop._EvaluationLoop": ("_logged_outputs",),  # several loaders counted apart
    # Signals, and the checkpoint that is being restored.
    "trainer.trainer.Trainer": (
        "_accelerator_connector",
        "_checkpoint_connector",
        "_evaluation_loop",
        "_signal_connector",
    ),
    "trainer.connectors.checkpoint_connector._CheckpointConnector": ("_loaded_checkpoint",),
    "trainer.connectors.signal_connector._SignalConnector": ("_original_handlers",),
    "callbacks.model_checkpoint.ModelCheckpoint": ("_last_checkpoint_saved", "_last_global_step_saved"),
    # A module without a Trainer: its property raises.
    "core.module.LightningModule": ("_on_before_batch_transfer", "_trainer"),
    "strategies.ddp.DDPStrategy": ("_timeout",),
    "strategies.model_parallel.ModelParallelStrategy": ("_data_parallel_size",),
    "utilities.model_helpers": ("_restricted_classmethod",),
}
"""What Lightning keeps private and we need, by where it lies under Lightning's package.
tests/test_house.py asks for each, and lets nothing else be used."""

__all__ = [
    "NAMESPACE",
    "PRIVATE",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LightningDataModule",
    "LightningModule",
    "RichProgressBar",
    "Timer",
    "Trainer",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
