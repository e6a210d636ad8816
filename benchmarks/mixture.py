"""Mixtures of independent Bernoullis: what a density model of binary images has to beat, with exact likelihoods.

    python benchmarks/mixture.py

prints the test log-likelihoods of those fitted to the digits of `gumbel_vae/digits`, in nats an image: a minute or two,
which is why no fit prints them.

p(x) = sum_k w_k prod_d m_kd^x_d (1 - m_kd)^(1 - x_d), fitted by expectation maximisation (Bishop, "Pattern Recognition
and Machine Learning", 2006, section 9.3.3). A pixel's mean under a component is smoothed by ``smoothing`` further
images, all of them the average image: without that, pixels which no image of a component has would be impossible.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules import DigitsDataModule, transforms

JITTER = 0.2  # of gumbel_vae/digits and gaussian_vae/digits


@dataclass(frozen=True, eq=False)
class BernoulliMixture:
    """``weights`` (K,) and ``means`` (K, D), all of them above 0, the means also below 1."""

    weights: Tensor
    means: Tensor

    def joint(self, images: Tensor) -> Tensor:
        """log p(x, k) in nats, (N, K), of float images (N, D) of 0 and 1."""
        black = torch.log1p(-self.means)
        return images @ (self.means.log() - black).T + black.sum(1) + self.weights.log()

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x) in nats, (N,)."""
        return self.joint(images).logsumexp(1)

    def improved(self, images: Tensor, smoothing: float) -> "BernoulliMixture":
        """After one more step of expectation maximisation.

        Such a step never lowers ``log_prob(images).sum() + log_prior(images, smoothing)``.
        """
        shares = self.joint(images).softmax(1)
        counts = shares.sum(0)
        means = (shares.T @ images + smoothing * average(images)) / (counts[:, None] + smoothing)
        # Rounding could make the weight of a component far from all images 0, and the mean of an ever white pixel 1.
        limits = torch.finfo(images.dtype)
        return BernoulliMixture((counts / len(images)).clamp(min=limits.tiny), means.clamp(max=1 - limits.eps))

    def log_prior(self, images: Tensor, smoothing: float) -> Tensor:
        """What the smoothing amounts to: the log-density of its prior of the means, but for a constant."""
        base = average(images)
        return smoothing * (base * self.means.log() + (1 - base) * torch.log1p(-self.means)).sum()


def average(images: Tensor) -> Tensor:
    """(D,) the mean image by the rule of succession, as if a black and a white one came on top: no mean is 0 or 1."""
    return (images.sum(0) + 1) / (len(images) + 2)


def fit(
    images: Tensor, components: int, smoothing: float = 1.0, seed: int = 0, tolerance: float = 1e-3, steps: int = 1000
) -> BernoulliMixture:
    """A mixture for float images (N, D) of 0 and 1, by components that start as some of the images, made paler.

    Args:
        images: The training images. Values between 0 and 1 are probabilities of a 1: fitted is the mean log-likelihood
            of what they are of, within each component.
        components: K.
        smoothing: How many further images, each the average one, a component's means are smoothed by; above 0.
        seed: Seed of the choice of the first images.
        tolerance: The fit ends once a step moves the mean log-likelihood by less, in nats.
        steps: Or after this many.

    Raises:
        ValueError: If there are fewer images than components.
    """
    if len(images) < components:
        raise ValueError(f"{len(images)} images are too few for {components} components, which start as one each")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:components]
    weights = torch.full((components,), 1 / components, dtype=images.dtype)
    mixture = BernoulliMixture(weights, (images[chosen] + 0.5) / 2)
    likelihood = mixture.log_prob(images).mean()
    for _ in range(steps):
        mixture = mixture.improved(images, smoothing)
        before, likelihood = likelihood, mixture.log_prob(images).mean()
        if abs(likelihood - before) < tolerance:
            break
    return mixture


def best(train: Tensor, val: Tensor) -> BernoulliMixture:
    """The best one on the validation images of thirty fits, from ten starts and with three amounts of smoothing."""
    mixtures = [fit(train, 100, smoothing, seed) for smoothing in (0.5, 1.0, 2.0) for seed in range(10)]
    return max(mixtures, key=lambda one: float(one.log_prob(val).mean()))


def nats(data: DigitsDataModule) -> dict[str, float]:
    """Exact test log-likelihoods, in nats per image, of mixtures of 100 Bernoullis fitted to the digits as 0 and 1.

    With ``jitter`` there is a second mixture, fitted to the pixels' probabilities under it, which knows what a model
    that is trained with it knows.
    """
    grey = {split: transforms.to_float(data.samples(split).images).flatten(1) for split in ("train", "val", "test")}
    train, val, test = (transforms.binarize(images) for images in grey.values())
    fitted = {"mixture of 100 Bernoullis": best(train, val)}
    if data.jitter:
        ones = ((grey["train"] - 0.5) / (2 * data.jitter) + 0.5).clamp(0, 1)
        fitted["mixture of 100 Bernoullis with the same jitter"] = best(ones, val)
    return {name: float(one.log_prob(test).mean()) for name, one in fitted.items()}


def benchmark_digits() -> DigitsDataModule:
    return DigitsDataModule(split="digits8x8-bin-v1", binarize="threshold", jitter=JITTER)


if __name__ == "__main__":
    for name, value in nats(benchmark_digits()).items():
        print(f"{name} {value:.4f} nats")
