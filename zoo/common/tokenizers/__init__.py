"""Tokenisers: texts as numbers, for towers that read them.

``interface.py`` says what a tokeniser is and makes batches of tokens; ``plain.py`` has those that need no file,
``files.py`` those out of files.
"""

from zoo.common.tokenizers.creation import create_tokenizer
from zoo.common.tokenizers.files import HuggingFaceTokenizer, OpenClipTokenizer, SentencePieceTokenizer
from zoo.common.tokenizers.interface import FitsTokenizer, HasUnknown, Tokenizer, check_special, tokenize, words_of
from zoo.common.tokenizers.plain import ByteTokenizer, WordTokenizer

__all__ = [
    "ByteTokenizer",
    "FitsTokenizer",
    "HasUnknown",
    "HuggingFaceTokenizer",
    "OpenClipTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "check_special",
    "create_tokenizer",
    "tokenize",
    "words_of",
]
