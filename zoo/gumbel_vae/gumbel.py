"""GumbelVAE: an autoencoder whose latents are categories, and the gradient estimator it learns with."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.common import batch as batches
from zoo.common.ranges import check_above, check_ranges
from zoo.gumbel_vae import estimators
from zoo.gumbel_vae.base import VAE
from zoo.gumbel_vae.estimators.base import log_prob
from zoo.gumbel_vae.estimators.sampling import full_precision
from zoo.gumbel_vae.latents import VAEOutput
from zoo.gumbel_vae.metrics import ActiveLatents, CodeUsage
from zoo.gumbel_vae.networks import Activation, Network
from zoo.gumbel_vae.peers import PEERS
from zoo.gumbel_vae.schedules import SCHEDULES, check_temperatures

KL = Literal["analytic", "sampled", "relaxed"]
Prior = Literal["uniform", "learned"]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class GumbelVAE(VAE):
    """Variational autoencoder with N latents of K categories each.

    Batch: images (B, C, H, W) in [0, 1] in any form that :mod:`zoo.common.batch` reads; labels are not learned from.
    Logs ``train/loss``, ``train/distortion``, ``train/kl``, ``train/temperature``, ``train/kl_weight``; ``val/elbo``,
    of hard samples whatever the estimator, in nats an image, and minus it as ``val/loss``; ``val/kl``,
    ``val/bits_per_dim``, ``val/active_latents`` (those that tell more than 0.01 nats of an image) and
    ``val/perplexity`` (the codebook's, at most K). The same for ``test``, and with ``iw_samples``
    ``test/log_likelihood``. Predicts codes.

    Args:
        latents: Number of latents, N; or their grid (h, w), with N = h * w in raster order: a tokeniser of images.
        categories: Categories K of each latent.
        image_size: Side in pixels, or (height, width).
        in_channels: Channels of the images.
        likelihood: Likelihood of images: "bernoulli", for images of 0 and 1; of images with grey levels "categorical"
            over them, "logistic" (discretised) or "logit_laplace"; all of them normalised: see
            :mod:`zoo.gumbel_vae.likelihoods`.
        estimator: How gradients pass the sample: a name out of :data:`zoo.gumbel_vae.estimators.ESTIMATORS`.
        weights: Weights to start from: see :func:`zoo.weights.load`.
        estimator_samples: Samples z of each image, or conditional Gumbels of "gumbel_rao", for an estimator that takes
            several. None: the estimator's own number.
        temperature: Temperature of relaxed samples, at the start.
        min_temperature: Temperature that the schedule ends at.
        temperature_schedule: "constant"; "exponential", a factor a step (Jang et al. 2017); "cosine" (Ramesh et al.
            2021).
        temperature_steps: Steps of the optimizer from the one to the other. An exponential decay at rate r, as papers
            give it, takes ln(temperature / min_temperature) / r of them.
        kl: KL of the training objective: "analytic", the closed form for categories; "sampled", log q(z|x) - log p(z)
            at the estimator's samples, which is noisier and, at relaxed ones, not a divergence of anything (Maddison et
            al. 2017, equation 21); "relaxed", of the densities of relaxed samples (equation 20), which alone makes a
            bound of the relaxed model, but has no upper limit and, without warm-up, makes small models ignore their
            latents. "relaxed" goes with "gumbel_softmax".
        prior_temperature: Temperature of the relaxed prior, with kl "relaxed". None: the posterior's.
        prior: Prior of the codes: "uniform", or "learned", a distribution for each latent.
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
        ValueError: For an unknown choice, with what there is to choose from; for one category; for temperatures of 0
            or less; for sizes that do not fit; for images outside of the likelihood's support.
    """

    peers: ClassVar = PEERS
    exports: ClassVar = {"codes": "exported_codes", "reconstruction": "exported_reconstruction"}

    def __init__(
        self,
        latents: int | tuple[int, int] = 32,
        categories: int = 10,
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        likelihood: str = "bernoulli",
        estimator: str = "gumbel_softmax",
        weights: str | None = None,
        estimator_samples: int | None = None,
        temperature: float = 1.0,
        min_temperature: float = 0.5,
        temperature_schedule: str = "exponential",
        temperature_steps: int = 20_000,
        kl: KL = "analytic",
        prior_temperature: float | None = None,
        prior: Prior = "uniform",
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
        if categories < 2:
            raise ValueError(f"categories is {categories}: expected at least 2, one category says nothing")
        check_ranges(estimator_samples=(estimator_samples, 1, None), temperature_steps=(temperature_steps, 1, None))
        check_above(
            temperature=(temperature, 0, math.inf),
            min_temperature=(min_temperature, 0, math.inf),
            prior_temperature=(prior_temperature, 0, math.inf),
        )
        check_temperatures(temperature_schedule, temperature, min_temperature, temperature_steps)
        for name, value, choices in (("kl", kl, get_args(KL)), ("prior", prior, get_args(Prior))):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(choices)}")
        self.categories = categories
        self.build(encoder_outputs=categories, decoder_inputs=categories)
        self.estimator = estimators.create(estimator, estimator_samples)
        if self.estimator.binary_only and categories != 2:
            raise ValueError(f"estimator {estimator!r} is for binary latents: categories is {categories}, not 2")
        if kl == "relaxed" and estimator != "gumbel_softmax":
            raise ValueError(f"kl 'relaxed' needs relaxed samples, and estimator {estimator!r} draws hard ones")
        if estimator == "vimco" and kl != "sampled":
            raise ValueError(
                "estimator 'vimco' is of the importance-weighted bound, which has the KL inside: set kl to sampled"
            )
        # Learned together with the networks; a buffer of zeros is the uniform prior.
        logits = torch.zeros(self.latents, categories)
        if prior == "learned":
            self.prior_logits = nn.Parameter(logits)
        else:
            self.register_buffer("prior_logits", logits, persistent=False)
        self.start(weights, compile)

    # The latents.

    def encode(self, images: Tensor) -> Tensor:
        """Logits (B, N, K) of the posterior of images (B, C, H, W) in [0, 1]."""
        return self.backbone(images.to(self.dtype))

    def log_prior(self) -> Tensor:
        """log p(z), (N, K)."""
        return full_precision(self.prior_logits).log_softmax(-1)

    def draw(self, posterior: Tensor, samples: int) -> Tensor:
        return estimators.gumbel_max(posterior.expand(samples, *posterior.shape))

    def draw_prior(self, n: int) -> Tensor:
        return estimators.gumbel_max(self.log_prior().expand(n, -1, -1))

    def log_ratio(self, z: Tensor, posterior: Tensor) -> Tensor:
        return log_prob(self.log_prior(), z) - log_prob(full_precision(posterior), z)

    def kl(self, posterior: Tensor) -> Tensor:
        """Sum over the latents of sum_k q_k (log q_k - log p_k): N log K at most under a uniform prior.

        A category whose logit is -inf counts nothing, as 0 log 0 = 0.
        """
        log_q = full_precision(posterior).log_softmax(-1)
        masked = log_q == -torch.inf
        ratio = (log_q - self.log_prior()).masked_fill(masked, 0.0)
        return (log_q.exp() * ratio).sum((-1, -2))

    def codes(self, posterior: Tensor) -> Tensor:
        return F.one_hot(posterior.argmax(-1), self.categories).to(self.dtype)

    def between(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Interpolation: of the latents that differ, a growing share in raster order is that of the second."""
        differ = (first != second).any(-1)  # (B, N)
        rank = differ.cumsum(1)
        share = torch.linspace(0, 1, steps, dtype=torch.float32, device=first.device)[:, None]
        changed = rank[:, None] <= (share * differ.sum(1)[:, None, None]).round()  # (B, steps, N)
        return torch.where(changed[..., None], second[:, None], first[:, None])

    def latent_values(self, z: Tensor) -> Tensor:
        """Values of a traversal: the first 16 categories."""
        first = torch.arange(min(self.categories, 16), device=z.device)
        return F.one_hot(first, self.categories).to(z.dtype)

    # A tokeniser of images.

    def exported_codes(self, images: Tensor) -> dict[str, Tensor]:
        """``codes`` (B, N) int64 as of :meth:`tokens`, with no look at values."""
        return {"codes": self._posterior(images, values=False).argmax(-1)}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The most likely category of each latent, int64 (B, N), a grid in raster order."""
        return self._posterior(images).argmax(-1)

    @torch.no_grad()
    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of tokens (B, N), or in their grid (B, h, w).

        Raises:
            ValueError: For another number of latents or another grid, such as one transposed, and for tokens that are
                no integers from 0 to K - 1.
        """
        forms = [(self.latents,)] if self.grid is None else [(self.latents,), self.grid]
        if tuple(tokens.shape[1:]) not in forms or tokens.dtype not in INTEGERS:
            expected = " or ".join(f"(B, {', '.join(map(str, form))})" for form in forms)
            raise ValueError(f"tokens are {tuple(tokens.shape)} and {tokens.dtype}: expected integers {expected}")
        flat = tokens.flatten(1)
        if flat.numel() and not 0 <= flat.min() <= flat.max() < self.categories:
            raise ValueError(f"tokens are {flat.min()} to {flat.max()}: expected 0 to {self.categories - 1}")
        return self._shown(F.one_hot(flat.long(), self.categories))

    # Training.

    @property
    def temperature(self) -> float:
        """Temperature of relaxed samples, at this step."""
        hp = self.hparams
        schedule = SCHEDULES[hp.temperature_schedule]
        return schedule(self.step, hp.temperature, hp.min_temperature, hp.temperature_steps)

    def knobs(self) -> dict[str, Tensor]:
        return super().knobs() | {"temperature": self._scalar(self.temperature)}

    def objective(self, images: Tensor, *knobs: Tensor) -> VAEOutput:
        kl_weight, temperature = knobs
        logits = full_precision(self.encode(images))
        kl = self.kl(logits)
        if self.hparams.kl == "analytic":
            distortion = self.estimator.expectation(logits, lambda z: self.distortion(z, images), temperature)
            return VAEOutput(distortion + kl_weight * kl, distortion, kl)
        if self.hparams.kl == "sampled":
            distortions: list[Tensor] = []  # of every time that the estimator asks; first, of its samples

            def cost(z: Tensor) -> Tensor:
                distortion = self.distortion(z, images)
                distortions.append(distortion.detach())
                return distortion - kl_weight * self.log_ratio(z, logits)

            loss = self.estimator.expectation(logits, cost, temperature)
            if isinstance(self.estimator, estimators.Exact):  # which weighs all states there are, with no noise in it
                return VAEOutput(loss, loss.detach() - kl_weight * kl.detach(), kl)
            return VAEOutput(loss, distortions[0].mean(0), kl)
        given = self.hparams.prior_temperature
        samples = self.hparams.estimator_samples or 1
        log_z = estimators.log_gumbel_softmax(logits.expand(samples, *logits.shape), temperature)
        distortion = self.distortion(log_z.exp(), images).mean(0)
        prior_temperature = temperature if given is None else temperature.new_full((), given)
        log_q = log_concrete_density(log_z, logits, temperature)
        log_p = log_concrete_density(log_z, self.log_prior(), prior_temperature)
        # What is not masked has not all of the prior: as in the closed form, this is a part of the divergence.
        log_p = log_p + self.log_prior().masked_fill(log_z == -torch.inf, -torch.inf).logsumexp(-1)
        return VAEOutput(distortion + kl_weight * (log_q - log_p).sum(-1).mean(0), distortion, kl)

    # Evaluation.

    def latent_metrics(self) -> dict[str, Metric]:
        shared = self.grid is not None and self.hparams.network == "conv"  # one codebook for all positions
        return {
            "active_latents": ActiveLatents(self.latents, self.categories),
            "perplexity": CodeUsage(self.latents, self.categories, shared=shared),
        }

    def latent_statistics(self, posterior: Tensor) -> dict[str, Tensor]:
        return {"active_latents": posterior, "perplexity": posterior.argmax(-1)}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.tokens(batches.images(batch))

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Results of predictions: the codes (N,) of each image."""
        return [{"codes": row} for row in outputs]

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Rows of :class:`zoo.callbacks.WritePredictions`: the codes of each image, one column each."""
        return [{f"code{i}": code for i, code in enumerate(codes)} for codes in outputs.tolist()]


def log_concrete_density(log_z: Tensor, logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Log density of the logarithm of a relaxed sample, (..., N) (ExpConcrete, Maddison et al. 2017, equation 25).

    Args:
        log_z: (..., N, K), whose logsumexp is 0. Categories where it is -inf, being masked, are as if they were not.
        logits: Log weights of the categories, (..., N, K), need not be normalised.
        temperature: Of the relaxation.
    """
    masked = log_z == -torch.inf
    categories = (~masked).sum(-1).to(log_z.dtype)
    # Not -inf less -inf, whose gradient would be NaN as well.
    scores = logits.masked_fill(masked, 0.0) - temperature * log_z.masked_fill(masked, 0.0)
    log_scale = torch.lgamma(categories) + (categories - 1) * torch.as_tensor(temperature).log()
    return log_scale + scores.sum(-1) - categories * scores.masked_fill(masked, -torch.inf).logsumexp(-1)
