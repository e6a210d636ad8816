"""The mixtures of Bernoullis that the benchmark of densities is measured against."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import DigitsDataModule, transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import mixture

ALL = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)


def test_a_mixture_is_a_normalised_density():
    fitted = mixture.fit(ALL[[0, 3, 3, 5, 9, 12]], 3, smoothing=0.1)
    assert fitted.log_prob(ALL).exp().sum().item() == pytest.approx(1, abs=1e-12)
    by_hand = sum(
        weight * torch.where(ALL.bool(), means, 1 - means).prod(1)
        for weight, means in zip(fitted.weights, fitted.means, strict=True)
    )
    torch.testing.assert_close(fitted.log_prob(ALL), by_hand.log())


@pytest.mark.parametrize("smoothing", [1e-9, 0.1, 2.0])
def test_expectation_maximisation_never_goes_down(smoothing):
    images = (torch.rand(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < 0.3).double()
    images[::2, :6] = 1
    current, heights = mixture.fit(images, 5, smoothing, steps=0), []
    for _ in range(60):
        heights.append((current.log_prob(images).sum() + current.log_prior(images, smoothing)).item())
        current = current.improved(images, smoothing)
    steps = np.diff(heights)
    assert steps.min() > -1e-9
    assert heights[-1] - heights[0] > 20


def test_expectation_maximisation_ends_where_nothing_pulls_at_the_means():
    images = (torch.rand(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < 0.3).double()
    images[::2, :3] = 1
    fitted = mixture.fit(images, 2, smoothing=3.0, tolerance=1e-14)
    means = fitted.means.clone().requires_grad_()
    height = mixture.BernoulliMixture(fitted.weights, means)
    (height.log_prob(images).sum() + height.log_prior(images, 3.0)).backward()
    assert means.grad.abs().max() < 1e-3  # of slopes that are some 100 for each of the two parts


def test_a_step_is_the_closed_form_where_components_are_known():
    images = torch.tensor([[1.0, 1.0, 0.0]] * 6 + [[0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    apart = mixture.BernoulliMixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[0.999, 0.999, 0.001], [0.001, 0.001, 0.999]], dtype=torch.float64),
    )
    step = apart.improved(images, smoothing=2.0)
    first, last = 7 / 10, 3 / 10  # the average image, a black and a white one more
    torch.testing.assert_close(step.weights, torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-6, rtol=0)
    expected = [
        [(6 + 2 * first) / 8, (6 + 2 * first) / 8, 2 * last / 8],
        [2 * first / 4, 2 * first / 4, (2 + 2 * last) / 4],
    ]
    torch.testing.assert_close(step.means, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_mixture_finds_the_components_that_made_the_images():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.95] * 8 + [0.05] * 8, [0.05] * 8 + [0.95] * 8])
    kinds = (torch.rand(3000, generator=generator) < 0.3).long()
    images = torch.bernoulli(means[kinds], generator=generator)
    fitted = mixture.fit(images, 2, smoothing=1.0, tolerance=1e-5)
    order = fitted.means[:, 0].argsort(descending=True)
    torch.testing.assert_close(fitted.means[order], means, atol=0.03, rtol=0)
    torch.testing.assert_close(fitted.weights[order], torch.tensor([0.7, 0.3]), atol=0.03, rtol=0)


def test_rounding_makes_no_image_impossible():
    images = torch.ones(100_000, 2)
    images[::2, 1] = 0
    fitted = mixture.fit(images, 2, smoothing=1e-3, steps=3)
    assert fitted.log_prob(torch.tensor([[0.0, 0.0], [1.0, 1.0]])).isfinite().all()


def test_the_seed_chooses_the_start():
    images = (torch.rand(100, 10, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    first, again, other = (mixture.fit(images, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)
    assert math.isfinite(other.log_prob(images).mean())


def test_the_mixture_that_knows_the_jitter_has_seen_as_much_as_a_model_that_trains_with_it():
    data = mixture.benchmark_digits()
    assert data.jitter == 0.2
    found = mixture.nats(data)
    assert found["mixture of 100 Bernoullis"] == pytest.approx(-17.29, abs=0.1)  # measured elsewhere
    assert list(found)[1] == "mixture of 100 Bernoullis with the same jitter"
    assert list(found.values())[1] == pytest.approx(-16.95, abs=0.15)
    # What it is fitted to, beside jittered images themselves.
    grey = data._arrays[0][data.indices("train")].float().div(255)
    drawn = torch.stack([transforms.binarize(grey, False, torch.Generator().manual_seed(i), 0.2) for i in range(400)])
    expected = ((grey - 0.5) / 0.4 + 0.5).clamp(0, 1)
    assert (drawn.mean(0) - expected).abs().max() < 0.13


def test_too_few_labels_for_the_mixture_are_named():
    with pytest.raises(ValueError, match="50 images are too few for 100 components"):
        mixture.nats(DigitsDataModule(binarize="threshold", labels_per_class=5))
