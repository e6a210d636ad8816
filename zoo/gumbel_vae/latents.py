"""The latents of an autoencoder: posterior, prior and training objective, as a technique provides them."""

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor
from torchmetrics import Metric


class VAEOutput(NamedTuple):
    """Loss and its parts for each image, (B,) float32 nats.

    Attributes:
        loss: What is minimised: distortion and weighted KL. It is minus a bound only where the samples of the
            objective are hard, the weight of the KL is 1 and its form is no relaxed one.
        distortion: Minus log p(x|z), a mean over the objective's samples.
        kl: KL of the posterior from the prior, by its closed form.
    """

    loss: Tensor
    distortion: Tensor
    kl: Tensor


class Latents:
    """The methods of a technique on its latents. z is (S, B, N, D): S samples for each of B images."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Parameters of the posterior q(z|x), (B, N, P)."""

    @abstractmethod
    def draw(self, posterior: Tensor, samples: int) -> Tensor:
        """Samples z (S, B, N, D) of q, hard ones: nothing is relaxed."""

    @abstractmethod
    def draw_prior(self, n: int) -> Tensor:
        """Samples z (n, N, D) of p(z)."""

    @abstractmethod
    def log_ratio(self, z: Tensor, posterior: Tensor) -> Tensor:
        """log p(z) - log q(z|x), (S, B)."""

    @abstractmethod
    def kl(self, posterior: Tensor) -> Tensor:
        """KL of q(z|x) from p(z) in closed form, (B,) nats."""

    @abstractmethod
    def objective(self, images: Tensor, *knobs: Tensor) -> VAEOutput:
        """The training objective; ``knobs`` are the values of :meth:`zoo.gumbel_vae.base.VAE.knobs`."""

    @abstractmethod
    def codes(self, posterior: Tensor) -> Tensor:
        """The most likely z (B, N, D)."""

    @abstractmethod
    def between(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Interpolation z (B, steps, N, D) from one z (B, N, D) to another, both included."""

    @abstractmethod
    def latent_values(self, z: Tensor) -> Tensor:
        """Values (values, D) of a latent traversal, like z in type and device."""

    @abstractmethod
    def latent_metrics(self) -> dict[str, Metric]:
        """Metrics of latents over an evaluation, by name."""

    @abstractmethod
    def latent_statistics(self, posterior: Tensor) -> dict[str, Tensor]:
        """Updates of those metrics, by the same names."""
