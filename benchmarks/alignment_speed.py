"""Time of a training step of ImageTextAligner, side by side with open_clip's CLIP.

    python benchmarks/alignment_speed.py                                        # batch 256, on the CPU, some minutes
    python benchmarks/alignment_speed.py --loss sigmoid
    python benchmarks/alignment_speed.py --device cuda --width 512 --depth 12 --image-size 224 --patch-size 16

Every row takes full steps (forward, backward, AdamW of the same make) on the same random images and texts. The towers
are CLIP's, of the same sizes, and begin with the same weights: the script ends if the first losses differ. open_clip's
gets its tokens ready; ours makes them of captions within the step. Both scales are left to the optimizer alone.

Rows take turns, so that a busy moment of the machine hits all of them alike; what is compared are medians, on a CPU in
processor time of all threads. Compiled is the network, by ``model.compile()``; losses are not.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
from side_by_side import Row, Training, add_arguments, measure, report, where
from torch import Tensor, nn

from zoo import ImageTextAligner
from zoo.common import optim
from zoo.common.captions import CaptionBatch

CONTEXT = 32


def create_peer(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"width": args.width, "layers": args.depth}
    vision = {"image_size": args.image_size, "patch_size": args.patch_size, "head_width": args.head_width}
    text = {"context_length": CONTEXT, "vocab_size": 260, "heads": args.width // args.head_width}
    bias = {"init_logit_bias": -10.0} if args.loss == "sigmoid" else {}
    return open_clip.CLIP(args.width, vision_cfg=vision | sizes, text_cfg=text | sizes, **bias)


def create_ours(args: argparse.Namespace) -> ImageTextAligner:
    """An aligner with the weights of open_clip's."""
    heads = args.width // args.head_width
    image = timm.create_model(
        "vit_base_patch16_clip_224",
        num_classes=0,
        img_size=args.image_size,
        patch_size=args.patch_size,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=heads,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "open_clip.pt")
        torch.save(create_peer(args).state_dict(), path)
        return ImageTextAligner(
            image,
            embed_dim=args.width,
            loss=args.loss,
            weights=str(path),
            context_length=CONTEXT,
            text_width=args.width,
            text_depth=args.depth,
            text_heads=heads,
        )


def captions(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return [f"a photo of number {number}" for number in torch.randint(10**9, (count,), generator=generator).tolist()]


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return optim.create_optimizer(module, "adamw", 5e-4, 0.2, betas=(0.9, 0.98))


def train_peer(args: argparse.Namespace, compiled: bool, device: torch.device) -> Training:
    model = create_peer(args).to(device)
    tokens = create_ours(args).tokens(captions(args.batch_size)).to(device)
    loss = open_clip.loss.SigLipLoss() if args.loss == "sigmoid" else open_clip.loss.ClipLoss()
    if compiled:
        model.compile()
    return Training(model, lambda images: loss(*model(images, tokens)), optimizer(model))


def train_ours(args: argparse.Namespace, compiled: bool, device: torch.device) -> Training:
    model = create_ours(args).to(device)
    texts, owners = captions(args.batch_size), torch.arange(args.batch_size, device=device)
    if compiled:
        model.compile()

    def loss(images: Tensor) -> Tensor:
        return model.losses(CaptionBatch(images, texts, owners))["contrastive"]

    return Training(model, loss, optimizer(model))


def check(args: argparse.Namespace, images: Tensor) -> None:
    """Ends if the losses that rows begin with differ."""
    theirs, ours = (make(args, False, images.device).loss(images).item() for make in (train_peer, train_ours))
    if abs(theirs - ours) > 1e-4 * abs(theirs):
        raise SystemExit(f"the first losses differ, {theirs} and {ours}: these are not the same towers")
    print(f"first loss {theirs:.5f} and {ours:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["softmax", "sigmoid"], default="softmax")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled, which takes minutes")
    parser.add_argument("--width", type=int, default=128, help="of both towers and the embeddings")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    add_arguments(parser)
    parser.set_defaults(batch_size=256, rounds=9, steps=1)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if not on_gpu:
        Row.clock = time.process_time
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    print(where(args.device, "torch", "timm", "open_clip_torch"))
    check(args, images)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = [
        Row(f"{name}{', compiled' * compiled}", partial(make, args, compiled), dtype)
        for compiled in ((False,) if args.eager else (False, True))
        for name, make in (("open_clip", train_peer), ("ours", train_ours))
    ]
    measure(rows, images, args.rounds, args.steps)
    print(f"\n{args.loss} loss, batch {args.batch_size}, towers of width {args.width} and depth {args.depth}, ", end="")
    print(f"{(args.image_size // args.patch_size) ** 2} patches and {CONTEXT} tokens\n")
    report(rows, args.batch_size, on_gpu)


if __name__ == "__main__":
    main()
