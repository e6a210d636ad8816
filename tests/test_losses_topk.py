"""Soft top-k: its equation by other means, its limits and bounds, its derivatives, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from zoo.losses import soft_kth_largest, soft_topk
from zoo.losses.soft import laplace_distribution

KINDS = {"sigmoid": torch.sigmoid, "laplace": laplace_distribution}
SIZES = [(2, 1), (10, 1), (10, 5), (10, 9), (100, 10), (100, 50), (1000, 10), (1000, 990)]
SCALES = [1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_bisection(x: Tensor, k: int, tau: float, kind: str) -> Tensor:
    """The article's way, to the last bit of float64."""
    low, high = (x / tau).amin(-1, keepdim=True) - 50, (x / tau).amax(-1, keepdim=True) + 50
    for _ in range(120):
        middle = (low + high) / 2
        above = KINDS[kind](x / tau - middle).sum(-1, keepdim=True) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return KINDS[kind](x / tau - low)


def by_sorting(x: Tensor, k: int) -> Tensor:
    """Laplace's closed form for one row: with m entries above t, m - k = (P e^t - Q e^-t) / 2 is quadratic in e^t."""
    z = x.sort(descending=True).values
    for m in range(len(z) + 1):
        p, q = (-z[:m]).exp().sum(), z[m:].exp().sum()
        t = torch.log(q / (2 * k)) if m == 0 else torch.log((m - k + torch.sqrt((m - k) ** 2 + p * q)) / p)
        if (m == 0 or z[m - 1] >= t) and (m == len(z) or z[m] <= t):
            return laplace_distribution(x - t)
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_mask_of_the_threshold_that_bisection_finds(n, k, kind):
    for scale in (0.01, 1.0, 10.0):
        for x in (noise(20, n, dtype=torch.float64), noise(20, n, dtype=torch.float64) ** 3):
            expected = by_bisection(scale * x, k, 0.7, kind)
            torch.testing.assert_close(soft_topk(scale * x, k, 0.7, kind), expected, rtol=1e-9, atol=1e-11)
            mask = soft_topk((scale * x).float(), k, 0.7, kind)
            torch.testing.assert_close(mask, expected.float(), rtol=0, atol=2e-6 * max(1.0, scale))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (10, 3), (50, 20)])
def test_laplaces_closed_form(n, k):
    x = noise(n, dtype=torch.float64)
    torch.testing.assert_close(soft_topk(x, k, kind="laplace"), by_sorting(x, k), rtol=1e-12, atol=0)


def test_one_of_many_by_laplace_is_softmax():
    x = noise(5, 50, dtype=torch.float64)
    assert x.softmax(-1).max() < 0.5
    torch.testing.assert_close(soft_topk(3 * x, 1, 3.0, "laplace"), x.softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_worked_answers(kind):
    alike = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(soft_topk(alike, 2, kind=kind), torch.full_like(alike, 0.25))
    two = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(two, 1, kind=kind), KINDS[kind](two))
    tied = torch.tensor([5.0, 0.0, 0.0, 0.0, -5.0], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(tied, 2, 0.01, kind), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 0]).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_mask_within_bounds_that_sums_to_k_and_keeps_the_order(n, k, dtype, kind):
    for scale in SCALES:
        for row, x in enumerate((noise(16, n), noise(16, n) ** 3, noise(16, n).abs().sqrt(), noise(16, n).round())):
            x = (scale * x).to(dtype).requires_grad_()
            mask = soft_topk(x, k, kind=kind)
            assert mask.dtype == torch.promote_types(dtype, torch.float32)
            assert ((mask >= 0) & (mask <= 1)).all()
            assert (mask.sum(-1) - k).abs().max() <= 1e-5 * k, (scale, row)
            in_order = mask.gather(-1, x.argsort(-1))
            assert (in_order.diff(dim=-1) >= -3e-7).all(), (scale, row)
            (gradient,) = torch.autograd.grad(mask, x, noise(16, n).to(mask.dtype))
            assert gradient.isfinite().all()
            assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_and_shifted_as_its_entries_are(kind):
    x, order = noise(7, 30), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    mask = soft_topk(x, 4, 0.5, kind)
    torch.testing.assert_close(soft_topk(x[:, order], 4, 0.5, kind), mask[:, order], rtol=0, atol=1e-6)
    x = x.double()
    torch.testing.assert_close(soft_topk(x + 1e3, 4, 0.5, kind), soft_topk(x, 4, 0.5, kind), rtol=0, atol=1e-11)
    torch.testing.assert_close(soft_topk(2 * x, 4, 1.0, kind), soft_topk(x, 4, 0.5, kind), rtol=0, atol=1e-12)
    # What is left out of the largest k of -x is the largest n - k of x.
    torch.testing.assert_close(1 - soft_topk(-x, 26, 0.5, kind), soft_topk(x, 4, 0.5, kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_its_limit_and_how_far_it_is_off(n, k, kind):
    x = noise(20, n, dtype=torch.float64)
    best = x.topk(k + 1)
    hard = torch.zeros_like(x).scatter(-1, best.indices[:, :k], 1.0)
    gap = best.values[:, -2:].diff(dim=-1).neg()
    for tau in (1e-1, 1e-2, 1e-5):
        assert ((soft_topk(x, k, tau, kind) - hard).abs() <= n * (-gap / (2 * tau)).exp() + 1e-12).all()
    apart = torch.arange(n, dtype=torch.float32)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    expected = torch.zeros(n).scatter(-1, apart.topk(k).indices, 1.0)
    for tau in (1e-3, 1e-30):
        assert torch.equal(soft_topk(apart, k, tau, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_first_and_second_order(kind):
    for n, k in ((2, 1), (6, 2), (6, 5)):
        x = noise(3, n, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, k=k: soft_topk(x, k, 0.7, kind), x)
        assert torch.autograd.gradgradcheck(lambda x, k=k: soft_topk(x, k, 0.7, kind), x)
        assert torch.autograd.gradcheck(lambda x, k=k: soft_kth_largest(x, k, 0.7, kind), x)
        assert torch.autograd.gradgradcheck(lambda x, k=k: soft_kth_largest(x, k, 0.7, kind), x)


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_is_never_chosen_and_infinity_always(kind):
    x = torch.tensor([[1.0, 3.0, -torch.inf, 2.0, 0.0], [1.0, 3.0, -torch.inf, 2.0, -torch.inf]], requires_grad=True)
    mask = soft_topk(x, 2, kind=kind)
    torch.testing.assert_close(mask[0, [0, 1, 3, 4]], soft_topk(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2, kind=kind))
    torch.testing.assert_close(mask[1, [0, 1, 3]], soft_topk(torch.tensor([1.0, 3.0, 2.0]), 2, kind=kind))
    (gradient,) = torch.autograd.grad(mask.square().sum(), x)
    assert gradient.isfinite().all()
    assert (torch.cat([mask[0, 2:3], mask[1, [2, 4]], gradient[0, 2:3], gradient[1, [2, 4]]]) == 0).all()
    # As many as there are to choose, or fewer, among them some far below the others.
    for row in ([1.0, -1e6, -torch.inf, -torch.inf], [1.0, -1e6, 2.0, -torch.inf], [-torch.inf] * 4):
        few = torch.tensor(row, requires_grad=True)
        mask = soft_topk(few, 3, kind=kind)
        assert torch.equal(mask, few.isfinite().float())
        assert torch.equal(torch.autograd.grad(mask @ torch.arange(4.0), few)[0], torch.zeros(4))
    least = torch.finfo(torch.float32).min
    assert torch.equal(soft_topk(torch.tensor([1.0, 3.0, least, 2.0]), 3, kind=kind), torch.tensor([1.0, 1, 0, 1]))
    few = soft_topk(torch.tensor([1.0, 3.0, least, least]), 3, kind=kind)
    torch.testing.assert_close(few, torch.tensor([1.0, 1, 0.5, 0.5]))  # a number is chosen if nothing else is left
    many = torch.tensor([torch.inf, 0.0, 0.0, torch.inf, 0.0])
    torch.testing.assert_close(soft_topk(many, 3, kind=kind), torch.tensor([1, 1 / 3, 1 / 3, 1, 1 / 3]))
    assert torch.equal(soft_topk(many, 2, kind=kind), torch.tensor([1.0, 0, 0, 1, 0]))
    assert soft_topk(torch.tensor([0.0, torch.nan, 1.0]), 1, kind=kind).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_other_dimensions_and_empty_batches(kind):
    x = noise(4, 6, 5)
    for dim in (0, 1, -2, 2, -1):
        expected = soft_topk(x.movedim(dim, -1).contiguous(), 2, kind=kind).movedim(-1, dim)
        torch.testing.assert_close(soft_topk(x, 2, dim=dim, kind=kind), expected)
        expected = soft_kth_largest(x.movedim(dim, -1).contiguous(), 2, kind=kind)
        torch.testing.assert_close(soft_kth_largest(x, 2, dim=dim, kind=kind), expected)
    assert soft_topk(torch.empty(0, 5), 2, kind=kind).shape == (0, 5)
    assert soft_kth_largest(torch.empty(0, 5), 2, kind=kind).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kth_largest_within_bounds_and_in_the_limit(dtype, kind):
    for scale in SCALES:
        x = (scale * noise(9, 11)).to(dtype)
        for k in (1, 2, 6, 11):
            found = soft_kth_largest(x, k, kind=kind)
            x_ = x.to(found.dtype)
            assert (found >= x_.amin(-1) - 1e-6 * scale).all()
            assert (found <= x_.amax(-1) + 1e-6 * scale).all()
            hard = soft_kth_largest(x, k, 1e-6 * scale, kind)
            torch.testing.assert_close(hard, x_.topk(k).values[:, -1], rtol=1e-6, atol=1e-6 * scale)
    shifted = soft_kth_largest(noise(9, 11).double() + 1e3, 4, kind=kind) - 1e3
    torch.testing.assert_close(shifted, soft_kth_largest(noise(9, 11).double(), 4, kind=kind), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kth_largest_beside_infinities(kind):
    x = torch.tensor([2.0, -torch.inf, 1.0], requires_grad=True)
    assert soft_kth_largest(x, 2, 0.01, kind).item() == pytest.approx(1)
    assert soft_kth_largest(x, 3, 0.01, kind).item() == -math.inf
    (gradient,) = torch.autograd.grad(soft_kth_largest(x, 2, kind=kind), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_batched_by_vmap(kind):
    x = noise(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(lambda x: soft_topk(x, 2, 0.7, kind))(x), soft_topk(x, 2, 0.7, kind))
    second = torch.func.jacrev(torch.func.jacrev(lambda x: soft_topk(x, 2, 0.7, kind).square().sum()))(x[0, 0])
    torch.testing.assert_close(second, second.T)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    def value(x: Tensor) -> Tensor:
        return (soft_topk(x, 3, 0.7, kind) * x).sum() + soft_kth_largest(x, 2, 0.7, kind).sum()

    x = noise(5, 20, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, value(x))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(value(x), x))


def test_half_precision_of_autocast_changes_nothing():
    x = noise(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = soft_topk(x, 3), soft_topk(x, 3, kind="laplace"), soft_kth_largest(x, 3)
    for found, expected in zip(
        inside, (soft_topk(x, 3), soft_topk(x, 3, kind="laplace"), soft_kth_largest(x, 3)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [0, -1, 5, 6])
def test_a_soft_topk_of_none_or_of_all_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}: of n = 5 entries along dimension 0 it has to be 1 <= k < n"):
        soft_topk(torch.zeros(5, 2), k, dim=0)


@pytest.mark.parametrize(
    ("x", "options", "error", "said"),
    [
        (
            torch.zeros(3, 0),
            {"k": 1},
            ValueError,
            "k is 1: of n = 0 entries along dimension -1 it has to be 1 <= k < n",
        ),
        (torch.zeros(()), {"k": 1}, ValueError, "of n = 1 entries"),
        (torch.zeros(5, dtype=torch.int64), {"k": 1}, TypeError, "x is torch.int64: a smooth function takes floating"),
        (torch.zeros(5), {"k": 1, "tau": 0.0}, ValueError, "tau is 0.0: it has to be above 0, and finite"),
        (torch.zeros(5), {"k": 1, "tau": math.nan}, ValueError, "tau is nan"),
        (torch.zeros(5), {"k": 1, "kind": "softmax"}, ValueError, "kind is 'softmax': .* one of sigmoid, laplace"),
        (torch.zeros(5), {"k": 1, "dim": 1}, IndexError, "range"),
    ],
)
def test_what_has_no_soft_topk(x, options, error, said):
    with pytest.raises(error, match=said):
        soft_topk(x, **options)
    if "k < n" not in said and x.ndim:
        with pytest.raises(error, match=said):
            soft_kth_largest(x, **options)


@pytest.mark.parametrize("k", [0, 6])
def test_the_kth_largest_of_fewer_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}: of n = 5 entries along dimension -1 it has to be 1 <= k <= n"):
        soft_kth_largest(torch.zeros(5), k)
