"""Format ``safetensors``: weights in a folder, which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

That is where the architecture is one of timm's, and a classifier's head is a linear layer, as timm's are. Of other
modules it is the backbone. The rest is a state dict under its own names. What is to be known is in ``zoo.json``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.common.backbones import backbone_of
from zoo.common.classes import names_of
from zoo.common.classification import Classifier
from zoo.common.protocols import CreatedByTimm
from zoo.serving.export.graph import SEED, Graph, input_shape
from zoo.serving.export.proof import BATCHES, named, relative

SUFFIX, TOLERANCE = ".weights", 5e-6
WEIGHTS, CONFIG, METADATA = "model.safetensors", "config.json", "zoo.json"
FILES = {WEIGHTS, CONFIG, METADATA}
CROPS = {"crop_pct": "crop_ratio", "interpolation": "interpolation", "mean": "mean", "std": "std"}
"""timm's words for what is stated of preprocessing."""


class Weights:
    """Weights of a module as they are written, under timm's names where it builds the like.

    Attributes:
        module: The module.
        network: The like of timm's, with the module's weights; None if there is none.
        part: What of the module it is.
        note: What timm makes of the folder, or why it does not read it.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.network, self.part = module, None, "state dict"
        try:
            self.network, self.part, self.note = self._like()
        except (ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            self.note = f"a state dict under its own names, which timm does not read: {reason}"

    def _like(self) -> tuple[Any, str, str]:
        backbone = backbone_of(self.module)
        if backbone is None or not isinstance(backbone, CreatedByTimm):
            kind = type(self.module if backbone is None else backbone).__name__
            raise ValueError(f"timm has no name for {kind} as it was built")
        name, arguments = backbone.timm_arguments
        json.dumps(arguments)  # a TypeError for what is no plain data
        classifies = isinstance(self.module, Classifier)
        if classifies and not isinstance(self.module.head, nn.Linear):
            raise ValueError(f"its head is a {type(self.module.head).__name__}, and timm's a linear layer")
        network: Any = timm.create_model(
            name, num_classes=len(self.module.head.weight) if classifies else 0, **arguments
        )
        state = dict(backbone.state_dict())
        if classifies:
            place = network.pretrained_cfg["classifier"]
            state |= {f"{place}.{part}": value for part, value in self.module.head.state_dict().items()}
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        (found,) = compared(self.module, network, counts=(1,)).values()
        if not found <= TOLERANCE:  # an epsilon, say, that was set later
            raise ValueError(f"timm's {name} computes something else with the same weights")
        part = "backbone and head" if classifies else "backbone"
        return network, part, f"timm.create_model('local-dir:FOLDER', pretrained=True) gives its {part}"

    @property
    def classifies(self) -> bool:
        """Tells whether timm's like has the head as well."""
        return self.network is not None and isinstance(self.module, Classifier)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, each with memory of its own."""
        state = (self.module if self.network is None else self.network).state_dict()
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}

    def write(self, folder: Path, stated: Mapping[str, Any]) -> None:
        """Writes weights, and timm's configuration where it is timm's format, with what is stated of preprocessing."""
        folder.mkdir()
        save_file(self.tensors(), folder / WEIGHTS, {"format": "pt"})
        if self.network is not None:
            (folder / CONFIG).write_text(json.dumps(self.configuration(stated), indent=2), encoding="utf-8")

    def configuration(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """timm's configuration of the network: what builds it, and what its images are."""
        network: Any = self.network
        name, arguments = self.module.backbone.timm_arguments
        kept = ("interpolation", "crop_pct", "mean", "std", "fixed_input_size", "pool_size", "first_conv", "classifier")
        config = {key: network.pretrained_cfg[key] for key in kept if network.pretrained_cfg.get(key) is not None}
        config |= {theirs: stated[ours] for theirs, ours in CROPS.items() if ours in stated}
        config |= {"input_size": list(self.module.input_shape), "num_classes": network.num_classes}
        config["custom_load"] = False  # timm's own names, whatever its release had
        found = {
            "architecture": name,
            "num_classes": network.num_classes,
            "num_features": network.num_features,
            "model_args": dict(arguments),
            "pretrained_cfg": config,
        }
        classes = names_of(self.module)
        return found | ({"label_names": classes} if classes and len(classes) == network.num_classes else {})


class Program:
    """Classifier that timm makes of a folder, for images as a graph takes them."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        self.network, self.graph = load(folder), graph

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.network(self.graph.prepared(images))
        several = self.graph.variant.module.hparams.multi_label
        return {"logits": logits, "probabilities": logits.sigmoid() if several else logits.softmax(1)}


def is_one(path: Path) -> bool:
    """True for a folder with nothing in it that is not of this format."""
    return path.is_dir() and FILES.issuperset(file.name for file in path.iterdir())


def load(folder: Path) -> Any:
    """The network that timm makes of a folder."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def differences(weights: Weights, folder: Path) -> dict[str, float]:
    """Largest relative difference between a module and what timm makes of its folder, by the batch of both.

    Of a folder that timm does not read the tensors are compared.
    """
    if weights.network is None:
        written, own = load_file(folder / WEIGHTS), weights.module.state_dict()
        same = written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
        return {"all tensors": 0.0 if same else float("inf")}
    return compared(weights.module, load(folder), BATCHES)


@torch.no_grad()
def compared(module: Any, network: Any, counts: tuple[int, ...]) -> dict[str, float]:
    """Relative difference of a classifier's logits, or of another module's last map, from those of a network of timm's.

    By random batch, of so many images.
    """
    if isinstance(module, Classifier):
        ours, theirs = module, network
    else:
        ours, theirs = module.backbone.forward_features, network.forward_features
    found = {}
    for count in counts:
        shape = count, *input_shape(module)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + count))
        found[named(images)] = relative(theirs(images), ours(images))
    return found


def attach(metadata: str, folder: Path) -> None:
    (folder / METADATA).write_text(metadata, encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return found
