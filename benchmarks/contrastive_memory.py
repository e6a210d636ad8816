"""Memory of contrastive losses beside open_clip's: what they keep for the backward pass, their peak, and their time.

    OMP_NUM_THREADS=1 python benchmarks/contrastive_memory.py                   # B = 2,048, D = 512, half a minute
    python benchmarks/contrastive_memory.py --device cuda --batch-size 32768

Kept are the bytes of all tensors that autograd saves, each once, without images and texts themselves, which the towers
keep anyway. The peak is that of all tensors of forward and backward pass together, gradients included. Rows take turns
for the times, of which medians are compared; on a CPU they are in processor time of the thread. Loss and gradients of a
row are first compared with open_clip's.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from side_by_side import milliseconds, where
from soft_topk import seconds
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from zoo.losses import contrastive_sigmoid_loss, contrastive_softmax_loss

Loss = Callable[..., Tensor]


def softmax(loss: Loss) -> Loss:
    """A loss without the bias, which softmax has none of."""
    return lambda images, texts, scale, bias: loss(images, texts, scale)


def rows(kind: str, chunks: list[int]) -> dict[str, Loss]:
    """Losses of images, texts, scale and bias, by name; open_clip's is the first."""
    ours = contrastive_sigmoid_loss if kind == "sigmoid" else contrastive_softmax_loss
    found = {f"open_clip, {kind}": SigLipLoss() if kind == "sigmoid" else ClipLoss(), f"ours, {kind}": ours}
    found |= {f"ours, {kind}, chunk {chunk}": partial(ours, chunk=chunk) for chunk in chunks}
    return found if kind == "sigmoid" else {name: softmax(loss) for name, loss in found.items()}


def inputs(count: int, dim: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2, count, dim, device=device), dim=-1).unbind()
    numbers = [torch.tensor([10.0], device=device), torch.tensor([-10.0], device=device)]
    return [each.clone().requires_grad_() for each in (images, texts, *numbers)]


def kept(loss: Loss, given: list[Tensor]) -> int:
    """Bytes that autograd saves, beside what it is given."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*given)  # noqa: F841  # what it holds must not be freed, whose addresses would be used again
    own = {each.untyped_storage().data_ptr() for each in given}
    return sum(size for address, size in sizes.items() if address not in own)


def both_passes(loss: Loss, given: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in given]
    value = loss(*leaves)
    value.backward()
    return value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def peak(loss: Loss, given: list[Tensor]) -> int:
    """Bytes that tensors take at the most in forward and backward pass, beside what they are given."""
    with MemTracker() as tracker:
        both_passes(loss, given)
    return sum(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())


def check(losses: dict[str, Loss], given: list[Tensor]) -> None:
    """Ends if a loss or a gradient is not the first row's."""
    expected, *others = (both_passes(loss, given) for loss in losses.values())
    for name, found in zip(list(losses)[1:], others, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
                raise SystemExit(f"{name} differs by {(ours - theirs).abs().max().item()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    given = inputs(args.batch_size, args.dim, args.device)
    print(f"B = {args.batch_size}, D = {args.dim}; {where(args.device, 'torch', 'open_clip_torch')}")
    for kind in ("sigmoid", "softmax"):
        losses = rows(kind, args.chunk)
        check(losses, given)
        runs = {name: lambda loss=loss: both_passes(loss, given) and None for name, loss in losses.items()}
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(seconds(run, 1, args.device == "cuda"))
        print("\n| | kept, MB | relative | peak, MB | relative | ms | relative |\n|---|---|---|---|---|---|---|")
        first: list[float] = []
        for name, loss in losses.items():
            values = [kept(loss, given) / 1e6, peak(loss, given) / 1e6, statistics.median(times[name])]
            first = first or values
            a, b, c = (f"{value / one:.3g}" for value, one in zip(values, first, strict=True))
            print(f"| {name} | {values[0]:.2f} | {a} | {values[1]:.1f} | {b} | {milliseconds(values[2])} | {c} |")


if __name__ == "__main__":
    main()
