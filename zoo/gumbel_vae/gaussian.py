"""GaussianVAE: the same autoencoder with Gaussian latents, and gradients along the sample's path."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common import batch as batches
from zoo.gumbel_vae.base import VAE
from zoo.gumbel_vae.estimators import GaussianPathwise
from zoo.gumbel_vae.estimators.sampling import full_precision
from zoo.gumbel_vae.latents import VAEOutput
from zoo.gumbel_vae.metrics import ActiveUnits
from zoo.gumbel_vae.networks import Activation, Network


class GaussianVAE(VAE):
    """Variational autoencoder with N Gaussian latents (Kingma and Welling 2014, arXiv 1312.6114).

    Everything but the latents is :class:`zoo.gumbel_vae.GumbelVAE`'s: batches, bounds, pictures, and what is logged,
    with ``val/active_latents`` by the variance of their means (Burda et al. 2016), and without temperature and
    perplexity. Predicts the means of the posterior.

    Args:
        latents: Number of latents, N; or their grid (h, w), with N = h * w in raster order.
        image_size: Side in pixels, or (height, width).
        in_channels: Channels of the images.
        likelihood: Likelihood of images: "bernoulli", "categorical", "logistic" or "logit_laplace", as of
            :class:`zoo.gumbel_vae.GumbelVAE`.
        weights: Weights to start from: see :func:`zoo.weights.load`.
        samples: Samples z of each image in a training step.
        kl_weight: Weight of the KL in the training objective, in nats an image as the distortion is: 1 for a bound.
        kl_warmup_steps: Steps over which the weight rises from 0, along half a cosine.
        levels: Grey levels of the images, for the likelihoods that have them.
        network: "mlp" or "conv": see :mod:`zoo.gumbel_vae.networks`.
        hidden: Widths of the encoder's hidden layers, for "mlp"; the decoder has them in reverse.
        activation: Activation between the hidden layers, for "mlp": "relu" or "tanh".
        dropout: Dropout of the hidden layers, for "mlp".
        width: Channels at the images' resolution, for "conv", doubled with each halving.
        blocks: Residual blocks at each resolution, for "conv".
        elbo_samples: Samples z of each image in evaluation.
        iw_samples: Samples z of each image for the importance-weighted bound, which testing logs. None: no such bound.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate.
        weight_decay: Not applied to biases.
        betas: Betas of the optimizer. None: its own.
        lr_schedule: "cosine", to min_lr at the end of the run after a linear warm-up; or "constant".
        warmup_epochs: Linear warm-up of the cosine, in epochs; fractions count.
        min_lr: Learning rate that the cosine ends at.
        compile: Compile in place, as ``model.compile()`` does.

    Raises:
        ValueError: As there.
    """

    exports: ClassVar = {"features": "exported_features", "reconstruction": "exported_reconstruction"}

    def __init__(
        self,
        latents: int | tuple[int, int] = 32,
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        likelihood: str = "bernoulli",
        weights: str | None = None,
        samples: int = 1,
        kl_weight: float = 1.0,
        kl_warmup_steps: int = 0,
        levels: int = 256,
        network: Network = "mlp",
        hidden: Sequence[int] = (512, 256),
        activation: Activation = "relu",
        dropout: float = 0.0,
        width: int = 64,
        blocks: int = 2,
        elbo_samples: int = 1,
        iw_samples: int | None = None,
        optimizer: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        lr_schedule: Literal["cosine", "constant"] = "cosine",
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        self.build(encoder_outputs=2, decoder_inputs=1)
        self.estimator = GaussianPathwise(samples)
        self.start(weights, compile)

    # The latents.

    def encode(self, images: Tensor) -> Tensor:
        """Mean and log variance (B, N, 2) of the posterior of images (B, C, H, W) in [0, 1]."""
        return self.backbone(images.to(self.dtype))

    def draw(self, posterior: Tensor, samples: int) -> Tensor:
        mean, log_variance = full_precision(posterior)[..., None].unbind(2)  # (B, N, 1)
        noise = torch.randn((samples, *mean.shape), dtype=mean.dtype, device=mean.device)
        return mean + (0.5 * log_variance).exp() * noise

    def draw_prior(self, n: int) -> Tensor:
        return torch.randn((n, self.latents, 1), dtype=torch.float32, device=self.device)

    def log_ratio(self, z: Tensor, posterior: Tensor) -> Tensor:
        mean, log_variance = full_precision(posterior)[..., None].unbind(2)
        standard = (z - mean).square() * (-log_variance).exp()
        return 0.5 * (standard + log_variance - z.square()).sum((-1, -2))

    def kl(self, posterior: Tensor) -> Tensor:
        """Sum over the latents of (mean^2 + variance - 1 - log variance) / 2."""
        mean, log_variance = full_precision(posterior).unbind(-1)
        return 0.5 * (mean.square() + log_variance.expm1() - log_variance).sum(-1)

    def codes(self, posterior: Tensor) -> Tensor:
        return full_precision(posterior[..., :1])

    def exported_features(self, images: Tensor) -> dict[str, Tensor]:
        """``features`` (B, N): means of the posterior, with no look at values."""
        return {"features": self.codes(self._posterior(images, values=False))[..., 0]}

    def between(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Spherical interpolation: a straight line would lead through lengths that the prior hardly has."""
        ends = first.flatten(1)[:, None], second.flatten(1)[:, None]  # (B, 1, N)
        cosine = torch.cosine_similarity(*ends, dim=-1)[..., None].clamp(-1, 1)
        angle = torch.acos(cosine).clamp(1e-4, math.pi - 1e-4)  # at 0 a straight line; opposite ends have no one way
        share = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)[:, None]
        weights = torch.sin((1 - share) * angle) / torch.sin(angle), torch.sin(share * angle) / torch.sin(angle)
        return (weights[0] * ends[0] + weights[1] * ends[1])[..., None]

    def latent_values(self, z: Tensor) -> Tensor:
        """Values of a traversal: nine from -2 to 2."""
        return torch.linspace(-2, 2, 9, dtype=z.dtype, device=z.device)[:, None]

    # Training and evaluation.

    def objective(self, images: Tensor, *knobs: Tensor) -> VAEOutput:
        (kl_weight,) = knobs
        posterior = full_precision(self.encode(images))
        mean, log_variance = posterior.unbind(-1)
        distortion = self.estimator.expectation(
            mean, (0.5 * log_variance).exp(), lambda z: self.distortion(z[..., None], images)
        )
        kl = self.kl(posterior)
        return VAEOutput(distortion + kl_weight * kl, distortion, kl)

    def latent_metrics(self) -> dict[str, Metric]:
        return {"active_latents": ActiveUnits(self.latents)}

    def latent_statistics(self, posterior: Tensor) -> dict[str, Tensor]:
        return {"active_latents": posterior[..., 0]}

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.codes(self._posterior(batches.images(batch)))[..., 0]

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Results of predictions: the means (N,) of each image."""
        return [{"features": row} for row in outputs]

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Rows of :class:`zoo.callbacks.WritePredictions`: the means of each image, one column each."""
        return [{f"mean{i}": f"{value:.6g}" for i, value in enumerate(row)} for row in outputs.float().tolist()]
