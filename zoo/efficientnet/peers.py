"""timm's networks, which EfficientNetClassifier is measured against."""

from typing import Any

from zoo.common.peers import Built, timm_classifier, timm_network


def _timm(model: Any, axes: dict[str, str]) -> Built:
    return timm_network(f"efficientnet_{model.hparams.variant or ''}", model, axes)


PEERS = timm_classifier(_timm)
