"""Time of soft top-k, forward and backward, beside torch.topk with a softmax's backward, and beside optimal transport.

    OMP_NUM_THREADS=1 python benchmarks/soft_topk.py                           # (64, 1000), k = 10, a minute
    python benchmarks/soft_topk.py --device cuda --rows 4096 --entries 1000 --k 10

The first row is what a hard top-k with a gradient costs at the least: ``torch.topk`` forward, and the backward pass of
a softmax of the same size. Optimal transport is what else gives a valid mask (Xie et al. 2020, "Differentiable Top-k
with Optimal Transport"): Sinkhorn's iterations in the log domain, between the entries and two anchors, with autograd
through all of them; as many as its mask needs to sum to k but for 1e-3 of it. Rows take turns; medians are compared, on
a CPU in processor time of the thread, which other programs disturb less.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from side_by_side import milliseconds, where
from torch import Tensor

from zoo.losses import soft_topk


def sinkhorn_topk(x: Tensor, k: int, iterations: int, tau: float = 1.0) -> Tensor:
    """Mask of the k largest by optimal transport of n equal masses to two anchors, one of mass k and one of n - k."""
    n = x.shape[-1]
    gain = torch.stack([x, torch.zeros_like(x)], -1) / tau  # (..., n, 2)
    mass = x.new_tensor([k, n - k]).log()
    entries = -gain.logsumexp(-1)
    for _ in range(iterations):
        anchors = mass - (gain + entries.unsqueeze(-1)).logsumexp(-2)
        entries = -(gain + anchors.unsqueeze(-2)).logsumexp(-1)
    return (gain + entries.unsqueeze(-1) + anchors.unsqueeze(-2)).exp()[..., 0]


def iterations_needed(x: Tensor, k: int, error: float) -> int:
    """Iterations after which all masks sum to k, but for a relative error; their entries are below 1 after each."""
    for iterations in range(1, 1000):
        if (sinkhorn_topk(x, k, iterations).sum(-1) - k).abs().max() <= error * k:
            return iterations
    raise SystemExit("optimal transport does not converge")


def both_ways(mask: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(mask(leaf), leaf, grad) and None


def hard(x: Tensor, k: int, grad: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()
    chosen = leaf.softmax(-1)

    def run() -> None:
        x.topk(k, -1)
        torch.autograd.grad(chosen, leaf, grad, retain_graph=True)

    return run


def seconds(run: Callable[[], None], repeats: int, on_gpu: bool) -> float:
    clock = time.perf_counter if on_gpu else time.thread_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--entries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10, help="in a row, in each round")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    x, grad = torch.randn(2, args.rows, args.entries, device=args.device)
    iterations = iterations_needed(x, args.k, 1e-3)
    rows = {
        "torch.topk, softmax's backward": hard(x, args.k, grad),
        "soft top-k, sigmoid": both_ways(lambda x: soft_topk(x, args.k), x, grad),
        "soft top-k, laplace": both_ways(lambda x: soft_topk(x, args.k, kind="laplace"), x, grad),
        f"optimal transport, {iterations} iterations": both_ways(
            lambda x: sinkhorn_topk(x, args.k, iterations), x, grad
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        seconds(run, 3, args.device == "cuda")
    for _ in range(args.rounds):
        for name, run in rows.items():
            times[name].append(seconds(run, args.repeats, args.device == "cuda"))
    # Both are the same equation with the logistic kernel, solved in two ways.
    off = (soft_topk(x, args.k) - sinkhorn_topk(x, args.k, 20 * iterations)).abs().max().item()
    if not math.isfinite(off) or off > 1e-3:
        raise SystemExit(f"soft top-k and optimal transport differ by {off}")
    print(f"x {tuple(x.shape)}, k = {args.k}; {where(args.device, 'torch')}\n")
    print("| | ms | lowest to highest | relative |\n|---|---|---|---|")
    first = statistics.median(next(iter(times.values())))
    for name, found in times.items():
        median = statistics.median(found)
        spread = f"{milliseconds(min(found))} to {milliseconds(max(found))}"
        print(f"| {name} | {milliseconds(median)} | {spread} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
