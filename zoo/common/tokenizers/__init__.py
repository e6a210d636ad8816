"""Tokenisers: texts as numbers, for towers that read them."""

from zoo.common.tokenizers.interface import Tokenizer, check_special, tokenize
from zoo.common.tokenizers.plain import ByteTokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "check_special", "tokenize"]
