"""timm's networks, which ViTClassifier is measured against."""

from typing import Any

from zoo.common.peers import Built, timm_classifier, timm_network


def _timm(model: Any, axes: dict[str, str]) -> Built:
    hp, sizes = model.hparams, {}
    if "vit" in hp.backbone:
        sizes = {"img_size": model.input_shape[1:], "patch_size": hp.patch_size, "embed_dim": hp.width}
        sizes |= {"depth": hp.depth, "num_heads": hp.heads}
    return timm_network(hp.backbone, model, axes, **sizes)


PEERS = timm_classifier(_timm)
