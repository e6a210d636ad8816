"""Smooth max, one-hot, argmax, step, rounding, ranks, counts: bounds, limits, closed forms, derivatives, refusals."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import zoo.losses
from zoo.losses import (
    effective_count,
    smooth_max,
    smooth_min,
    smooth_round,
    smooth_step,
    soft_argmax,
    soft_argmax_2d,
    soft_count,
    soft_count_distinct,
    soft_one_hot,
    soft_rank,
)

KERNELS = ["logistic", "gaussian", "laplace"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALES = [1e-2, 1.0, 30.0, 1e3]
TAUS = [1e-2, 0.3, 1.0, 30.0]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


FUNCTIONS = {
    "smooth_max": smooth_max,
    "smooth_min": smooth_min,
    "soft_one_hot": soft_one_hot,
    "soft_argmax": soft_argmax,
    "soft_argmax_2d": soft_argmax_2d,
    **{f"smooth_step {kernel}": lambda x, kernel=kernel: smooth_step(x, 1.0, kernel) for kernel in KERNELS},
    **{f"smooth_round {kernel}": lambda x, kernel=kernel: smooth_round(x, 0.2, kernel) for kernel in KERNELS},
    "soft_rank": soft_rank,
    "soft_count": lambda x: soft_count(x, 0.3),
    "soft_count_distinct": lambda x: soft_count_distinct(x.softmax(-1)),
    "effective_count": lambda x: effective_count(x.softmax(-1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_first_and_second_order(name):
    x = noise(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], x)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], x)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_and_in_float32_at_least_for_all_scales(name, dtype):
    for scale in SCALES:
        x = (scale * noise(6, 9)).to(dtype).requires_grad_()
        found = FUNCTIONS[name](x)
        assert found.isfinite().all()
        if dtype != torch.float64:  # softmax of half precision is given in half
            assert found.dtype == torch.float32
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_by_vmap_and_the_same_under_autocast(name):
    x = noise(3, 4, 5)
    expected = torch.stack([FUNCTIONS[name](each) for each in x])
    torch.testing.assert_close(torch.vmap(FUNCTIONS[name])(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(FUNCTIONS[name](x[0]), expected[0])


@pytest.mark.slow
def test_compiled_in_one_graph():
    def all_of_them(x: Tensor) -> Tensor:
        return sum(function(x).square().sum() for function in FUNCTIONS.values())

    x = noise(4, 5, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, all_of_them(x))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(all_of_them(x), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_the_smooth_maximum_is_between_the_maximum_and_its_bound(n, dtype):
    for scale in SCALES:
        for sharpness in (0.03, 1.0, 20.0, 1e4):
            x = (scale * noise(20, n)).to(dtype)
            for found, hard in ((smooth_max(x, sharpness), x.amax(-1)), (-smooth_min(x, sharpness), (-x).amax(-1))):
                excess = found - hard.to(found.dtype)
                ulp = torch.finfo(found.dtype).eps * (found.abs() + math.log(n) / sharpness)
                assert (excess >= 0).all()
                assert (excess <= math.log(n) / sharpness + ulp).all()
    alike = torch.full((n,), 3.0, dtype=dtype)
    assert smooth_max(alike, 2.0).item() == pytest.approx(3 + math.log(n) / 2, rel=1e-6)


def test_the_gradient_of_the_smooth_maximum_is_the_soft_one_hot():
    x = noise(3, 7, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(smooth_max(x, 4.0).sum(), x)
    torch.testing.assert_close(gradient, soft_one_hot(x, 1 / 4))
    torch.testing.assert_close(soft_one_hot(x, 0.3), (x / 0.3).softmax(-1))
    torch.testing.assert_close(smooth_max(x, 4.0), (4 * x).logsumexp(-1) / 4)


def test_dimensions_of_the_reductions():
    x = noise(3, 4, 5)
    assert smooth_max(x, dim=1, keepdim=True).shape == (3, 1, 5)
    for dim in (0, 1, -1):
        last = x.movedim(dim, -1).contiguous()
        torch.testing.assert_close(smooth_max(x, dim=dim), smooth_max(last))
        torch.testing.assert_close(soft_argmax(x, dim=dim), soft_argmax(last))
        torch.testing.assert_close(soft_count(x, dim=dim), soft_count(last))
        torch.testing.assert_close(soft_rank(x, dim=dim), soft_rank(last).movedim(-1, dim))
        torch.testing.assert_close(soft_one_hot(x, dim=dim), soft_one_hot(last).movedim(-1, dim))
    empty = torch.empty(0, 5)
    shapes = {"soft_one_hot": (0, 5), "soft_rank": (0, 5)}
    for function in (smooth_max, smooth_min, soft_argmax, soft_count, soft_one_hot, soft_rank):
        assert function(empty).shape == shapes.get(function.__name__, (0,))
    assert smooth_round(empty).shape == smooth_step(empty).shape == (0, 5)
    assert soft_argmax_2d(torch.empty(0, 3, 5)).shape == (0, 2)
    assert soft_count(torch.empty(3, 0)).tolist() == [0, 0, 0]
    assert soft_count_distinct(torch.empty(0, 3)).item() == 0


@pytest.mark.parametrize("n", [2, 10, 200])
def test_one_hot_and_index_within_their_bounds(n):
    x = noise(50, n, dtype=torch.float64)
    best = x.topk(2)
    gap = -best.values.diff(dim=-1)
    hard = torch.nn.functional.one_hot(best.indices[:, 0], n).double()
    for tau in (1.0, 0.1, 1e-2, 1e-6):
        off = (soft_one_hot(x, tau) - hard).abs().sum(-1, keepdim=True)
        assert (off <= 2 * (n - 1) * (-gap / tau).exp() + 1e-14).all()
        off = (soft_argmax(x, tau) - best.indices[:, 0]).abs()[:, None]
        assert (off <= (n - 1) ** 2 * (-gap / tau).exp() + 1e-11).all()
    assert torch.equal(soft_argmax(10 * x, 1e-5).round().long(), x.argmax(-1))


def test_two_modes_have_a_mean_that_is_neither():
    x = torch.tensor([5.0, 0, 0, 0, 5.01])
    assert soft_argmax(x).item() == pytest.approx(2.01, abs=0.005)
    assert soft_argmax(x, 1e-3).item() == pytest.approx(4, abs=1e-3)


def test_row_and_column_of_a_peak():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(13.0), indexing="ij")
    peak = -((rows - 3.5) ** 2 + (columns - 7.25) ** 2)
    torch.testing.assert_close(soft_argmax_2d(peak), torch.tensor([3.5, 7.25]), rtol=0, atol=1e-3)
    x = noise(2, 3, 5, 6)
    flat = x.flatten(-2).argmax(-1)
    torch.testing.assert_close(soft_argmax_2d(x, 1e-5), torch.stack([flat // 6, flat % 6], -1).float())


def test_infinities_are_never_chosen_or_always():
    x = torch.tensor([1.0, -torch.inf, 2.0], requires_grad=True)
    for function in (smooth_max, soft_argmax, lambda x: soft_one_hot(x)[0]):
        finite = function(torch.tensor([1.0, -1e9, 2.0]))
        assert function(x).item() == pytest.approx(finite.item(), rel=1e-6)
        assert torch.autograd.grad(function(x), x)[0].isfinite().all()
    assert smooth_min(-x).item() == pytest.approx(-smooth_max(x).item())
    assert smooth_max(torch.full((3,), -torch.inf)).item() == -torch.inf
    assert smooth_max(torch.tensor([0.0, torch.inf])).item() == torch.inf
    ranks = soft_rank(torch.tensor([-torch.inf, 3.0, -torch.inf, torch.inf]), 0.1)
    torch.testing.assert_close(ranks, torch.tensor([3.5, 2.0, 3.5, 1.0]))
    assert soft_count(torch.tensor([-torch.inf, torch.inf, 5.0]), 1.0, 0.1).item() == pytest.approx(2)
    assert torch.autograd.grad(soft_rank(x)[0], x)[0].isfinite().all()
    for function in (smooth_max, soft_rank, soft_count, soft_argmax):
        assert function(torch.tensor([0.0, torch.nan])).isnan().any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_within_its_bound_and_in_the_limit(kernel):
    x = torch.arange(-600, 601, dtype=torch.float64) / 100
    step = torch.heaviside(x, torch.tensor(0.5, dtype=torch.float64))
    for tau in TAUS:
        found = smooth_step(x, tau, kernel)
        assert ((found - step).abs() <= (-x.abs() / tau).exp() + 1e-15).all()
        assert (found.diff() >= 0).all()
        torch.testing.assert_close(found + smooth_step(-x, tau, kernel), torch.ones_like(x))
    assert torch.equal(smooth_step(x, 1e-9, kernel), step)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_is_convolved_with_its_kernel(kernel):
    """The derivative is the kernel's density, whose integral is numerically 1."""
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64, requires_grad=True)
    (density,) = torch.autograd.grad(smooth_step(x, 1.5, kernel).sum(), x)
    expected = {
        "logistic": 1 / (4 * 1.5 * torch.cosh(x / 3) ** 2),
        "gaussian": (-(x**2) / (2 * 1.5**2)).exp() / (1.5 * math.sqrt(2 * math.pi)),
        "laplace": (-x.abs() / 1.5).exp() / 3,
    }[kernel]
    torch.testing.assert_close(density, expected)
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tau", [0.03, 0.2, 0.7, 1.9, 2.0, 5.0])
def test_rounding_is_its_fourier_series(kernel, tau):
    """x - round(x) is sum_m (-1)^(m+1) sin(2 pi m x) / (pi m), and a kernel multiplies each by its transform."""
    x, m = torch.linspace(-3.2, 3.2, 400, dtype=torch.float64), torch.arange(1.0, 20_000, dtype=torch.float64)
    t = 2 * math.pi * m * tau
    transform = {
        "logistic": torch.where(t < 200, math.pi * t / torch.sinh((math.pi * t).clamp(max=600)), 0.0),
        "gaussian": (-(t**2) / 2).exp(),
        "laplace": 1 / (1 + t**2),
    }[kernel]
    sign = 1 - 2 * ((m + 1) % 2)
    saw = (sign * transform / (math.pi * m) * torch.sin(2 * math.pi * m * x[:, None])).sum(-1)
    torch.testing.assert_close(
        smooth_round(x, tau, kernel), x - saw, rtol=0, atol=1e-7 if kernel == "laplace" else 1e-12
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_in_the_limit_monotone_and_periodic(kernel, dtype):
    x = torch.arange(-128, 129).to(dtype) / 32
    for tau in (1e-3, 0.1, 0.5, 3.0):
        found = smooth_round(x, tau, kernel)
        assert (found.diff() >= -1e-6).all()
        torch.testing.assert_close(smooth_round(x + 1, tau, kernel), found + 1, rtol=0, atol=1e-6)
        fixed = x[::16]  # whole numbers and halves
        torch.testing.assert_close(smooth_round(fixed, tau, kernel), fixed.to(found.dtype), rtol=0, atol=1e-6)
    clear = x[(x - x.floor()) != 0.5]
    torch.testing.assert_close(smooth_round(clear, 1e-4, kernel), clear.round().to(found.dtype))
    assert smooth_round(torch.tensor(1e6, dtype=torch.float64) + 0.2, 1e-3, kernel).item() == 1e6


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_are_those_of_sorting_in_the_limit(dtype):
    for scale in SCALES:
        x = scale * torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s)) for s in range(5)])
        hard = x.argsort(-1, descending=True).argsort(-1) + 1
        found = soft_rank(x.to(dtype), 0.01 * scale)
        assert torch.equal(found, hard.to(found.dtype))
        soft = soft_rank((scale * noise(5, 40)).to(dtype))
        torch.testing.assert_close(soft.sum(-1), torch.full_like(soft[:, 0], 820.0))
        assert ((soft >= 1 - 1e-5) & (soft <= 40 + 1e-5)).all()
    tied = soft_rank(torch.tensor([1.0, 5.0, 1.0, 9.0]), 0.01)
    torch.testing.assert_close(tied, torch.tensor([3.5, 2.0, 3.5, 1.0]))
    x = noise(3, 20)
    torch.testing.assert_close(soft_rank(x, 1e6), torch.full_like(x, 10.5))
    in_order = soft_rank(x).gather(-1, x.argsort(-1, descending=True))
    assert (in_order.diff(dim=-1) >= 0).all()
    apart = 0.5 * torch.arange(20.0, dtype=torch.float64)
    assert ((soft_rank(apart, 0.1) - torch.arange(20, 0, -1)).abs() <= 19 * math.exp(-5)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_counts_in_the_limit(kernel):
    x = noise(30, 50, dtype=torch.float64)
    hard = (x > 0.4).sum(-1).double()
    away = (x - 0.4).abs().amin(-1)
    for tau in (1.0, 0.1, 1e-2):
        off = (soft_count(x, 0.4, tau, kernel=kernel) - hard).abs()
        assert (off <= 50 * (-away / tau).exp()).all()
    torch.testing.assert_close(soft_count(x, 0.4, 1e-7, kernel=kernel), hard)
    assert soft_count(torch.tensor([0.0, 1.0, 2.0]), 1.0, 1e-3, kernel=kernel).item() == pytest.approx(1.5)
    thresholds = torch.tensor([[0.0], [0.4]], dtype=torch.float64)
    torch.testing.assert_close(soft_count(x[:2], thresholds)[1], soft_count(x[1], 0.4))


def test_distinct_classes_are_those_that_occur():
    for seed in range(20):
        labels = torch.randint(12, (9,), generator=torch.Generator().manual_seed(seed))
        hot = torch.nn.functional.one_hot(labels, 12)
        assert soft_count_distinct(hot.float()).item() == pytest.approx(len(labels.unique()), rel=1e-6)
        x = noise(9, 12, seed=seed)
        found = soft_count_distinct(x.softmax(-1)).item()
        assert 1 <= found <= 9
        assert soft_count_distinct(soft_one_hot(x, 1e-6)).item() == pytest.approx(len(x.argmax(-1).unique()), rel=1e-5)
        sampled = torch.stack([soft_one_hot(x, 1.0)] * 2)
        torch.testing.assert_close(soft_count_distinct(sampled)[1], torch.tensor(found))
    p = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 20
    torch.testing.assert_close(soft_count_distinct(p), (1 - (1 - p).prod(-2)).sum())
    rare = torch.full((1000, 1), 1e-9)
    assert soft_count_distinct(rare).item() == pytest.approx(1e-6, rel=1e-4)


def test_a_class_that_is_sure_to_occur_has_the_gradient_of_the_product_over_the_others():
    p = torch.tensor([[1.0, 0.3, 0.0], [0.2, 1.0, 0.0], [0.5, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_count_distinct(p), p)
    expected = torch.tensor([[0.4, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_the_effective_count_is_the_number_of_classes_used_alike():
    for c in (1, 4, 10):
        p = torch.zeros(20, 10)
        p[torch.arange(20), torch.arange(20) % c] = 1.0
        assert effective_count(p).item() == pytest.approx(c, rel=1e-6)
    p = noise(30, 10).softmax(-1)
    entropy = torch.distributions.Categorical(p.mean(0)).entropy()
    torch.testing.assert_close(effective_count(p), entropy.exp())
    p = torch.eye(4)[:2].requires_grad_()
    assert torch.autograd.grad(effective_count(p), p)[0].isfinite().all()


ZEROS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: smooth_max(ZEROS, 0.0), ValueError, "sharpness is 0.0: it has to be above 0, and finite"),
        (lambda: smooth_min(ZEROS, -1.0), ValueError, "sharpness is -1.0"),
        (lambda: smooth_max(ZEROS.long()), TypeError, "x is torch.int64: a smooth function takes floating point"),
        (lambda: smooth_max(torch.zeros(3, 0)), ValueError, r"no entries along dimension -1: its shape is \(3, 0\)"),
        (lambda: smooth_max(torch.zeros(())), ValueError, r"no entries along dimension -1: its shape is \(\)"),
        (lambda: smooth_max(ZEROS, dim=2), IndexError, "range"),
        (lambda: soft_one_hot(ZEROS, math.inf), ValueError, "tau is inf"),
        (lambda: soft_one_hot(torch.zeros(0, 3), dim=0), ValueError, "no entries along dimension 0"),
        (lambda: soft_argmax(ZEROS.bool()), TypeError, "torch.bool"),
        (lambda: soft_argmax_2d(torch.zeros(4)), ValueError, r"shape \(4,\): a map has rows and columns"),
        (lambda: smooth_step(ZEROS, -1.0), ValueError, "tau is -1.0"),
        (
            lambda: smooth_step(ZEROS, kernel="box"),
            ValueError,
            "kernel is 'box': .* one of logistic, gaussian, laplace",
        ),
        (lambda: smooth_round(ZEROS, kernel="box"), ValueError, "kernel is 'box'"),
        (lambda: smooth_round(ZEROS.int()), TypeError, "torch.int32"),
        (lambda: soft_rank(torch.zeros(3, 0)), ValueError, "no entries"),
        (lambda: soft_rank(ZEROS, 0.0), ValueError, "tau is 0.0"),
        (lambda: soft_count(ZEROS, tau=0.0), ValueError, "tau is 0.0"),
        (lambda: soft_count(ZEROS, kernel="box"), ValueError, "kernel is 'box'"),
        (lambda: soft_count_distinct(torch.zeros(3)), ValueError, r"shape \(3,\): it has to be \(..., B, C\)"),
        (lambda: soft_count_distinct(ZEROS.long()), TypeError, "probabilities is torch.int64"),
        (lambda: effective_count(torch.zeros(0, 3)), ValueError, "no rows"),
    ],
)
def test_what_means_nothing_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_the_door_needs_no_lightning():
    program = "import sys, zoo; zoo.losses.smooth_max; print({'lightning', 'pytorch_lightning'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert all(hasattr(zoo.losses, name) for name in zoo.losses.__all__)
