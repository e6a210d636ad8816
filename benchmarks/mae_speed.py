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
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from zoo import MAEPretrainer, optim

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


class Row:
    """One way to train, and the times of its steps."""

    def __init__(self, name: str, make: Callable[[], tuple[torch.nn.Module, Callable[[Tensor], Tensor]]], dtype: Any):
        self.name, self.make, self.dtype = name, make, dtype
        self.seconds: list[float] = []
        self.memory = 0.0

    def build(self, images: Tensor) -> None:
        module, self.loss = self.make()
        module.to(images.device).train()
        self.images = images
        self.optimizer = optim.create_optimizer(module, "adamw", 1.5e-4, 0.05, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=self.dtype == torch.float16)

    def forget(self) -> None:
        del self.loss, self.optimizer, self.scaler
        torch.cuda.empty_cache()

    def step(self) -> None:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.images)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def run(self, steps: int) -> float:
        """Seconds a step."""
        on_gpu = self.images.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if on_gpu:
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated() / 2**30
        return (time.perf_counter() - start) / steps


def rows(size: str, on_gpu: bool) -> list[Row]:
    cross = {"decoder": "cross", "predict_ratio": 0.25}
    fp32, bf16 = torch.float32, torch.bfloat16
    if on_gpu:
        return [
            Row("Hugging Face, eager, fp16", partial(peer, size, False, "eager"), torch.float16),
            Row("Hugging Face, SDPA, bf16, compiled", partial(peer, size, True), bf16),
            Row("ours, bf16", partial(ours, size, False), bf16),
            Row("ours, bf16, compiled", partial(ours, size, True), bf16),
            Row("ours, cross 25 %, bf16, compiled", partial(ours, size, True, **cross), bf16),
        ]
    return [
        Row("Hugging Face, SDPA", partial(peer, size, False), fp32),
        Row("Hugging Face, SDPA, compiled", partial(peer, size, True), fp32),
        Row("ours", partial(ours, size, False), fp32),
        Row("ours, compiled", partial(ours, size, True), fp32),
        Row("ours, cross 25 %", partial(ours, size, False, **cross), fp32),
        Row("ours, cross 25 %, compiled", partial(ours, size, True, **cross), fp32),
        Row("ours, cross 25 %, 12 blocks, compiled", partial(ours, size, True, decoder_depth=12, **cross), fp32),
    ]


def measure(size: str, images: Tensor, rounds: int, steps: int) -> list[Row]:
    """On a GPU one row after the other, since their memory is measured; on a CPU in turns."""
    on_gpu = images.device.type == "cuda"
    results = rows(size, on_gpu)
    for group in [[row] for row in results] if on_gpu else [results]:
        for row in group:
            row.build(images)
            row.run(3)  # warms up and compiles
        for _ in range(rounds):
            for row in group:
                row.seconds.append(row.run(steps))
        for row in group:
            row.forget()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps in a row, in each round")
    parser.add_argument(
        "--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the device: H100 and H200, 989"
    )
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # for what autocast leaves in float32
    where = torch.cuda.get_device_name() if on_gpu else f"{len(os.sched_getaffinity(0))} CPU cores"
    print(f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, ", end="")
    print(f"transformers {version('transformers')}, {where}")
    for size in arguments.size:
        torch.manual_seed(0)
        images = torch.randn(arguments.batch_size, 3, IMAGE, IMAGE, device=arguments.device)
        results = measure(size, images, arguments.rounds, arguments.steps)
        report(size, arguments.batch_size, results, arguments.peak if on_gpu else None)


def report(size: str, batch: int, results: list[Row], peak: float | None) -> None:
    print(f"\nViT-{size[0].upper()}/{SIZES[size][3]} at {IMAGE}, batch {batch}; paper's arithmetic: ", end="")
    print(f"{3 * forward_flops(size) / 1e9:.1f} GFLOP an image and step\n")
    gpu = " images/s | GiB | MFU |" if peak else ""
    print(f"| | ms a step | lowest to highest | relative |{gpu}")
    print("|---|---|---|---|" + "---|---|---|" * bool(peak))
    first = statistics.median(results[0].seconds)
    for row in results:
        median = statistics.median(row.seconds)
        line = f"| {row.name} | {1e3 * median:.0f} | {1e3 * min(row.seconds):.0f} to {1e3 * max(row.seconds):.0f} | "
        line += f"{median / first:.3f} |"
        if peak:
            mfu = 3 * forward_flops(size) * batch / median / (peak * 1e12)
            line += f" {batch / median:.0f} | {row.memory:.1f} | {100 * mfu:.0f} % |"
        print(line)


if __name__ == "__main__":
    main()
