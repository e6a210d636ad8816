"""Likelihoods: that they sum to one, against torch.distributions and SciPy, their gradients, and what they refuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from zoo.gumbel_vae import likelihoods
from zoo.gumbel_vae.likelihoods import LIKELIHOODS, Bernoulli, Categorical, Likelihood, Logistic, LogitLaplace

NAMES = list(LIKELIHOODS)
WITH_LEVELS = ["categorical", "logistic", "logit_laplace"]


def problem(name: str, levels: int = 17, scale: float = 1.0, shape=(3, 2, 4, 5)) -> tuple[Likelihood, Tensor, Tensor]:
    """A likelihood, float64 parameters and images in its support."""
    B, C, H, W = shape
    likelihood = likelihoods.create(name, levels)
    images = torch.randint(likelihood.levels, shape) / (likelihood.levels - 1)
    parameters = scale * torch.randn(B, likelihood.maps_per_channel * C, H, W, dtype=torch.float64)
    return likelihood, parameters, images


def of_each_level(likelihood: Likelihood, parameters: Tensor, draws: int = 1) -> Tensor:
    """log P (draws, levels) of all levels for the parameters (M,) of a single value."""
    levels = likelihood.levels
    images = (torch.arange(levels, dtype=torch.float64) / (levels - 1)).view(-1, 1, 1, 1)
    return likelihood.log_prob(parameters.view(-1, 1, 1).expand(draws, levels, -1, 1, 1), images)


def bin_masses(mean: float, b: float, levels: int, epsilon: float = 0.1) -> Tensor:
    """What a logit-Laplace density gives to the bins of levels, by SciPy's distribution function."""
    edges = epsilon + (1 - 2 * epsilon) * torch.arange(levels + 1, dtype=torch.float64) / levels
    return torch.from_numpy(stats.laplace.cdf(torch.logit(edges).numpy(), mean, b)).diff()


# Normalised.


def test_all_binary_images_sum_to_one():
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).view(16, 1, 2, 2)
    parameters = 3 * torch.randn(1, 1, 2, 2, dtype=torch.float64)
    assert Bernoulli().log_prob(parameters, images).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("name", ["categorical", "logistic"])
def test_all_levels_sum_to_one_wherever_the_mean_and_however_wide(name, levels):
    likelihood = likelihoods.create(name, levels)
    for scale in (0.1, 1.0, 5.0, 100.0):
        parameters = scale * torch.randn(likelihood.maps_per_channel, dtype=torch.float64)
        assert of_each_level(likelihood, parameters).logsumexp(1).item() == pytest.approx(0, abs=1e-9)
        assert of_each_level(likelihood, parameters.float()).logsumexp(1).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("mean", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.4)])
def test_the_logit_laplace_density_integrates_to_one(mean, log_b):
    likelihood, parameters = LogitLaplace(levels=32), torch.tensor([mean, log_b], dtype=torch.float64)
    for epsilon, expected in ((0.0, 1.0), (0.1, bin_masses(mean, math.exp(log_b), 32).sum().item())):
        likelihood.EPSILON = epsilon  # 0: the bins are all of (0, 1); else the rest belongs to no level
        densities = of_each_level(likelihood, parameters, draws=20_000).exp()
        error = (densities.var(0) / len(densities)).sum().sqrt().item()
        assert densities.mean(0).sum().item() == pytest.approx(expected, abs=4 * error)
        assert error < 0.01
    assert expected < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_independent_and_their_nats_add_up(name):
    likelihood, parameters, images = problem(name)
    M, (B, C, H, W) = likelihood.maps_per_channel, images.shape
    torch.manual_seed(1)
    whole = likelihood.log_prob(parameters, images)
    torch.manual_seed(1)  # one call with each value an image draws the same noise
    maps = parameters.view(B, M, C, H, W).movedim(1, -1).reshape(-1, M, 1, 1)  # all channels' first maps come first
    single = likelihood.log_prob(maps, images.reshape(-1, 1, 1, 1))
    assert whole.shape == (B,)
    assert torch.allclose(whole, single.view(B, -1).sum(1), rtol=1e-12)


# Against other implementations.


def test_bernoulli_is_that_of_torch_distributions():
    likelihood, parameters, images = problem("bernoulli", scale=5)
    expected = torch.distributions.Bernoulli(logits=parameters).log_prob(images.double()).sum((1, 2, 3))
    assert torch.allclose(likelihood.log_prob(parameters, images), expected, rtol=1e-12)


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_bernoulli_is_as_precise_as_float32_and_has_the_gradient_of_cross_entropy(pixel):
    logits = torch.cat([torch.linspace(-100, 100, 100_001), torch.linspace(-1, 1, 10_001)])
    logits = logits.view(-1, 1, 1, 1).requires_grad_()
    images = torch.full_like(logits, pixel, requires_grad=False)
    log_prob = Bernoulli().log_prob(logits, images)
    exact = -F.binary_cross_entropy_with_logits(logits.double(), images.double(), reduction="none").flatten()
    assert ((log_prob - exact).abs() <= 1.2e-7 + 6e-8 * exact.abs()).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-F.binary_cross_entropy_with_logits(logits, images, reduction="sum"), logits)
    assert torch.equal(gradient, expected)


def test_categorical_is_that_of_torch_distributions():
    likelihood, parameters, images = problem("categorical", levels=5)
    logits = parameters.view(3, 5, 2, 4, 5).movedim(1, -1)
    expected = torch.distributions.Categorical(logits=logits).log_prob((images * 4).round()).sum((1, 2, 3))
    assert torch.allclose(likelihood.log_prob(parameters, images), expected, rtol=1e-12)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (0.3, -3.0), (-1.2, -1.5), (2.0, 2.0)])
def test_logistic_is_the_difference_of_scipys_distribution_function(mean, log_scale):
    levels = 17
    borders = (2 * torch.arange(1, levels) - 1) / (levels - 1) - 1  # halfway between neighbours, on [-1, 1]
    cumulative = torch.from_numpy(stats.logistic.cdf(borders.double().numpy(), mean, math.exp(log_scale)))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = torch.cat([ends[:1], cumulative, ends[1:]]).diff()
    found = of_each_level(Logistic(levels), torch.tensor([mean, log_scale], dtype=torch.float64)).exp()
    assert torch.allclose(found[0], expected, rtol=1e-9, atol=1e-14)


def test_logistic_of_two_levels_is_bernoulli():
    parameters, images = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randint(2, (4, 1, 3, 3)).float()
    logits = parameters[:, :1] * torch.exp(-parameters[:, 1:])
    expected = Bernoulli().log_prob(logits, images)
    assert torch.allclose(Logistic(2).log_prob(parameters, images), expected, rtol=1e-12)


def test_logit_laplace_is_torchs_transformed_distribution_and_the_jacobian_of_the_levels():
    likelihood, parameters, images = problem("logit_laplace", levels=256)
    torch.manual_seed(1)
    found = likelihood.log_prob(parameters, images)
    torch.manual_seed(1)
    noise = torch.rand(images.shape, dtype=torch.float64)
    laplace = torch.distributions.Laplace(parameters[:, :2], parameters[:, 2:].exp())
    density = torch.distributions.TransformedDistribution(laplace, torch.distributions.transforms.SigmoidTransform())
    v = 0.1 + 0.8 * ((255 * images).round() + noise) / 256
    expected = (density.log_prob(v) + math.log(0.8 / 256)).sum((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-6)


# Honest nats.


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_knowing_nothing_costs_log_levels_a_value(levels):
    image = torch.randint(levels, (1, 3, 8, 8)) / (levels - 1)
    nats = Categorical(levels).log_prob(torch.zeros(1, 3 * levels, 8, 8), image).item()
    assert nats == pytest.approx(-192 * math.log(levels))
    assert Bernoulli().log_prob(torch.zeros(1, 3, 8, 8), image.round()).item() == pytest.approx(-192 * math.log(2))


def test_dequantised_nats_are_below_the_log_of_the_bins_mass_and_their_exponential_is_it():
    # For m = 0 and b = 1 the density at v < 1/2 is 1 / (2 (1 - v)^2), whose integral is 1 / (2 (1 - v)).
    levels, level, draws = 4, 1, 100_000
    low, high = 0.1 + 0.8 * level / levels, 0.1 + 0.8 * (level + 1) / levels
    mass = 1 / (2 * (1 - high)) - 1 / (2 * (1 - low))
    assert mass == pytest.approx(bin_masses(0.0, 1.0, levels)[level].item())
    images = torch.full((draws, 1, 1, 1), level / (levels - 1), dtype=torch.float64)
    nats = LogitLaplace(levels).log_prob(torch.zeros(draws, 2, 1, 1, dtype=torch.float64), images)
    error = nats.exp().std().item() / math.sqrt(draws)
    assert nats.exp().mean().item() == pytest.approx(mass, abs=4 * error)
    gap = math.log(mass) - nats.mean()
    assert gap > 10 * nats.std() / math.sqrt(draws)
    # The integral of log f over the bin: -log 2 - 2 log(1 - v), with (1 - v)(1 - log(1 - v)) as that of -log(1 - v) ...
    antiderivative = [2 * ((1 - v) * math.log(1 - v) - (1 - v)) for v in (low, high)]
    bound = -math.log(2) + (antiderivative[1] - antiderivative[0]) / (high - low) + math.log(0.8 / levels)
    assert nats.mean().item() == pytest.approx(bound, abs=4 * nats.std().item() / math.sqrt(draws))


def test_twice_the_levels_cost_log_two_a_value_more():
    """Without the Jacobian, nats would be the same, and of another sign."""
    image, parameters = torch.full((1, 3, 32, 32), 0.5), torch.zeros(1, 6, 32, 32)
    nats = [LogitLaplace(levels).log_prob(parameters, image).item() / image.numel() for levels in (255, 510)]
    assert nats[0] == pytest.approx(math.log(2 * 0.8 / 255), abs=0.01)  # at v = 1/2 the density is 2
    assert nats[0] - nats[1] == pytest.approx(math.log(2), abs=0.01)


# Gradients.


@pytest.mark.parametrize("levels", [2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, levels):
    likelihood, parameters, images = problem(name, levels, shape=(2, 2, 1, 2))

    def log_prob(parameters: Tensor) -> Tensor:
        torch.manual_seed(1)
        return likelihood.log_prob(parameters, images)

    parameters.requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (parameters,))
    assert torch.autograd.gradgradcheck(log_prob, (parameters,))


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("name", ["logistic", "logit_laplace"])
def test_a_mean_that_is_far_off_is_pulled_back_with_full_strength(name, level):
    for mean in (-300.0, 300.0):
        parameters = torch.tensor([mean, -2.0]).view(1, 2, 1, 1).requires_grad_()
        log_prob = likelihoods.create(name).log_prob(parameters, torch.full((1, 1, 1, 1), level / 255))
        (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
        open_edge = name == "logistic" and (level, mean) in ((0, -300.0), (255, 300.0))
        assert gradient[0, 0].item() == pytest.approx(0.0 if open_edge else -math.copysign(math.exp(2), mean))
        assert (log_prob.item() == 0) is open_edge
        assert (gradient[0, 1].item() > 1000) is not open_edge  # a wider density would have been the better one


@pytest.mark.parametrize("name", ["logistic", "logit_laplace"])
def test_log_scales_are_clamped_at_seven(name):
    likelihood = likelihoods.create(name)
    for log_scale in (-7.0, 7.0):
        results = []
        for factor in (0.9999, 1.0001, 100.0):
            parameters = torch.tensor([0.2, factor * log_scale], dtype=torch.float64).view(1, 2, 1, 1).requires_grad_()
            torch.manual_seed(1)
            log_prob = likelihood.log_prob(parameters, torch.full((1, 1, 1, 1), 99 / 255))
            (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
            results.append((log_prob.item(), *gradient.flatten().tolist()))
        within, beyond, far = results
        assert beyond == far
        assert within[:2] == pytest.approx(beyond[:2], rel=2e-3)
        assert within[1] < 0  # the image is below the mean, which hears of it wherever the scale is
        assert (within[2] > 0) == (log_scale < 0)
        assert within[2] != 0 == beyond[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_parameters_leave_everything_finite(name, dtype):
    largest = 6e4 if dtype == torch.float16 else 1e30
    likelihood, parameters, images = problem(name, levels=256, shape=(2, 1, 16, 16))
    parameters = (parameters.sign() * largest * (torch.rand_like(parameters) < 0.7)).to(dtype).requires_grad_()
    images[0].view(-1)[:2] = torch.tensor([0.0, 1.0])
    log_prob = likelihood.log_prob(parameters, images)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert parameters.grad.isfinite().all()
    likelihood.check(likelihood.sample(parameters))
    Likelihood.check(likelihood, likelihood.mean(parameters))  # grey under Bernoulli, too
    assert (log_prob < 0).all()


# Precision, compiler, shapes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_parameters_are_computed_with_in_float32(name, dtype):
    likelihood, parameters, images = problem(name)
    half = parameters.to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    gradients = []
    for given, automatic in ((half, False), (half, True), (single, False), (single, True)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            log_prob = likelihood.log_prob(given, images)
            mean = likelihood.mean(given)
        assert log_prob.dtype == mean.dtype == torch.float32
        gradients.append(torch.autograd.grad(log_prob.sum(), given)[0])
        assert torch.equal(mean, likelihood.mean(single))
        torch.manual_seed(1)
        assert torch.equal(log_prob, likelihood.log_prob(single, images))
    assert torch.equal(gradients[2], gradients[3])
    assert torch.equal(gradients[0], gradients[2].to(dtype))
    assert torch.equal(gradients[1], gradients[0])


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_to_one_graph_that_computes_the_same(name):
    likelihood, parameters, images = problem(name)
    parameters = parameters.float().requires_grad_()
    results = []
    for log_prob in (likelihood.log_prob, torch.compile(likelihood.log_prob, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        value = log_prob(parameters, images)
        results.append((value, *torch.autograd.grad(value.sum(), parameters)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_parameters_are_broadcast_against_images(name):
    likelihood, parameters, images = problem(name)
    parameters = torch.stack([parameters, parameters + 1]).requires_grad_()
    results = []
    for repeated in (images, images.expand(2, *images.shape)):
        torch.manual_seed(1)
        log_prob = likelihood.log_prob(parameters, repeated)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), parameters)))
    torch.manual_seed(1)
    flat = likelihood.log_prob(parameters.flatten(0, 1), images.repeat(2, 1, 1, 1))
    assert results[0][0].shape == (2, 3)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert torch.equal(results[0][0], flat.view(2, 3))


@pytest.mark.parametrize(
    ("of_parameters", "of_images"),
    [
        ((), (3,)),
        ((1,), (3,)),
        ((3,), ()),
        ((3,), (1,)),
        ((2, 1), (3,)),
        ((3,), (2, 3)),
        ((1, 3), (2, 1)),
        ((), (2, 3)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions_of_both_are_broadcast(name, of_parameters, of_images):
    likelihood, parameters, images = problem(name, shape=(6, 2, 4, 5))
    parameters = parameters[: math.prod(of_parameters)].view(*of_parameters, *parameters.shape[1:]).requires_grad_()
    images = images[: math.prod(of_images)].view(*of_images, *images.shape[1:])
    leading = torch.broadcast_shapes(of_parameters, of_images)
    repeated = parameters.expand(*leading, *parameters.shape[-3:]), images.expand(*leading, *images.shape[-3:])
    results = []
    for given in ((parameters, images), [each.contiguous() for each in repeated]):
        torch.manual_seed(1)
        log_prob = likelihood.log_prob(*given)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), parameters)))
    assert results[0][0].shape == leading
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_every_sample_has_noise_of_its_own():
    log_prob = LogitLaplace().log_prob(torch.zeros(100, 2, 1, 1), torch.zeros(1, 1, 1, 1))
    assert len(log_prob.unique()) > 90


@pytest.mark.parametrize("name", NAMES)
def test_no_images_have_no_nats(name):
    likelihood, parameters, images = problem(name)
    likelihood.check(images[:0])
    assert likelihood.log_prob(parameters[:0], images[:0]).shape == (0,)
    assert likelihood.mean(parameters[:0]).shape == images[:0].shape


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_levels_survive_bfloat16_and_small_noise(name):
    likelihood, parameters, _ = problem(name, levels=256, shape=(256, 1, 1, 1))
    images = (torch.arange(256) / 255).view(-1, 1, 1, 1)
    results = []
    for given in (images, images.bfloat16(), (images + 0.0019 * (-1) ** torch.arange(256).view(-1, 1, 1, 1))):
        torch.manual_seed(1)
        results.append(likelihood.log_prob(parameters, given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert len(results[0].unique()) == 256


# Pictures.


@pytest.mark.parametrize(("name", "levels"), [("bernoulli", 2), ("categorical", 5), ("logistic", 2), ("logistic", 9)])
def test_mean_is_the_expectation(name, levels):
    likelihood = likelihoods.create(name, levels)
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    for _ in range(5):
        parameters = torch.randn(likelihood.maps_per_channel, dtype=torch.float64) - 0.5
        expected = (of_each_level(likelihood, parameters)[0].exp() * values).sum().item()
        assert likelihood.mean(parameters.view(1, -1, 1, 1)).item() == pytest.approx(expected, rel=1e-9)


def test_logit_laplace_shows_the_median():
    parameters = torch.tensor([0.0, 0.8, -1.4, 5.0, 0.5, 0.5, 0.5, 0.5]).view(1, 8, 1, 1)  # four channels
    shown = LogitLaplace(256).mean(parameters)
    drawn = LogitLaplace(256).sample(parameters.expand(20_001, -1, -1, -1)).median(0).values
    assert shown[0, 0].item() == 0.5
    assert shown[0, 3].item() == 1
    assert (shown - drawn).abs().max() < 0.02


@pytest.mark.parametrize("parameters", [[0.2, -0.5], [-1.5, 0.3], [0.05, -2.0]])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_as_frequent_as_the_likelihood_says(name, parameters):
    levels, draws = 2 if name == "bernoulli" else 6, 50_000
    likelihood = likelihoods.create(name, levels)
    values = torch.tensor(parameters, dtype=torch.float64)
    if name == "categorical":
        values = torch.linspace(*parameters, levels, dtype=torch.float64)
    values = values[: likelihood.maps_per_channel]
    sample = likelihood.sample(values.view(1, -1, 1, 1).expand(draws, -1, -1, -1))
    likelihood.check(sample)
    assert sample.shape == (draws, 1, 1, 1)
    found = torch.bincount((sample.flatten() * (levels - 1)).round().long(), minlength=levels) / draws
    assert torch.allclose(sample * (levels - 1), (sample * (levels - 1)).round(), atol=1e-6)
    if name == "logit_laplace":
        expected = bin_masses(values[0].item(), values[1].exp().item(), levels)
        below = stats.laplace.cdf(math.log(0.1 / 0.9), values[0].item(), values[1].exp().item())
        expected[0] += below  # what belongs to no level is shown as the nearest
        expected[-1] += 1 - expected.sum()
    else:
        expected = of_each_level(likelihood, values)[0].exp()
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


# What is refused.


@pytest.mark.parametrize("name", NAMES)
def test_images_outside_of_the_support_are_refused(name):
    likelihood, _, images = problem(name)
    likelihood.check(images)
    likelihood.check(images.bfloat16() if name != "bernoulli" else images.half())
    with pytest.raises(
        ValueError,
        match=rf"^images have values from -2.118 to 2.64: the likelihood '{name}' needs them in \[0, 1\], which a data "
        "module gives with mean 0 and std 1$",
    ):
        likelihood.check(torch.tensor([[[[-2.1179, 0.5, 2.64]]]]))
    for one in (-1e-3, 1.001, math.inf):
        with pytest.raises(ValueError, match="images have values from"):
            likelihood.check(torch.tensor([0.0, one, 1.0]).view(1, 1, 1, 3))
    with pytest.raises(ValueError, match=rf"^images hold NaN: the likelihood '{name}' needs values in \[0, 1\]$"):
        likelihood.check(torch.tensor([0.0, math.nan, 1.0]).view(1, 1, 1, 3))


def test_grey_values_are_refused_by_bernoulli_alone():
    images = torch.tensor([0.0, 1.0, 0.25, 0.75]).view(1, 1, 2, 2)
    with pytest.raises(
        ValueError,
        match="^images have grey values, such as 0.25: the likelihood 'bernoulli' needs 0 and 1 alone, which a data "
        "module gives with binarize; for grey ones there are categorical, logistic and logit_laplace$",
    ):
        Bernoulli().check(images)
    for name in WITH_LEVELS:
        likelihoods.create(name).check(images)


def test_unknown_names_and_too_few_levels():
    with pytest.raises(
        ValueError,
        match="^unknown likelihood 'gaussian': expected one of bernoulli, categorical, logistic, logit_laplace$",
    ):
        likelihoods.create("gaussian")
    for name in WITH_LEVELS:
        assert likelihoods.create(name, 2).levels == 2
        with pytest.raises(ValueError, match="^levels is 1: expected at least 2$"):
            likelihoods.create(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_of_other_maps_is_refused_and_not_broadcast(name):
    likelihood, _, images = problem(name, shape=(3, 2, 4, 5))
    M = likelihood.maps_per_channel
    for wrong in ((3, M, 4, 5), (3, 2 * M + 1, 4, 5), (3, 2 * M, 1, 5)):
        with pytest.raises(ValueError, match=rf"likelihood '{name}' needs \(..., {2 * M}, 4, 5\)$"):
            likelihood.log_prob(torch.zeros(wrong), images)
