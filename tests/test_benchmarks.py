"""The benchmark scripts: what they reckon by formula is what torch counts. Their figures are never asserted."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo import MAEPretrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize(("size", "published"), [("small", 13.01), ("base", 19.56), ("large", 41.51), ("huge", 97.12)])
def test_the_papers_arithmetic_is_what_torch_counts_in_the_plain_forward_pass(size, published):
    pytest.importorskip("transformers")
    from mae_speed import SIZES, forward_flops, peer

    assert forward_flops(size) / 1e9 == pytest.approx(published, abs=0.006)
    with torch.device("meta"):
        model, _ = peer(size, compiled=False)
        images, noise = torch.empty(1, 3, 224, 224), torch.empty(1, (224 // SIZES[size][3]) ** 2)
    with FlopCounterMode(display=False) as counter:
        model(images, noise=noise)
    assert counter.get_total_flops() == pytest.approx(forward_flops(size), rel=1e-6)


@pytest.mark.parametrize(("decoder", "share"), [("self", 0.955), ("cross", 0.36)])
def test_training_does_less_than_the_paper(decoder, share):
    pytest.importorskip("transformers")
    from mae_speed import forward_flops

    with torch.device("meta"):
        model, images = MAEPretrainer("vit_small_patch16_224", decoder=decoder), torch.empty(64, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model.masked_loss(images)
    assert counter.get_total_flops() / 64 / forward_flops("small") == pytest.approx(share, abs=0.005)
