"""Time of a MAE training step, side by side with Hugging Face's ViTMAE.

    python benchmarks/mae_speed.py                                      # ViT-S/16, fp32, on the CPU
    python benchmarks/mae_speed.py --device cuda --size base large --batch-size 256   # bf16, with memory and MFU

Every row takes full steps (forward, backward, fused AdamW) on the same random images. Rows take turns, so that a busy
moment of the machine hits all of them alike; what is compared are medians. The peer, transformers'
`ViTMAEForPreTraining`, gets the same sizes, epsilon, weight decay and optimizer, with SDPA attention; on a GPU also as
people run it, eager attention under fp16 autocast with a gradient scaler.

FLOPs are those of the paper's arithmetic, 3 times the forward pass of encoder on visible and decoder on all patches,
for every row: what a row saves counts as speed. MFU is against the dense peak of the device, --peak TFLOP/s.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import Row, Training, add_arguments, measure, report, where
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from zoo import MAEPretrainer
from zoo.common import optim

SIZES = {  # width, depth, heads, patch
    "tiny": (192, 12, 3, 16),
    "small": (384, 12, 6, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}
IMAGE, DECODER = 224, (512, 8, 16)


def ours(size: str, compiled: bool, **options: Any) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    patch = SIZES[size][3]
    model = MAEPretrainer(f"vit_{size}_patch{patch}_224", **options)
    if compiled:
        model.compile()
    return model, model.masked_loss


def peer(size: str, compiled: bool, attention: str = "sdpa") -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    width, depth, heads, patch = SIZES[size]
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        image_size=IMAGE,
        decoder_hidden_size=DECODER[0],
        decoder_num_hidden_layers=DECODER[1],
        decoder_num_attention_heads=DECODER[2],
        decoder_intermediate_size=4 * DECODER[0],
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    model = ViTMAEForPreTraining(config)
    assert model.config._attn_implementation == attention
    if compiled:
        model.compile()
    return model, lambda images: model(images).loss


def forward_flops(size: str) -> float:
    """Of one image at a mask ratio of 0.75, in the paper's arithmetic: 2 for each multiplication with addition."""
    width, depth, _, patch = SIZES[size]
    patches, pixels = (IMAGE // patch) ** 2, 3 * patch**2
    tokens = patches // 4 + 1

    def blocks(count: int, n: int, d: int) -> float:
        return count * (24 * n * d**2 + 4 * n**2 * d)

    decoder = 2 * tokens * width * DECODER[0] + 2 * (patches + 1) * DECODER[0] * pixels
    decoder += blocks(DECODER[1], patches + 1, DECODER[0])
    return 2 * patches * pixels * width + blocks(depth, tokens, width) + decoder


def training(make: Callable[[], tuple[torch.nn.Module, Callable[[Tensor], Tensor]]], device: torch.device) -> Training:
    module, loss = make()
    module.to(device)
    return Training(module, loss, optim.create_optimizer(module, "adamw", 1.5e-4, 0.05, betas=(0.9, 0.95)))


def rows(size: str, on_gpu: bool) -> list[Row]:
    def row(name: str, dtype: torch.dtype, make: Callable[..., Any], *args: Any, **options: Any) -> Row:
        return Row(name, partial(training, partial(make, size, *args, **options)), dtype)

    cross = {"decoder": "cross", "predict_ratio": 0.25}
    fp32, bf16 = torch.float32, torch.bfloat16
    if on_gpu:
        return [
            row("Hugging Face, eager, fp16", torch.float16, peer, False, "eager"),
            row("Hugging Face, SDPA, bf16, compiled", bf16, peer, True),
            row("ours, bf16", bf16, ours, False),
            row("ours, bf16, compiled", bf16, ours, True),
            row("ours, cross 25 %, bf16, compiled", bf16, ours, True, **cross),
        ]
    return [
        row("Hugging Face, SDPA", fp32, peer, False),
        row("Hugging Face, SDPA, compiled", fp32, peer, True),
        row("ours", fp32, ours, False),
        row("ours, compiled", fp32, ours, True),
        row("ours, cross 25 %", fp32, ours, False, **cross),
        row("ours, cross 25 %, compiled", fp32, ours, True, **cross),
        row("ours, cross 25 %, 12 blocks, compiled", fp32, ours, True, decoder_depth=12, **cross),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    add_arguments(parser)
    parser.add_argument(
        "--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the device: H100 and H200, 989"
    )
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # for what autocast leaves in float32
    print(where(arguments.device, "torch", "timm", "transformers"))
    for size in arguments.size:
        torch.manual_seed(0)
        images = torch.randn(arguments.batch_size, 3, IMAGE, IMAGE, device=arguments.device)
        results, flops = rows(size, on_gpu), 3 * forward_flops(size)
        measure(results, images, arguments.rounds, arguments.steps)
        print(f"\nViT-{size[0].upper()}/{SIZES[size][3]} at {IMAGE}, batch {arguments.batch_size}; ", end="")
        print(f"paper's arithmetic: {flops / 1e9:.1f} GFLOP an image and step\n")
        report(results, arguments.batch_size, on_gpu, flops, arguments.peak)


if __name__ == "__main__":
    main()
