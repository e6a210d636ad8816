"""Gradient caching: batches of pairs larger than memory, with the gradients of the whole batch.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache): a first pass
keeps embeddings alone, the loss of all of them gives each its gradient, and a second pass carries this back, a micro
batch at a time. What is kept and computed is that of activation checkpointing with a micro batch as the segment, which
is how it is done here: automatic optimization, DistributedDataParallel and mixed precision then need nothing more.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def in_micro_batches(encoder: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """Encodes a batch a micro batch at a time, each a second time in the backward pass.

    Of activations, those of one micro batch are kept. Values and gradients are those of encoding micro batches with
    everything kept; random choices are the same in both passes, as far as torch's default generators make them.

    Args:
        encoder: A module, or a method of one, from inputs (b, ...) to embeddings (b, ...), row by row.
        inputs: (B, ...).
        size: Rows of a micro batch, the last of which may have fewer.

    Returns:
        Embeddings (B, ...).

    Raises:
        TypeError: For an encoder that cannot be looked into.
        ValueError: For a size below 1; for BatchNorm in training mode, whose statistics would be those of micro batches
            and be counted twice.
    """
    if size < 1:
        raise ValueError(f"size is {size}: expected micro batches of 1 row or more")
    _check_row_by_row(encoder)
    return torch.cat([checkpoint(encoder, part, use_reentrant=False) for part in inputs.split(size)])


def _check_row_by_row(encoder: Callable[[Tensor], Tensor]) -> None:
    owner = inspect.unwrap(encoder)  # compiled, it is wrapped
    owner = owner.__self__ if inspect.ismethod(owner) else owner
    if not isinstance(owner, nn.Module):
        raise TypeError(f"encoder is a {type(owner).__name__}: expected a module or a method of one")
    for name, part in owner.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise ValueError(
                f"{name or 'the encoder'} is a {type(part).__name__} in training mode, whose statistics would be those "
                "of micro batches: take a network without BatchNorm, lock it, or encode the whole batch at once"
            )
