"""Vision-language models: a vision tower, a connector, and a language model that reads image tokens among its own."""

from zoo.vision_language.language_model import CausalTransformer, LanguageModel
from zoo.vision_language.model import VisionLanguageModel

__all__ = ["CausalTransformer", "LanguageModel", "VisionLanguageModel"]
