"""The benchmark scripts: what they reckon by formula is what torch counts. Their figures are never asserted."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo import MAEPretrainer
from zoo.gumbel_vae import estimators

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


def test_what_is_compared_of_detectors_has_one_loss():
    from detection_speed import losses_alone, train_ours, train_theirs

    device = torch.device("cpu")
    rows = [row.make(device) for row in losses_alone(device) if "compiled" not in row.name]
    theirs, ours = (row.loss(torch.zeros(1)).item() for row in rows)
    assert ours == pytest.approx(theirs, rel=1e-6)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    theirs, ours = train_theirs("resnet18", True, device), train_ours("resnet18", True, 64, device)
    assert ours.loss(images).item() == pytest.approx(theirs.loss(images).item(), rel=1e-4)


def test_the_table_of_detection_has_the_ratio_of_the_means(capsys, monkeypatch):
    import detection_shapes

    found = {"pyramid, strides 8 to 32": [0.5, 0.54], "one level, stride 16": [0.2, 0.32]}
    runs = {neck: iter(values) for neck, values in found.items()}
    made = lambda recipe, neck, *_: {"ap": next(runs[neck]), "ap_8_16": 0.0, "seconds": 60.0}  # noqa: E731
    monkeypatch.setattr(detection_shapes, "run", made)
    monkeypatch.setattr(sys, "argv", ["detection_shapes.py", "--seeds", "0", "1"])
    detection_shapes.main()
    printed = capsys.readouterr().out
    assert "| | AP | 8 to 16 px | seconds |" in printed
    assert "| pyramid, strides 8 to 32 | 52.0 ± 2.8 | 0.0 ± 0.0 | 60 |" in printed
    assert "| ratio | 2.0 | no other | |" in printed


def test_what_is_compared_of_autoencoders_has_one_loss():
    from gumbel_vae_speed import difference

    assert difference((torch.rand(16, 1, 28, 28) > 0.7).float()) < 1e-6


def test_the_table_of_estimators_has_a_row_for_each(capsys, monkeypatch):
    import estimators_bias

    monkeypatch.setattr(sys, "argv", ["estimators_bias.py", "--draws", "200"])
    estimators_bias.main()
    printed = capsys.readouterr().out
    for name in estimators.ESTIMATORS:
        assert f"| {name}" in printed
