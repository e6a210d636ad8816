"""FSDP2: weights, gradients and the optimizer's state are split between processes, and made whole block by block.

    Trainer(accelerator="gpu", devices=8, strategy="fsdp2")

is Lightning's ``ModelParallelStrategy`` with all processes in its data-parallel dimension; the modules of the zoo split
themselves under either (:class:`Shardable`). Each process trains on its own images, as under DDP, and computes what DDP
would. What it costs is a second all-gather; what it saves is memory: all but 1/N of weights, gradients and moments.

Not split: buffers. BatchNorm's statistics are each process's own, unless :class:`zoo.callbacks.DistributeBatchNorm`
averages them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from zoo._lightning import NAMESPACE

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
else:
    from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry

SMALLEST = 10_000  # parameters of a block: what is less is gathered with the rest, since each gathering is a wait
STEPS = ("training_step", "validation_step", "test_step", "predict_step", "pictures")
"""What runs a LightningModule, beside its ``forward``."""
SPLITTING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, all processes of all nodes data-parallel: ``strategy="fsdp2"``.

    A module splits itself in ``configure_model``: those of the zoo do, and :func:`shard` does it for others.

    Args:
        save_distributed_checkpoint: False: rank 0 writes whole checkpoints, which any number of processes, and any
            strategy, can go on from. True: each process writes its part into a folder; for models that one host cannot
            hold.
        kwargs: See Lightning's ``ModelParallelStrategy``.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")


@runtime_checkable
class Entered(Protocol):
    """A block with other methods than ``forward`` that have to gather its weights where these are split."""

    entered: Sequence[str]
    """Names of the methods."""


class Shardable:
    """Splits a module under ModelParallelStrategy: ``class Net(Shardable, LightningModule)``."""

    device_mesh: DeviceMesh | None  # Lightning's; None under other strategies

    def configure_model(self) -> None:
        """Splits the module, when Lightning calls it, before weights are moved to the device."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh)  # type: ignore[arg-type]  # a LightningModule as well


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a module over the data-parallel processes of a mesh, in place; a second time it does nothing.

    What is gathered at a time is a block: an element of an outermost ``ModuleList`` or ``Sequential``, as a
    transformer's blocks and a ConvNet's stages are; and what is left of the module. A block that is run by other
    methods than ``forward`` has their names in ``entered``.

    Raises:
        ValueError: For a mesh with a tensor-parallel dimension, or for parameters without one.
    """
    if isinstance(module, FSDPModule):
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # an evaluation leaves some whole, and what is loaded goes into parts
        return
    if mesh["tensor_parallel"].size() != 1:
        raise ValueError(
            f"tensor_parallel_size is {mesh['tensor_parallel'].size()}: {type(module).__name__} is split by "
            "data_parallel_size alone, set tensor_parallel_size to 1, or strategy to fsdp2"
        )
    scalar = next((name for name, parameter in module.named_parameters() if parameter.ndim == 0), None)
    if scalar is not None:
        raise ValueError(f"{scalar} has no dimension to split: make it a parameter of shape (1,), or use ddp")
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # torch does not split what lies in memory channels last
    for block in _blocks(module):
        if sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST:
            _split(block, mesh, block.entered if isinstance(block, Entered) else ())
    _split(module, mesh, [name for name in STEPS if hasattr(module, name)])


def _split(module: nn.Module, mesh: DeviceMesh, entered: Sequence[str]) -> None:
    # What one method leaves whole, another one that has called it still needs.
    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=not entered)
    for name in entered:
        register_fsdp_forward_method(module, name)


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        # Lists of lists, as HRNet has them, have no forward of their own that would gather them.
        found += [child] if listed and not isinstance(child, nn.ModuleList | nn.ModuleDict) else _blocks(child)
    return found


def is_split(trainer: Any) -> bool:
    """Tells whether a Trainer's strategy splits weights between processes: all have to run what one of them runs."""
    return any(kind.__name__ in SPLITTING for kind in type(trainer.strategy).__mro__)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's ``state_dict`` on the CPU; all processes have to ask, and of split weights rank 0 alone gets it."""
    state: Any = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(state)
