"""How far each gradient estimator of E[f(z)] is off, and how much it varies, against exact enumeration.

    python benchmarks/estimators_bias.py --draws 200000 --seed 0

Two beds in float64: 3 latents of 4 categories, and 6 Bernoulli ones, 64 states each; f is a random tanh network with an
offset, from a seed of its own. The bias is the distance of the mean gradient from the exact one, the variance the sum
over coordinates of a single gradient's, both relative to the exact gradient (and its square). A bias of the size of its
standard error, in brackets, is none. VIMCO is compared with the gradient of its own multi-sample bound.
"""

import argparse
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from itertools import product

import torch
from torch import Tensor

from zoo.gumbel_vae.estimators import ESTIMATORS, Exact, create

TEMPERATURES = (1.0, 0.5, 0.1)
SAMPLES = {"rloo": (2, 4, 8), "vimco": (2,), "gumbel_softmax": (1,), "gumbel_rao": (10,)}
CHUNK = 10_000
STATES = torch.tensor(list(product(range(4), repeat=3))), torch.tensor(list(product(range(2), repeat=6)))

Cost = Callable[[Tensor], Tensor]


def bed(features: int) -> tuple[Tensor, Cost]:
    """Flat logits, one for each feature, and f from z (S, B, ...) to costs (S, B)."""
    generator = torch.Generator().manual_seed(0)
    logits, first, bias, second = (
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        for scale, shape in ((1.0, (features,)), (0.8, (features, 16)), (0.3, (16,)), (1.0, (16,)))
    )
    return logits, lambda z: 2 * torch.tanh(z.flatten(2) @ first + bias) @ second + 3


def exact(logits: Tensor, f: Cost, samples: int | None) -> tuple[float, Tensor]:
    """E[f(z)] and its gradient by enumeration; with samples, those of the multi-sample bound -log mean exp(-f(z_i))."""
    logits = logits.clone().requires_grad_()
    if logits.ndim == 1:
        z, full = STATES[1].double(), torch.stack([torch.zeros_like(logits), logits], -1)
    else:
        z, full = torch.eye(4, dtype=torch.float64)[STATES[0]], logits
    states = STATES[logits.ndim == 1]
    log_q = full.log_softmax(-1)[torch.arange(states.shape[1]), states].sum(-1)
    costs = f(z[:, None])[:, 0]
    if samples is not None:
        outcomes = torch.tensor(list(product(range(len(states)), repeat=samples)))
        log_q, costs = log_q[outcomes].sum(1), math.log(samples) - (-costs[outcomes]).logsumexp(1)
    value = (log_q.exp() * costs).sum()
    return value.item(), torch.autograd.grad(value, logits)[0]


def gradients(name: str, samples: int | None, logits: Tensor, f: Cost, temperature: float, draws: int) -> Tensor:
    """One independent gradient a row."""
    estimator = create(name, samples)
    found: list[Tensor] = []
    first = [CHUNK] if name == "reinforce_baseline" else []  # what earlier batches cost, not counted
    for count in [*first, *(min(CHUNK, draws - start) for start in range(0, draws, CHUNK))]:
        rows = logits.expand(count, *logits.shape).clone().requires_grad_()
        found += torch.autograd.grad(estimator.expectation(rows, f, temperature).sum(), rows)
    return torch.cat(found[len(first) :])


def row(name: str, samples: int | None, logits: Tensor, f: Cost, temperature: float, draws: int) -> str:
    _, truth = exact(logits, f, samples if name == "vimco" else None)
    found = gradients(name, samples, logits, f, temperature, 2 if ESTIMATORS[name] is Exact else draws)
    size, spread = truth.norm(), found.var(0).sum()
    bias, error = (found.mean(0) - truth).norm() / size, (spread / len(found)).sqrt() / size
    evaluations = create(name, samples).evaluations(len(logits), 2 if logits.ndim == 1 else logits.shape[1])
    told = f"{name}({samples})" if samples else name
    heat = f"{temperature:g}" if ESTIMATORS[name].differentiable else ""
    return f"| {told} | {heat} | {evaluations} | {bias:.4f} ({error:.4f}) | {spread / size**2:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200_000, help="single gradients of each estimator")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the beds are fixed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {version('torch')}, {arguments.draws} draws")
    categorical, bernoulli = bed(12), bed(6)
    for title, logits, f in (
        ("3 latents of 4 categories", categorical[0].view(3, 4), categorical[1]),
        ("6 Bernoulli latents", *bernoulli),
    ):
        print(f"\n{title}, E f = {exact(logits, f, None)[0]:.2f}\n")
        print("| estimator (samples) | temperature | evaluations of f | relative bias (s.e.) | relative variance |")
        print("|---|---|---|---|---|")
        for name, kind in ESTIMATORS.items():
            if kind.binary_only and logits.ndim == 2:
                continue
            for samples in SAMPLES.get(name, (None,)):
                for temperature in TEMPERATURES if kind.differentiable else TEMPERATURES[:1]:
                    torch.manual_seed(arguments.seed)
                    print(row(name, samples, logits, f, temperature, arguments.draws), flush=True)


if __name__ == "__main__":
    main()
