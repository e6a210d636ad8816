"""Gradient estimators against exact enumeration: the unbiased ones agree with it, and the biased ones do not."""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from test_detection_parts import NeverWaits
from torch import Generator, Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from zoo.gumbel_vae.estimators import (
    ESTIMATORS,
    Estimator,
    GaussianPathwise,
    GaussianScoreFunction,
    ReinforceBaseline,
    conditional_gumbels,
    create,
    gumbel_max,
    gumbel_noise,
    gumbel_softmax,
    log_gumbel_softmax,
)

DRAWS = 100_000
UNBIASED = ["exact", "local_expectation", "reinforce", "reinforce_baseline", "rloo", "disarm", "vimco"]
BIASED = ["gumbel_softmax", "st_gumbel_softmax", "straight_through", "gumbel_rao", "reinmax"]
WITH_SAMPLES = {"rloo": 2, "vimco": 2, "gumbel_softmax": 1, "gumbel_rao": 1}  # and the fewest


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# Small problems, every state of which can be visited. Costs f take z (S, B, ...) and give (S, B).


def network(features: int, seed: int = 1) -> Callable[[Tensor], Tensor]:
    """Smooth, not quadratic, and with an offset."""
    first, bias, second = 0.8 * normal(features, 16, seed=seed), 0.3 * normal(16, seed=seed + 1), normal(16, seed=seed)
    return lambda z: 2 * torch.tanh(z.flatten(2) @ first + bias) @ second + 3


def linear(z: Tensor) -> Tensor:
    return z.flatten(2) @ normal(12, seed=3)


def quadratic(z: Tensor) -> Tensor:
    z = z.flatten(2)
    return ((z @ normal(12, 12, seed=4)) * z).sum(-1) + z @ normal(12, seed=3)


LOGITS = {"categorical": normal(3, 4, seed=0), "bernoulli": normal(4, seed=0)}
COSTS = {"categorical": network(12), "bernoulli": network(4), "linear": linear, "quadratic": quadratic}


def states_of(logits: Tensor) -> Tensor:
    """All z there are: (states, N, K), or (states, N) for Bernoulli."""
    if logits.ndim == 1:
        return torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(logits))), dtype=logits.dtype)
    N, K = logits.shape
    return torch.stack(
        [torch.eye(K, dtype=logits.dtype)[list(state)] for state in itertools.product(range(K), repeat=N)]
    )


def log_probability(logits: Tensor, z: Tensor) -> Tensor:
    """Of states z (..., N, K) or (..., N)."""
    if logits.ndim == 1:
        return (z * F.logsigmoid(logits) + (1 - z) * F.logsigmoid(-logits)).sum(-1)
    return (z * logits.log_softmax(-1)).sum((-2, -1))


def enumerated(logits: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """E f and its gradient."""
    logits = logits.clone().requires_grad_()
    z = states_of(logits)
    value = (log_probability(logits, z).exp() * f(z[:, None])[:, 0]).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


def row_gradients(
    estimator: Estimator, logits: Tensor, f: Callable, temperature: float = 1.0, draws: int = DRAWS, seed: int = 5
) -> Tensor:
    """Independent gradients, one a row; in batches that fit into the processor's cache."""
    generator, batches = seeded(seed), []
    for start in range(0, draws, 5000):
        rows = logits.expand(min(5000, draws - start), *logits.shape).clone().requires_grad_()
        value = estimator.expectation(rows, f, temperature, generator)
        batches += torch.autograd.grad(value.sum(), rows)
    return torch.cat(batches)


class Found(NamedTuple):
    """What many independent gradients are like; these themselves would be a gigabyte."""

    mean: Tensor
    variance: Tensor
    draws: int

    def error(self) -> Tensor:
        return (self.variance / self.draws).sqrt()

    def agrees(self, exact: Tensor) -> bool:
        """Whether the mean is within 4 standard errors in every coordinate."""
        return bool(((self.mean - exact).abs() <= 4 * self.error() + 1e-12).all())

    def relative_bias(self, exact: Tensor) -> float:
        return ((self.mean - exact).norm() / exact.norm()).item()


def of(rows: Tensor) -> Found:
    return Found(rows.mean(0), rows.var(0), len(rows))


@cache
def measured(
    name: str, kind: str = "categorical", cost: str = "", samples: int | None = None, temperature: float = 1.0
) -> Found:
    estimator, logits, f = create(name, samples), LOGITS[kind], COSTS[cost or kind]
    if name == "reinforce_baseline":  # what an earlier batch cost
        row_gradients(estimator, logits, f, draws=1000, seed=6)
    return of(row_gradients(estimator, logits, f, temperature, draws=100 if name == "exact" else DRAWS))


def variance(*arguments, **options) -> float:
    return measured(*arguments, **options).variance.sum().item()


@cache
def exact_gradient(kind: str = "categorical", cost: str = "") -> Tensor:
    return enumerated(LOGITS[kind], COSTS[cost or kind])[1]


# Bias.


TESTED = [
    (kind, name, samples)
    for kind in LOGITS
    for name, samples in [(name, None) for name in UNBIASED] + [("rloo", 2)]
    if name != "vimco" and (name, kind) != ("disarm", "categorical")  # VIMCO is of another objective: below
]


@pytest.mark.parametrize(("kind", "name", "samples"), TESTED)
def test_unbiased_estimators_agree_with_enumeration(kind, name, samples):
    assert ESTIMATORS[name].unbiased
    assert measured(name, kind, samples=samples).agrees(exact_gradient(kind))


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("kind", LOGITS)
def test_biased_estimators_fail_the_same_test(kind, name):
    assert not ESTIMATORS[name].unbiased
    assert not measured(name, kind).agrees(exact_gradient(kind))
    assert F.cosine_similarity(measured(name, kind).mean.flatten(), exact_gradient(kind).flatten(), 0) > 0.7


def test_every_estimator_is_among_the_tested():
    assert set(ESTIMATORS) == {*UNBIASED, *BIASED}
    assert [name for name, each in ESTIMATORS.items() if each.differentiable] == [n for n in ESTIMATORS if n in BIASED]
    assert all(each.name == name for name, each in ESTIMATORS.items())


def test_exact_has_neither_bias_nor_variance():
    for kind in LOGITS:
        value, gradient = enumerated(LOGITS[kind], COSTS[kind])
        rows = LOGITS[kind].expand(3, *LOGITS[kind].shape).clone().requires_grad_()
        found = create("exact").expectation(rows, COSTS[kind])
        torch.testing.assert_close(found, value.expand(3))
        torch.testing.assert_close(torch.autograd.grad(found.sum(), rows)[0], gradient.expand_as(rows))


def test_disarm_takes_two_categories_as_well():
    logits = normal(3, 2, seed=0)
    assert of(row_gradients(create("disarm"), logits, network(6))).agrees(enumerated(logits, network(6))[1])


@pytest.mark.parametrize(("latents", "categories", "k"), [(2, 2, 2), (1, 3, 4), (2, 3, 2)])
@pytest.mark.parametrize("with_posterior", [False, True])
def test_vimco_agrees_with_the_enumerated_multi_sample_bound(latents, categories, k, with_posterior):
    """Over all outcomes of k samples; with the posterior inside of f, as in the importance-weighted bound."""
    logits, plain = normal(latents, categories, seed=0), network(latents * categories)

    def cost(z: Tensor, logits: Tensor) -> Tensor:
        return plain(z) + (log_probability(logits, z) if with_posterior else 0)

    leaf = logits.clone().requires_grad_()
    states = states_of(logits)
    outcomes = torch.tensor(list(itertools.product(range(len(states)), repeat=k)))
    log_q, costs = log_probability(leaf, states), cost(states[:, None], leaf)[:, 0]
    bound = (log_q[outcomes].sum(1).exp() * -(-costs[outcomes]).exp().mean(1).log()).sum()
    (exact,) = torch.autograd.grad(bound, leaf)

    rows = logits.expand(DRAWS, -1, -1).clone().requires_grad_()

    def gradients_of(value: Tensor) -> Found:
        return of(torch.autograd.grad(value.sum(), rows)[0])

    values = create("vimco", k).expectation(rows, lambda z: cost(z, rows), generator=seeded())
    assert of(values.detach()[:, None]).agrees(bound.detach())
    vimco = gradients_of(values)
    assert vimco.agrees(exact)
    assert not gradients_of(create("rloo", k).expectation(rows, lambda z: cost(z, rows))).agrees(exact)  # of E f

    z = gumbel_max(rows.expand(k, -1, -1, -1), seeded())
    plain_values = -(-cost(z, rows)).exp().mean(0).log()
    surrogate = plain_values.detach() * log_probability(rows, z).sum(0)
    without_baselines = gradients_of(plain_values + surrogate)
    assert without_baselines.agrees(exact)
    assert vimco.variance.sum() < 0.9 * without_baselines.variance.sum()


def test_straight_through_is_exact_for_linear_costs():
    exact = exact_gradient(cost="linear")
    torch.testing.assert_close(measured("straight_through", cost="linear").mean, exact)
    assert variance("straight_through", cost="linear") < 1e-24
    for name in ("gumbel_softmax", "st_gumbel_softmax"):
        assert measured(name, cost="linear").relative_bias(exact) > 0.1


def test_reinmax_is_unbiased_for_quadratic_costs():
    exact = exact_gradient(cost="quadratic")
    assert measured("reinmax", cost="quadratic").agrees(exact)
    for name in ("straight_through", "gumbel_softmax", "st_gumbel_softmax"):
        assert not measured(name, cost="quadratic").agrees(exact)
        assert measured(name, cost="quadratic").relative_bias(exact) > 0.1


@pytest.mark.parametrize("p", [1 / 3, 0.5, 0.8])
def test_reinmax_can_be_worse_than_straight_through(p):
    """For one bit z and f(z) = z^3 the exact gradient is p (1 - p) [f(1) - f(0)].

    Straight-through has E f'(z) in place of this difference, which is 3 p, and ReinMax the trapezoid's
    [f'(0) + f'(1)] / 2 = 3 / 2: at p = 1/3 the former happens to be right.
    """
    logits, scale = torch.tensor([p], dtype=torch.float64).logit(), p * (1 - p)

    def cost(z: Tensor) -> Tensor:
        return z[..., 0] ** 3

    assert enumerated(logits, cost)[1].item() == pytest.approx(scale)
    assert of(row_gradients(create("straight_through"), logits, cost)).agrees(torch.tensor(3 * p * scale))
    assert of(row_gradients(create("reinmax"), logits, cost)).agrees(torch.tensor(1.5 * scale))


# Masked categories and certain Bernoullis.


def without(f: Callable[[Tensor], Tensor], masked: Tensor) -> Callable[[Tensor], Tensor]:
    """The cost of samples (..., K) in a problem that has further categories, of which a hard sample costs infinity."""

    def cost(z: Tensor) -> Tensor:
        impossible = (z[..., masked] > 0).flatten(2).any(-1)
        return torch.where(impossible, torch.inf, f(z[..., ~masked]))

    return cost


def drawn(name: str, logits: Tensor, f: Callable[[Tensor], Tensor], draws: int = 20_000) -> tuple[Found, Tensor]:
    """Independent values beside gradients (draws, 1 + logits), and the gradients alone."""
    estimator = create(name)
    if name == "reinforce_baseline":
        row_gradients(estimator, logits, f, draws=1000, seed=6)
    rows = logits.expand(1 if name == "exact" else draws, *logits.shape).clone().requires_grad_()
    values = estimator.expectation(rows, f, 0.7, seeded(5))
    (gradients,) = torch.autograd.grad(values.sum(), rows)
    found = torch.cat([values.detach()[:, None], gradients.flatten(1)], 1)
    return Found(found.mean(0), found.var(0) if name != "exact" else torch.zeros(found.shape[1]), len(found)), gradients


def assert_same_distribution(one: Found, other: Found) -> None:
    error = (one.error().square() + other.error().square()).sqrt()
    assert ((one.mean - other.mean).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("masked", [[3], [0], [1, 4]], ids=str)
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "disarm"])
def test_a_masked_category_is_as_if_it_were_not(name, masked):
    left = torch.ones(3 + len(masked), dtype=torch.bool)
    left[masked] = False
    logits, f = normal(2, 3, seed=0), network(6)
    full = torch.full((2, len(left)), -torch.inf, dtype=torch.float64)
    full[:, left] = logits
    found, gradients = drawn(name, full, without(f, ~left))
    assert gradients.isfinite().all()
    assert not gradients[..., ~left].any()
    here = torch.cat([torch.ones(1, dtype=torch.bool), left.repeat(2)])
    assert_same_distribution(Found(found.mean[here], found.variance[here], found.draws), drawn(name, logits, f)[0])


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "disarm"])
def test_latents_may_have_masks_of_their_own_and_a_single_category_left(name):
    logits = torch.tensor([[0.3, -torch.inf, -0.2], [-torch.inf, 1.0, -torch.inf], [0.1, 0.2, 0.3]]).double()
    f = network(9)
    found, gradients = drawn(name, logits, f)
    assert gradients.isfinite().all()
    assert not gradients[:, 1].any()  # nothing to choose
    assert not gradients[:, 0, 1].any()
    assert found.mean.isfinite().all()
    if name in UNBIASED and name != "vimco":
        leaf = logits.clone().requires_grad_()
        z = states_of(logits)
        q = leaf.softmax(-1)
        value = ((z * q).sum(-1).prod(-1) * f(z[:, None])[:, 0]).sum()
        exact = torch.cat([value.detach()[None], torch.autograd.grad(value, leaf)[0].flatten()])
        assert ((found.mean - exact).abs() <= 4.5 * found.error() + 1e-12).all()


@pytest.mark.parametrize("form", ["log-odds", "two categories", "infinite logit"])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_certain_bernoullis_are_as_if_they_were_constants(name, form):
    logits, f = normal(2, seed=0), network(4)
    log_odds = torch.cat([torch.tensor([torch.inf, -torch.inf], dtype=torch.float64), logits])

    def constant(z: Tensor) -> Tensor:
        return f(torch.cat([torch.ones_like(z[..., :1]), torch.zeros_like(z[..., :1]), z], -1))

    given, cost = log_odds, f
    if form != "log-odds":
        given = torch.stack([torch.zeros_like(log_odds), log_odds], -1)
        if form == "two categories":
            given[0] = torch.tensor([-torch.inf, 0.0])
        cost = lambda z: f(z[..., 1])  # noqa: E731
    found, gradients = drawn(name, given, cost)
    assert gradients.isfinite().all()
    assert not gradients[:, :2].any()
    expected, _ = drawn(name, logits if form == "log-odds" else given[2:], constant if form == "log-odds" else _second)
    kept = [0, *range(1 + gradients[0, :2].numel(), 1 + gradients[0].numel())]
    assert_same_distribution(Found(found.mean[kept], found.variance[kept], found.draws), expected)


def _second(z: Tensor) -> Tensor:
    """The cost of the test above of two Bernoullis given as two categories."""
    odds = z[..., 1]
    return network(4)(torch.cat([torch.ones_like(odds[..., :1]), torch.zeros_like(odds[..., :1]), odds], -1))


def test_a_certain_bernoulli_is_certain_for_disarm_whatever_is_drawn():
    odds = torch.tensor([[torch.inf, -torch.inf]]).expand(2**22, 2)  # float32 draws have 2**24 values
    assert torch.equal(create("disarm").expectation(odds, lambda z: z @ torch.tensor([1.0, 5.0])), torch.ones(2**22))


def test_noise_given_an_outcome_under_a_mask_is_gumbel_again():
    logits = torch.tensor([0.5, -torch.inf, -0.3]).expand(DRAWS, 3)
    noise = conditional_gumbels(logits, gumbel_max(logits, seeded()), 1, seeded(1))[0]
    assert noise.isfinite().all()
    for column in noise.unbind(1):
        assert stats.kstest(column.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


# Variance.


def test_antithetic_samples_are_better_than_independent_ones_and_these_than_one():
    disarm, pairs = variance("disarm", "bernoulli"), variance("rloo", "bernoulli", samples=2)
    assert disarm < 0.9 * pairs
    assert pairs < 0.5 * variance("reinforce", "bernoulli")


def test_a_baseline_takes_the_offset_away():
    assert variance("reinforce_baseline") < 0.3 * variance("reinforce")
    assert variance("local_expectation") < 0.3 * variance("reinforce_baseline")


def test_the_variance_of_rloo_falls_as_one_over_k_minus_1():
    pairs = variance("rloo", samples=2)
    assert variance("rloo", samples=4) == pytest.approx(pairs / 3, rel=0.1)
    assert variance("rloo", samples=8) == pytest.approx(pairs / 7, rel=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gumbel_rao_has_the_mean_of_the_straight_through_and_less_variance(temperature):
    averaged = measured("gumbel_rao", temperature=temperature)
    plain = measured("st_gumbel_softmax", temperature=temperature)
    error = (averaged.error().square() + plain.error().square()).sqrt()
    assert ((averaged.mean - plain.mean).abs() < 4 * error).all()
    assert averaged.variance.sum() < 0.8 * plain.variance.sum()
    assert variance("gumbel_rao", samples=1, temperature=temperature) > 1.1 * averaged.variance.sum()


def test_a_lower_temperature_trades_bias_for_variance():
    warm, cool, cold = (measured("gumbel_softmax", temperature=temperature) for temperature in (1.0, 0.5, 0.1))
    bias = [each.relative_bias(exact_gradient()) for each in (warm, cool, cold)]
    assert bias[0] > 1.2 * bias[1] > 1.2**2 * bias[2]
    assert 4 * warm.variance.sum() < 2 * cool.variance.sum() < cold.variance.sum()


def test_several_relaxed_samples_are_averaged():
    assert variance("gumbel_softmax", samples=4) == pytest.approx(variance("gumbel_softmax") / 4, rel=0.1)


@pytest.mark.parametrize("name", ["straight_through", "reinmax"])
def test_the_temperature_matters(name):
    assert not torch.allclose(measured(name).mean, measured(name, temperature=2.0).mean, rtol=0.05)


# Samples.


def test_gumbel_max_draws_categories_as_often_as_they_are_probable():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    z = gumbel_max((p.log() + 7).expand(DRAWS, 4), seeded())
    assert z.dtype == torch.float32
    assert torch.equal(z.sum(-1), torch.ones(DRAWS))
    assert torch.equal(z.max(-1).values, torch.ones(DRAWS))
    assert stats.chisquare(z.sum(0).numpy(), (p.double() * DRAWS).numpy() / p.double().sum().item()).pvalue > 1e-3


@pytest.mark.parametrize("hard", [False, True])
def test_relaxed_samples_are_those_of_torch(hard):
    logits = normal(5, 6, seed=0).float()
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, 0.7, hard)
    torch.manual_seed(3)
    torch.testing.assert_close(gumbel_softmax(logits, 0.7, hard), expected)


def test_hard_samples_are_exactly_one_hot():
    logits = normal(DRAWS, 8, seed=0).float().requires_grad_()
    z = gumbel_softmax(logits, 0.3, hard=True)
    assert z.requires_grad
    assert torch.equal(z.sort(-1).values, torch.eye(8)[-1].expand_as(z))


def test_log_samples_stay_finite_where_samples_round():
    logits = 3 * normal(DRAWS, 10, seed=0).float()
    log_z = log_gumbel_softmax(logits, 0.05, seeded())
    z = gumbel_softmax(logits, 0.05, generator=seeded())
    torch.testing.assert_close(log_z.exp(), z, rtol=1e-4, atol=1e-7)
    assert (z == 0).any()
    assert log_z.isfinite().all()
    assert (
        ExpRelaxedCategorical(torch.tensor(0.05), logits=logits, validate_args=False).log_prob(log_z).isfinite().all()
    )


def test_conditional_gumbels_give_the_sample_back_and_mix_to_gumbels():
    logits = normal(4, seed=0).expand(DRAWS, 4) + 5
    hard = gumbel_max(logits, seeded())
    noise = conditional_gumbels(logits, hard, 3, seeded(1))
    assert noise.shape == (3, DRAWS, 4)
    assert torch.equal((logits + noise).argmax(-1), hard.argmax(-1).expand(3, -1))
    assert noise[0].unique().numel() == 4 * DRAWS
    for category in range(4):
        assert stats.kstest(noise[0, :, category].numpy(), "gumbel_r").pvalue > 1e-3
        given = noise[0, hard[:, 0].bool(), category]
        assert stats.kstest(given.numpy(), "gumbel_r").pvalue < 1e-6  # as long as the outcome is not mixed over
    assert stats.kstest(gumbel_noise(logits).flatten().numpy(), "gumbel_r").pvalue > 1e-3
    sums = noise[0].sum(-1)  # independent as well: the variance of the sum is the sum of the variances
    assert sums.var().item() == pytest.approx(4 * math.pi**2 / 6, rel=0.05)


def test_extreme_logits_give_finite_noise_and_gradients():
    logits = torch.tensor([[0.0, -300.0, 300.0], [1e4, 0.0, -1e4]])[None].requires_grad_()
    for hard in (torch.eye(3)[[2, 0]], torch.eye(3)[[1, 2]]):
        assert conditional_gumbels(logits, hard[None], 50).isfinite().all()
    for name in {*ESTIMATORS} - {"disarm"}:
        for temperature in (0.01, 100.0):
            (found,) = torch.autograd.grad(create(name).expectation(logits, smooth, temperature).sum(), logits)
            assert found.isfinite().all(), name


def test_noise_of_exactly_0_is_survived(monkeypatch):
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator=None: self.zero_())
    logits = torch.zeros(2, 3, 4)
    assert gumbel_noise(logits).isfinite().all()
    assert conditional_gumbels(logits, torch.eye(4)[:3].expand(2, 3, 4), 2).isfinite().all()
    assert gumbel_softmax(logits, 0.01).isfinite().all()


# Values, and gradients of what else f depends on.


def smooth(z: Tensor) -> Tensor:
    """For z of any size and precision."""
    z = z.flatten(2)
    return torch.sin(z @ torch.linspace(-1, 2, z.shape[2], dtype=z.dtype)) + 1


def problem(name: str, dtype: torch.dtype = torch.float32, batch: int = 5) -> Tensor:
    """Logits that an estimator can take: (B, N), or (B, N, K)."""
    shape = (batch, 4) if ESTIMATORS[name].binary_only else (batch, 2, 3)
    return normal(*shape, seed=8).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_value_is_the_plain_mean_and_f_is_evaluated_as_often_as_said(name):
    estimator, logits, seen = create(name), problem(name), []

    def f(z: Tensor) -> Tensor:
        costs = smooth(z)
        seen.append((z.detach(), costs.detach()))
        return costs

    value = estimator.expectation(logits, f)
    assert value.shape == (5,)
    assert value.requires_grad
    z, costs = seen[0]
    N, K = logits.shape[1], 2 if logits.ndim == 2 else logits.shape[2]
    assert sum(len(each) for each, _ in seen) == estimator.evaluations(N, K)
    expected = costs.mean(0)
    if name == "exact":
        expected = (torch.stack([log_probability(each, z[:, 0]) for each in logits.detach()], 1).exp() * costs).sum(0)
    elif name == "vimco":
        expected = -(-costs).exp().mean(0).log()
    if name in ("exact", "vimco"):
        torch.testing.assert_close(value.detach(), expected)
    else:
        assert torch.equal(value.detach(), expected)  # what carries the gradient adds exactly 0
    assert bool(((z == 0) | (z == 1)).all()) == (name != "gumbel_softmax")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_parameters_inside_f(name):
    """Each row has weights of its own, so that the gradient has a standard error."""
    logits, first = LOGITS["bernoulli"], 0.8 * normal(4, 6, seed=2)
    estimator, rows = create(name), logits.expand(20_000, 4)
    states, exact_weights = states_of(logits), normal(6, seed=9).requires_grad_()
    probability = log_probability(logits, states).exp()
    (exact,) = torch.autograd.grad((probability * (torch.tanh(states @ first) @ exact_weights)).sum(), exact_weights)
    weights = exact_weights.detach().expand(20_000, 6).clone().requires_grad_()
    value = estimator.expectation(
        rows.clone().requires_grad_(), lambda z: (torch.tanh(z @ first) * weights).sum(-1), 1.0, seeded()
    )
    # That of relaxed samples is another network's, and that of the multi-sample bound weighs the samples.
    unbiased = name not in ("gumbel_softmax", "vimco")
    assert of(torch.autograd.grad(value.sum(), weights)[0]).agrees(exact) == unbiased


def test_an_offset_changes_no_gradient_of_rloo():
    logits = problem("rloo", torch.float64)
    found = [
        torch.autograd.grad(
            create("rloo").expectation(logits, lambda z, c=c: smooth(z) + c, generator=seeded()).sum(), logits
        )[0]
        for c in (0, 1000)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_generator_decides_everything(name):
    logits = problem(name)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        value = create(name).expectation(logits, smooth, generator=seeded(seed))
        found.append(torch.autograd.grad(value.sum(), logits)[0])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (name == "exact")


# The running baseline.


def test_the_baseline_does_not_know_the_current_costs():
    """Of one image with a constant cost a baseline that did would leave nothing."""
    estimator, logits = ReinforceBaseline(), problem("reinforce_baseline", batch=1)
    norms = []
    for _ in range(3):
        value = estimator.expectation(logits, lambda z: 5 + 0 * z.sum((2, 3)))
        norms.append(torch.autograd.grad(value.sum(), logits)[0].norm().item())
    assert norms[0] > 0.1
    assert norms[1:] == pytest.approx([0, 0], abs=1e-5)


def test_the_baseline_is_unbiased_from_batch_to_batch_of_one_image():
    """A baseline with the current cost in it, after an update of 1 - decay, would shrink the gradient by that much."""
    estimator, f, logits = ReinforceBaseline(decay=0.5), COSTS["bernoulli"], LOGITS["bernoulli"]
    rows = torch.stack([row_gradients(estimator, logits, f, draws=1, seed=seed)[0] for seed in range(1000)])
    assert of(rows[10:]).agrees(exact_gradient("bernoulli"))
    assert not of(rows[10:] / 2).agrees(exact_gradient("bernoulli"))


def test_the_baseline_averages_previous_batches():
    estimator, logits = ReinforceBaseline(decay=0.9), problem("reinforce_baseline")
    for cost in (1.0, 3.0, 8.0):
        estimator.expectation(logits, lambda z, cost=cost: cost + 0 * z.sum((2, 3)))
    expected = (0.81 * 1 + 0.9 * 3 + 8) / (0.81 + 0.9 + 1)
    assert (estimator.average / estimator.weight).item() == pytest.approx(expected)
    state = {name: each.clone() for name, each in estimator.state_dict().items()}
    with torch.no_grad():
        estimator.expectation(logits, smooth)
    estimator.expectation(logits, lambda z: smooth(z) / 0)
    assert estimator.state_dict() == state


def test_the_baseline_survives_a_checkpoint(tmp_path):
    logits, first, second = problem("reinforce_baseline"), create("reinforce_baseline"), create("reinforce_baseline")
    for seed in range(3):
        first.expectation(logits, smooth, generator=seeded(seed))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    fresh = torch.autograd.grad(second.expectation(logits, smooth, generator=seeded(9)).sum(), logits)[0]
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = [
        torch.autograd.grad(each.expectation(logits, smooth, generator=seeded(9)).sum(), logits)[0]
        for each in (first, second)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], fresh)


# Precision, compilation, waiting.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_samples_and_noise_are_in_single_precision_at_least(dtype):
    logits = torch.zeros(2, 3, dtype=dtype)
    hard = gumbel_max(logits)
    made = [hard, gumbel_noise(logits), gumbel_softmax(logits), gumbel_softmax(logits, hard=True)]
    made += [log_gumbel_softmax(logits), conditional_gumbels(logits, hard)]
    assert {each.dtype for each in made} == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_gives_no_nan(name, dtype):
    logits = (4 * problem(name, batch=20_000).detach()).to(dtype).requires_grad_()
    for temperature in (1.0, 0.01):
        seen = []
        value = create(name).expectation(logits, lambda z, seen=seen: seen.append(z.dtype) or smooth(z), temperature)
        (found,) = torch.autograd.grad(value.mean(), logits)
        assert {*seen} == {torch.float32}
        assert value.dtype == torch.float32
        assert found.dtype == dtype
        assert value.isfinite().all()
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_leaves_the_noise_alone_and_reaches_f(name):
    logits = problem(name, batch=500)
    layers = nn.Sequential(nn.Linear(logits[0].numel(), 8), nn.Tanh(), nn.Linear(8, 1))
    dtypes = []

    def f(z: Tensor) -> Tensor:
        out = layers(z.flatten(2))[..., 0]
        dtypes.append((z.dtype, out.dtype))
        return out

    def step(lower: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            value = create(name).expectation(logits, f, 0.5, seeded())
        return value.detach(), *torch.autograd.grad(value.mean(), [logits, layers[0].weight])

    found, expected = step(True), step(False)
    assert {*dtypes} == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    assert found[0].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundred_million_draws_are_finite(dtype):
    logits = torch.zeros(10_000, 1000, dtype=dtype)
    for _ in range(10):
        noise = gumbel_noise(logits)
        assert noise.dtype == torch.float32
        assert noise.isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_graph_for_every_temperature_with_the_same_values(name):
    estimator, logits = create(name), problem(name)

    def step(logits: Tensor, temperature: Tensor) -> Tensor:
        return estimator.expectation(logits, smooth, temperature)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    state = {key: each.clone() for key, each in estimator.state_dict().items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temperature in (torch.tensor(1.0), torch.tensor(0.3)):
            found = []
            for function in (step, compiled):
                estimator.load_state_dict(state)
                torch.manual_seed(0)
                value = function(logits, temperature)
                found.append((value, *torch.autograd.grad(value.sum(), logits), *estimator.state_dict().values()))
            torch.testing.assert_close(found[0], found[1])


# With state, with a path through samples, with a gradient by hand. What is left out for the others, the compiler of
# C++, takes ten times as long as all that comes before it, and is torch's to prove.
WHOLLY_COMPILED = ("reinforce_baseline", "gumbel_softmax", "reinmax")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "exact"])
def test_a_compiled_step_computes_the_same(name):
    estimator, logits = create(name), problem(name)
    torch._dynamo.reset()
    backend = "inductor" if name in WHOLLY_COMPILED else "aot_eager"
    compiled = torch.compile(lambda logits: estimator.expectation(logits, smooth, 0.5), fullgraph=True, backend=backend)
    found = []
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of plain torch
        for function in (lambda logits: create(name).expectation(logits, smooth, 0.5), compiled):
            torch.manual_seed(0)
            value = function(logits)
            found.append((value, *torch.autograd.grad(value.sum(), logits)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_waits_for_the_device(name):
    logits = problem(name)
    layer = nn.Linear(logits[0].numel(), 1)
    temperature = torch.tensor(0.5)
    with NeverWaits():
        create(name).expectation(logits, lambda z: layer(z.flatten(2))[..., 0], temperature).sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_waits_for_the_gpu(name):
    logits = problem(name).detach().cuda().requires_grad_()
    layer, temperature, estimator = nn.Linear(logits[0].numel(), 1).cuda(), torch.tensor(0.5), create(name).cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            value = estimator.expectation(logits, lambda z: layer(z.flatten(2))[..., 0], temperature)
        return torch.autograd.grad(value.sum(), logits)[0]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()


# Gaussian latents.


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("mean", "deviation"), [(1.0, 1.0), (-2.0, 0.5)])
def test_gaussian_gradients_of_a_square_have_their_closed_forms(mean, deviation, samples):
    closed = {
        GaussianPathwise: 4 * deviation**2,
        GaussianScoreFunction: mean**4 / deviation**2 + 14 * mean**2 + 15 * deviation**2,
    }
    for kind, expected in closed.items():
        means = torch.full((DRAWS, 1), mean, dtype=torch.float64, requires_grad=True)
        deviations = torch.full((DRAWS, 1), deviation, dtype=torch.float64, requires_grad=True)
        value = kind(samples).expectation(means, deviations, lambda z: z.square().sum(-1), seeded())
        by_mean, by_deviation = torch.autograd.grad(value.sum(), [means, deviations])
        assert of(value.detach()).agrees(torch.tensor(mean**2 + deviation**2))
        assert of(by_mean).agrees(torch.tensor([2 * mean]))
        assert of(by_deviation).agrees(torch.tensor([2 * deviation]))
        squares = (by_mean - by_mean.mean()).square() * samples
        assert of(squares).agrees(torch.tensor([expected]))


def test_gaussian_noise_is_float32_and_comes_from_the_generator():
    mean = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    seen = []
    for kind in (GaussianPathwise, GaussianScoreFunction, GaussianPathwise):
        kind(2).expectation(mean, mean.exp(), lambda z: seen.append(z.detach()) or z.sum(-1), seeded())
    assert seen[0].dtype == torch.float32
    assert seen[0].shape == (2, 3, 2)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_pathwise_gradient_needs_a_differentiable_cost():
    mean = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="the pathwise estimator needs a cost that is differentiable in z"):
        GaussianPathwise().expectation(mean, mean.exp(), lambda z: z.detach().sum(-1))
    GaussianScoreFunction().expectation(mean, mean.exp(), lambda z: z.sign().sum(-1))
    with pytest.raises(ValueError, match="the pathwise estimator with 0 samples: expected at least 1"):
        GaussianPathwise(0)


# What is refused.


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_0_is_refused(name, temperature):
    with pytest.raises(ValueError, match=rf"temperature is {temperature}: expected a number above 0"):
        create(name).expectation(problem(name), smooth, temperature)


def test_functions_refuse_such_a_temperature_as_well():
    for function in (gumbel_softmax, log_gumbel_softmax):
        with pytest.raises(ValueError, match="temperature is 0: expected a number above 0"):
            function(torch.zeros(2, 3), 0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 2, 1), r"logits \(5, 2, 1\) have 1 category: expected at least 2, or \(B, N\) log-odds"),
        ((5, 2, 0), "have 0 categor"),
        ((5,), r"logits are \(5,\): expected \(B, N, K\) for categorical latents, or \(B, N\) for Bernoulli"),
        ((5, 2, 3, 4), r"logits are \(5, 2, 3, 4\)"),
    ],
)
def test_logits_of_another_shape_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        create(name).expectation(torch.zeros(shape), smooth)


def test_disarm_refuses_three_categories():
    with pytest.raises(ValueError, match=r"disarm is for Bernoulli latents, logits \(5, 2, 3\) have 3 categories: use"):
        create("disarm").expectation(torch.zeros(5, 2, 3), smooth)


def test_exact_refuses_more_states_than_it_can_visit():
    with pytest.raises(ValueError, match=r"9 latents of 4 categories have 4\^9 states.* at most 65536: use local_exp"):
        create("exact").expectation(torch.zeros(1, 9, 4), smooth)
    assert create("exact").expectation(torch.zeros(1, 16), smooth).shape == (1,)


@pytest.mark.parametrize("name", BIASED)
def test_a_cost_without_gradient_is_refused_where_one_is_needed(name):
    logits = problem(name)
    message = f"{name} needs a cost that is differentiable in z, .*: use one of exact, local_expectation, reinforce, "
    with pytest.raises(ValueError, match=message):
        create(name).expectation(logits, lambda z: smooth(z.detach()))
    with torch.no_grad():
        create(name).expectation(logits, lambda z: smooth(z.detach()))
    create(name).expectation(logits.detach(), lambda z: smooth(z.detach()))


@pytest.mark.parametrize("name", [name for name in UNBIASED if name != "disarm"])
def test_a_cost_without_gradient_is_enough_elsewhere(name):
    logits = problem(name)
    create(name).expectation(logits, lambda z: smooth(z.detach()).round()).sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_costs_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=r"f returned costs \(\d+, 5, 1\): expected one for each sample, \(\d+, 5\)"):
        create(name).expectation(problem(name), lambda z: smooth(z)[..., None])


def test_estimators_are_created_by_name():
    assert {name: type(create(name)) for name in ESTIMATORS} == ESTIMATORS
    assert create("rloo").samples == 4
    assert create("rloo", 7).samples == 7
    with pytest.raises(ValueError, match="unknown estimator 'gumbel': expected one of exact, local_expectation, "):
        create("gumbel")
    with pytest.raises(ValueError, match="decay is 1: expected a number from 0 to below 1"):
        ReinforceBaseline(1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_samples_are_for_those_that_take_them(name):
    if name not in WITH_SAMPLES:
        with pytest.raises(ValueError, match=f"'{name}' has no number of samples to choose: leave it out, or use rloo"):
            create(name, 2)
        return
    fewest = WITH_SAMPLES[name]
    assert create(name, fewest).expectation(problem(name), smooth).shape == (5,)
    with pytest.raises(ValueError, match=f"{name} with {fewest - 1} samples: expected at least {fewest}"):
        create(name, fewest - 1)
