"""How far our MAE is from Hugging Face's with the same weights, images and masks.

    python benchmarks/mae_parity.py --size base

Both run on the CPU in float32, ours under bf16 autocast as well. Weights are random, of a size that makes every part
count, and go from there to here through `zoo.weights.load`. The tests hold the same on a small network.
"""

import argparse
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from mae_speed import IMAGE, SIZES, peer

from zoo import MAEPretrainer, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    theirs, _ = peer(arguments.size, compiled=False)
    with torch.no_grad():
        for parameter in theirs.parameters():  # as Hugging Face initialises them, positions and tokens would be zero
            parameter.normal_(std=0.02).add_(1.0 if parameter.ndim == 1 else 0.0)
    patch = SIZES[arguments.size][3]
    ours = MAEPretrainer(f"vit_{arguments.size}_patch{patch}_224")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder, "peer.pth"))
        report = weights.load(ours, Path(folder, "peer.pth"))
    images = torch.randn(arguments.batch_size, 3, IMAGE, IMAGE)
    noise = torch.rand(arguments.batch_size, (IMAGE // patch) ** 2)
    with torch.no_grad():
        expected, full, cheap = theirs(images, noise=noise), ours(images, noise), ours.masked_loss(images, noise)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = ours(images, noise)
    print(f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}")
    print(f"ViT-{arguments.size}, {report.loaded} of {report.total} tensors loaded\n")
    print("| | |\n|---|---|")
    print(f"| masks equal | {torch.equal(expected.mask, full.mask)} |")
    print(f"| loss, theirs | {expected.loss:.6f} |")
    print(f"| relative difference of the loss, forward | {abs(full.loss / expected.loss - 1):.1e} |")
    print(f"| relative difference of the loss, what training computes | {abs(cheap / expected.loss - 1):.1e} |")
    print(f"| largest difference of a prediction | {(full.prediction - expected.logits).abs().max():.1e} |")
    print(f"| root mean square of the predictions | {expected.logits.square().mean().sqrt():.2f} |")
    print(f"| difference of the loss under bf16 autocast | {abs(mixed.loss - expected.loss):.1e} |")


if __name__ == "__main__":
    main()
