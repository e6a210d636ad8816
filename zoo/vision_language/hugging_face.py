"""Causal models of Hugging Face's as language models: Llama, Qwen, Gemma, GPT-2 and others, from a folder on the disk.

It needs transformers, ``pip install 'vision-zoo[towers]'``. Nothing is downloaded, and no code from a folder is run.

Families differ in what they do with embeddings, positions and masks, and not all do with each what they are told. So
each model is tried when it is wrapped: a few tokens, of which packed sequences, rows padded on the left and the cache
must come out as each sequence by itself, by tokens. One that fails is refused by name, such as models with a recurrent
state, which reaches from one packed sequence into the next.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.vision_language.cache import check_room
from zoo.vision_language.masks import attention_mask, check_call, counted
from zoo.weights.names import brief

ATTENTION = ("sdpa", "eager")
GROUPS = {"stem": r".*(?:embed|wte|wpe)", "blocks": [(r".*?\.(?:layers?|h|blocks?)\.(\d+)\.", None), (r".", (99999,))]}
"""Groups of a model's parameters by their names at Hugging Face, as timm's ``group_matcher`` states them."""


class HuggingFaceCache:
    """Cache of a model of Hugging Face's, with what a :class:`zoo.vision_language.cache.Cache` has.

    Args:
        batch: Rows.
        capacity: Most tokens of a row; memory is taken as it is needed.

    Attributes:
        inner: transformers' own.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.inner: Any = _transformers().DynamicCache()  # of whole layers, also where a model has sliding windows

    def rows(self, indices: Tensor) -> Self:
        """A cache of its own with these rows, each as often as it is named: int64 indices (R,)."""
        made = type(self)(len(indices), self.capacity)
        made.length = self.length
        for index, layer in enumerate(self.inner.layers):
            made.inner.update(layer.keys[indices], layer.values[indices], index)
        return made


class HuggingFaceLanguageModel(nn.Module):
    """Causal model of Hugging Face's over embeddings: a :class:`zoo.vision_language.language_model.LanguageModel`.

    Whole rows run without a mask. Packed rows and rows that are padded on the left get a mask of what each token may
    read, which transformers' "sdpa" and "eager" attention take; in both, positions begin at 0 with each sequence.

    Args:
        source: Folder that ``save_pretrained`` wrote, whose weights are read in float32; or a model, as it is. Both
            begin in training mode, as modules do.

    Attributes:
        model: transformers' model.
        width: Width W of the embeddings.
        vocab_size: Number of embeddings, which may be more than the tokeniser's tokens.
        context_length: Most tokens of a sequence: the model's positions, and no more than a sliding window sees, since
            masks of ours have none.

    Raises:
        ValueError: For a folder without a configuration or weights of a causal model; for a model without output
            weights, with another attention, or that does not pass the trial, by name.
        ImportError: Without transformers.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.model = _loaded(source) if isinstance(source, str | Path) else source
        self.name = type(self.model).__name__
        if not isinstance(self.model, _transformers().PreTrainedModel):
            raise ValueError(f"{self.name} is no model of transformers': give one, or a folder that it was saved to")
        self._check_kind()
        config = self.model.config.get_text_config()
        said = config.to_dict()
        self.vocab_size, self.width = self.model.get_input_embeddings().weight.shape
        windows = said.get("sliding_window"), said.get("attention_chunk_size")
        limits = getattr(config, "max_position_embeddings", None), *windows
        self.context_length: int = min((limit for limit in limits if limit), default=2**31 - 1)
        self._factor: float = said.get("logit_scale") or 1 / (said.get("logits_scaling") or 1)
        self._cap: float | None = said.get("final_logit_softcapping")
        self._try()
        self.train()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., W) of tokens (...), scaled where the model's embedding layer does so, as Gemma's."""
        embeddings: Tensor = self.model.get_input_embeddings()(tokens)
        return embeddings

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
    ) -> Tensor:
        """Hidden states (B, L, width of the output): see :class:`zoo.vision_language.language_model.CausalTransformer`.

        Raises:
            ValueError: As there.
        """
        past = 0 if cache is None else cache.length
        limits = self.width, self.context_length
        check_call(*limits, embeddings, positions, segments, seen, None if cache is None else past)
        if cache is not None:
            check_room(cache, *embeddings.shape[:2])
        mask = attention_mask(embeddings, segments, seen, past)
        if mask is None and positions is not None and cache is None:
            # Without a mask and a cache, transformers takes positions that jump for packed sequences.
            mask = attention_mask(embeddings, None, torch.ones_like(positions, dtype=torch.bool), past)
        if mask is not None:
            mask = self._as_asked(mask.expand(len(embeddings), -1, -1, -1), embeddings.dtype)
            if positions is None:  # OPT would count them by the mask
                positions = counted(embeddings, segments, past)
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_name] = cache.inner
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, **options
        ).last_hidden_state
        if cache is not None:
            cache.length += embeddings.shape[1]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states, of whichever positions, scaled and capped as the model's."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if self._factor != 1:
            logits = logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def create_cache(self, batch: int, capacity: int) -> HuggingFaceCache:
        """An empty cache for so many rows, and so many tokens in each."""
        return HuggingFaceCache(batch, capacity)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute activations."""
        way = f"checkpointing_{'enable' if enable else 'disable'}"
        getattr(self.model, f"activation_{way}", getattr(self.model, f"gradient_{way}"))()  # older releases: gradient

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by their parameters' names, as timm's networks state them."""
        return GROUPS

    def _as_asked(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask as transformers' attention takes it: "eager" adds it to the scores."""
        if self.model.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def _check_kind(self) -> None:
        """Raises ValueError for a model that cannot be called as one has to be."""
        if self.model.config.is_encoder_decoder or self.model.get_output_embeddings() is None:
            raise ValueError(f"{self.name} is no causal language model: give one with output weights, a ...ForCausalLM")
        if self.model.config.get_text_config().to_dict().get("hidden_size_per_layer_input"):
            raise ValueError(f"{self.name} cannot be a language model here: its layers read tokens beside embeddings")
        attention = self.model.config._attn_implementation
        if attention not in ATTENTION:
            raise ValueError(
                f"{self.name} has attn_implementation {attention!r}: load it with {' or '.join(ATTENTION)}"
            )
        taken = inspect.signature(self.model.base_model.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in taken]  # the older name is going
        asked = ("inputs_embeds", "attention_mask", "position_ids")
        if missing := [name for name in asked if name not in taken] + ["cache"] * (not names):
            raise ValueError(f"{self.name} cannot be a language model here: its call takes no {', '.join(missing)}")
        self._cache_name = names[0]

    @torch.no_grad()
    def _try(self) -> None:
        """Raises ValueError if packing, padding or the cache changes a sequence, or embeddings are not what tokens are.

        Nothing of it is random, and a model without weights, on the meta device, is taken as it is.
        """
        weight = self.model.get_input_embeddings().weight
        if weight.is_meta:
            return
        self.model.eval()
        tokens = torch.arange(1, 6, device=weight.device)[None] % self.vocab_size
        first, second = tokens[:, :3], tokens[:, 3:]
        apart = [self.model(input_ids=each, use_cache=False).logits[0] for each in (first, second)]
        real = torch.tensor([[True, True, True], [False, True, True]], device=weight.device)
        rows = torch.cat([first, torch.cat([first[:, :1], second], 1)])

        def packed() -> list[Tensor]:
            segments = torch.tensor([[1, 1, 1, 2, 2, 0]], device=weight.device)
            row = torch.cat([tokens, tokens[:, :1]], 1)
            return list(self.logits(self(self.embed(row), segments=segments))[0, :5].split([3, 2]))

        def padded() -> list[Tensor]:
            positions = (real.cumsum(1) - 1).clamp(min=0)
            cache, found = self.create_cache(2, 3), []
            for start, end in ((0, 2), (2, 3)):
                given = self.embed(rows[:, start:end])
                found.append(self(given, positions[:, start:end], seen=real[:, :end], cache=cache))
            logits = self.logits(torch.cat(found, 1))
            return [logits[0], logits[1, 1:]]

        trials = {
            "whole rows of embeddings": lambda: [self.logits(self(self.embed(each)))[0] for each in (first, second)]
        }
        trials |= {"packed sequences": packed, "rows padded on the left, with a cache": padded}
        for what, trial in trials.items():
            try:
                found, reason = trial(), ""
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                found, reason = [], f" ({_first_line(error)})"
            if not found or not all(_close(*pair) for pair in zip(found, apart, strict=True)):
                raise ValueError(
                    f"{self.name} cannot be a language model here: {what} do not come out as each sequence of tokens "
                    f"by itself{reason}"
                )


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equality of two logits up to rounding, or a twentieth in half precision."""
    error = (found - expected).float().abs().max()
    rounding = min(256 * torch.finfo(found.dtype).eps, 0.05)
    return bool(error <= rounding * expected.float().abs().max())


def _loaded(folder: str | Path) -> Any:
    """The causal model in a folder, in float32."""
    library, folder = _transformers(), Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json: nothing is downloaded, give one on the disk")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = library.AutoModelForCausalLM.from_pretrained(
            folder, **options, output_loading_info=True, dtype=torch.float32
        )
    except OSError as error:
        raise ValueError(f"{folder} has no weights to read ({_first_line(error)})") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: transformers builds no causal model of it: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} does not fit {type(model).__name__}: it lacks {brief(missing)}")
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"this language model needs transformers ({error}): pip install 'vision-zoo[towers]'"
        ) from error
