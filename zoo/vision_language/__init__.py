"""Vision-language models: a vision tower, a connector, and a language model that reads image tokens among its own."""
