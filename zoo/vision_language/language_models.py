"""The language model by argument: a small one of one's own sizes, a module, or a folder of Hugging Face's."""

from typing import Any

from torch import nn

from zoo.common.ranges import check_above, check_ranges
from zoo.common.tokenizers import Tokenizer
from zoo.vision_language.hugging_face import HuggingFaceLanguageModel
from zoo.vision_language.language_model import CausalTransformer


def create_language_model(given: str | nn.Module | None, tokenizer: Tokenizer, hparams: Any) -> nn.Module:
    """Language model of a :class:`zoo.VisionLanguageModel`.

    Args:
        given: Path of a folder of Hugging Face's, or a module. None: a :class:`CausalTransformer` by the arguments.
        tokenizer: Whose tokens it reads.
        hparams: Arguments of the whole.

    Raises:
        ValueError: For sizes out of range; for fewer tokens than the tokeniser's; for fewer positions than
            ``context_length``.
    """
    if given is None:
        names = ("width", "depth", "heads", "key_heads", "mlp_width")
        check_ranges(**{f"language_{name}": (hparams[f"language_{name}"], 1, None) for name in names})
        check_ranges(language_dropout=(hparams.language_dropout, 0, 1))
        check_above(language_rope_theta=(hparams.language_rope_theta, 0, float("inf")))
        return CausalTransformer(
            tokenizer.vocab_size,
            width=hparams.language_width,
            depth=hparams.language_depth,
            heads=hparams.language_heads,
            key_heads=hparams.language_key_heads,
            mlp_width=hparams.language_mlp_width,
            context_length=hparams.context_length,
            rope_theta=hparams.language_rope_theta,
            dropout=hparams.language_dropout,
        )
    model: Any = HuggingFaceLanguageModel(given) if isinstance(given, str) else given
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens, and the language model {model.vocab_size}: take the one "
            "that it came with"
        )
    if hparams.context_length > model.context_length:
        raise ValueError(
            f"context_length is {hparams.context_length}, and the language model has {model.context_length} positions: "
            "expected at most as many"
        )
    return model
