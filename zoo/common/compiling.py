"""Compiling in place, in a way that copies and pickles survive."""

from typing import Any, ClassVar

import torch
from torch import nn


class Compilable(nn.Module):
    """Compiles in place what training calls, and nothing of it in copies: ``class Net(Compilable, LightningModule)``.

    It comes before LightningModule, whose pickling keeps the compiled call that torch's leaves out.

    Attributes:
        compiled: Names of the methods that are compiled beside the call.
    """

    compiled: ClassVar[tuple[str, ...]] = ()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the call, as ``nn.Module.compile`` does, and :attr:`compiled`; keys of the state dict stay clean."""
        super().compile(*args, **kwargs)
        for name in self.compiled:
            self.__dict__[name] = torch.compile(getattr(self, name), *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without compiled code, which would run on the weights of the original."""
        bound = ("_compiled_call_impl", *self.compiled)
        return {name: value for name, value in super().__getstate__().items() if name not in bound}
