"""Images of several sizes in one batch: packed, padded, and as one row under a mask, over the share of padding.

    python benchmarks/packed_speed.py
    python benchmarks/packed_speed.py --device cuda --dtype bfloat16 --batch-size 128 --width 768 --depth 12

Forward and backward pass of one network with the same weights: timm's NaFlexViT, which pads images to the longest and
masks what is padded; ``zoo.packed_vit.PackedViT``, flat tokens of which each image attends to itself; and the same
tokens as one row whose mask keeps images apart. The share of padding is that of the tokens that NaFlexViT computes for
nothing. Rows take turns; ratios are medians over the rounds of a row's time by padding's in the same round. The
crossing point is where packing and padding take the same time, between the shares measured.
"""

import argparse
import copy
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import timm
import torch
from side_by_side import where
from torch import Tensor, nn

from zoo.packed_vit import PackedViT, Packing, Patches

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ROWS = ("padded", "packed", "one row, masked")
Timed = Callable[[], Tensor]


def grids_of(share: float, count: int, most: int) -> list[tuple[int, int]]:
    """Grids of images of which one has ``most`` patches a side, and padding all to it is such a share.

    Sides of the others are between a least and the most, evenly in their numbers of tokens; the least is sought.
    """
    best: list[tuple[int, int]] = []
    for least in range(most * most, 0, -1):
        counts = [most * most] + [
            round(least * (most * most / least) ** (place / max(1, count - 2))) for place in range(count - 1)
        ]
        sides = [max(1, round(tokens**0.5)) for tokens in counts]
        found = [(side, max(1, round(tokens / side))) for side, tokens in zip(sides, counts, strict=True)]
        if not best or abs(padding(found) - share) < abs(padding(best) - share):
            best = found
    return best


def padding(grids: list[tuple[int, int]]) -> float:
    """The share of tokens that are padding."""
    counts = [rows * columns for rows, columns in grids]
    return 1 - sum(counts) / (len(counts) * max(counts))


def in_rows(width: int, depth: int, grids: list[tuple[int, int]], device: torch.device) -> dict[str, Timed]:
    """Features (B, D) of the same images, in each way."""
    torch.manual_seed(0)
    sizes = {"embed_dim": width, "depth": depth, "num_heads": width // 64, "num_classes": 0}
    network = timm.create_model("naflexvit_base_patch16_gap", **sizes).to(device)
    packed = PackedViT(copy.deepcopy(network)).to(device)
    packing = Packing.of(grids, packed.prefix)
    pixels = torch.randn(sum(packing.counts), network.embeds.proj.in_features, device=device)
    patches = Patches(pixels, tuple(grids))

    padded = nn.utils.rnn.pad_sequence(pixels.split(packing.counts), batch_first=True)
    valid = torch.arange(padded.shape[1], device=device) < torch.tensor(packing.counts, device=device)[:, None]
    places = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]
    places_of = nn.utils.rnn.pad_sequence(places, batch_first=True).to(device)
    owners = packing.owners(device)
    mask = owners[:, None] == owners

    def as_one_row() -> Tensor:
        tokens = packed.norm_pre(packed.pos_drop(packed.embed(patches, packing)))[None]
        for block in packed.blocks:
            tokens = block(tokens, attn_mask=mask)
        return packed.pool(packed.norm(tokens[0]), packing)

    return {
        "padded": lambda: network(padded, patch_coord=places_of, patch_valid=valid),
        "packed": lambda: packed(patches),
        "one row, masked": as_one_row,
    }


def seconds(call: Timed, dtype: torch.dtype, device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        features = call()
    features.float().square().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def crossing(shares: list[float], ratios: list[float]) -> str:
    """The share at which a ratio falls below 1, interpolated."""
    points = list(zip(shares, ratios, strict=True))
    for (low, above), (high, below) in pairwise(points):
        if above > 1 >= below:
            return f"{100 * (low + (high - low) * (above - 1) / (above - below)):.0f} %"
    return "none among these" if ratios[-1] > 1 else f"below {100 * shares[0]:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--width", type=int, default=192, help="a multiple of 64, the width of a head")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="patches along the largest image's sides")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    print(
        f"{where(arguments.device, 'torch', 'timm')}, {torch.get_num_threads()} threads; {arguments.depth} blocks of "
        f"width {arguments.width}, {arguments.batch_size} images of at most {arguments.side}x{arguments.side} patches, "
        f"{arguments.dtype}\n"
    )
    print(
        "| padding | tokens | padded, ms | packed | one row, masked | largest difference |\n|---|---|---|---|---|---|"
    )
    shares, ratios = [], []
    for share in SHARES:
        grids = grids_of(share, arguments.batch_size, arguments.side)
        calls = in_rows(arguments.width, arguments.depth, grids, device)
        with torch.no_grad():
            expected = calls["padded"]()
            difference = max(float((calls[name]() - expected).abs().max()) for name in ROWS[1:])
        found = {name: list[float]() for name in ROWS}
        for number in range(arguments.rounds + 1):  # the first warms up
            for name in ROWS[number % 3 :] + ROWS[: number % 3]:
                found[name].append(seconds(calls[name], dtype, device, clock))
        of = {
            name: median(own / base for own, base in zip(times[1:], found["padded"][1:], strict=True))
            for name, times in found.items()
        }
        shares.append(padding(grids))
        ratios.append(of["packed"])
        print(
            f"| {100 * shares[-1]:.0f} % | {sum(r * c for r, c in grids)} | {1e3 * median(found['padded'][1:]):.0f} | "
            f"{of['packed']:.2f} | {of['one row, masked']:.2f} | {difference:.0e} |",
            flush=True,
        )
    print(f"\nPacking and padding take the same time at a share of padding of {crossing(shares, ratios)}.")


if __name__ == "__main__":
    main()
