"""Reading texts: a module's tokeniser, what it is fitted to, and how a checkpoint keeps it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo._lightning import rank_zero_info
from zoo.common.batch import to_device
from zoo.common.data_protocols import HasCaptions
from zoo.common.tokenizers import Tokenizer, WordTokenizer, create_tokenizer, tokenize


class ReadsTexts:
    """Turns texts into tokens: ``class Net(ReadsTexts, LightningModule)``, with ``hparams.context_length``.

    Words are fitted to the captions of the first fit's data module, where it has captions. Checkpoints hold the
    tokeniser itself, as the hyperparameter ``tokenizer``, so that no file is needed to read them.

    Attributes:
        tokenizer: What reads the texts; a constructor sets it.
        cut_texts: Number of texts that were longer than ``context_length`` until now.
    """

    tokenizer: Tokenizer
    hparams: Any
    device: torch.device
    cut_texts = 0

    @torch.compiler.disable
    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Tokens (N, context_length) int64 of texts, on the module's device. The first that is cut is told."""
        length = self.hparams.context_length
        tokens, cut = tokenize(self.tokenizer, texts, length)
        if cut and not self.cut_texts:
            rank_zero_info(
                f"{cut} of {len(texts)} texts have more than {length} tokens, and are cut; this is told once, "
                "cut_texts counts them: context_length is what to change"
            )
        self.cut_texts += cut
        return to_device(tokens, self.device)

    def setup(self, stage: str) -> None:
        super().setup(stage)  # type: ignore[misc]  # of the LightningModule beside this
        trainer: Any = getattr(self, "_trainer", None)
        data = None if trainer is None else trainer.datamodule
        if stage == "fit" and isinstance(data, HasCaptions):
            self.fit_words(data.captions)

    def fit_words(self, texts: Callable[[], Sequence[str]]) -> None:
        """Fits a tokeniser of words that knows none yet to the texts that a function returns."""
        if isinstance(self.tokenizer, WordTokenizer) and not self.tokenizer.words:
            self.tokenizer.fit(found := texts())
            rank_zero_info(f"the tokeniser knows {len(self.tokenizer.words)} words of {len(found)} texts")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        arguments = dict(checkpoint.get("hyper_parameters", {}))
        checkpoint["hyper_parameters"] = arguments | {"tokenizer": dict(self.tokenizer.state())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self.take_tokenizer(checkpoint)

    def take_tokenizer(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the tokeniser in a checkpoint, if there is one."""
        state = checkpoint.get("hyper_parameters", {}).get("tokenizer")
        if isinstance(state, Mapping):
            self.tokenizer = create_tokenizer(state)
