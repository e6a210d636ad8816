"""Bounds in nats, pictures and steps of autoencoders, whatever their latents."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.utils import make_grid

from zoo._lightning import LightningModule, rank_zero_info
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, optim, pictures
from zoo.common.compiling import Compilable
from zoo.common.evaluation import Evaluation
from zoo.common.log import StepLog, in_words
from zoo.common.precision import MeanMetric
from zoo.common.ranges import check_ranges, check_training
from zoo.common.seeding import differ_between_ranks
from zoo.gumbel_vae import likelihoods
from zoo.gumbel_vae.latents import Latents, VAEOutput
from zoo.gumbel_vae.networks import create_networks
from zoo.gumbel_vae.schedules import cosine
from zoo.sharding import Shardable
from zoo.weights import load as load_weights

VALUES_AT_A_TIME = 2**23
"""Values of the largest tensor, one image's apart, where there are many samples: a few hundred megabytes in all."""
VALUES = (0.0, 1.0)
"""Of black and of white in every image: of the data, and of what a model makes of it."""
VARIED = 16
"""How many latents are varied in a picture: the first ones."""
WORDS = {
    "elbo": "ELBO in nats",
    "log_likelihood": "importance-weighted bound in nats",
    "kl": "KL in nats",
    "bits_per_dim": "bits per dimension",
    "active_latents": "active latents",
}
"""Metrics of its own."""


class VAE(Latents, SafeLoading, Compilable, Evaluation, Shardable, LightningModule):
    """A variational autoencoder. It has no constructor: a technique calls :meth:`build` in its own.

    A technique provides the methods of :class:`~zoo.gumbel_vae.latents.Latents`.
    """

    backbone: Any
    decoder: Any
    hparams: Any  # Lightning calls it a mapping, and makes its keys attributes
    changeable: ClassVar = ("elbo_samples", "iw_samples")  # while a run goes on: they say how it is evaluated
    unpredicted: ClassVar = ("decoder",)  # parts that no prediction needs
    compiled: ClassVar = ("objective",)
    metric_text = staticmethod(partial(in_words, words=WORDS))
    categories = 1  # of each latent, where they are categorical

    def build(self, encoder_outputs: int, decoder_inputs: int) -> None:
        """Builds networks, likelihood and metrics, out of ``self.hparams``."""
        hp = self.hparams
        check_training(hp)
        check_ranges(
            image_size=(hp.image_size, 1, None),
            in_channels=(hp.in_channels, 1, None),
            latents=(hp.latents, 1, None),
            levels=(hp.levels, 2, None),
            width=(hp.width, 1, None),
            blocks=(hp.blocks, 1, None),
            kl_weight=(hp.kl_weight, 0, None),
            kl_warmup_steps=(hp.kl_warmup_steps, 0, None),
            elbo_samples=(hp.elbo_samples, 1, None),
            iw_samples=(hp.iw_samples, 1, None),
        )
        height, width = (hp.image_size, hp.image_size) if isinstance(hp.image_size, int) else hp.image_size
        self.input_shape = (hp.in_channels, height, width)
        """(C, H, W) of the images it takes."""
        self.grid = None if isinstance(hp.latents, int) else tuple(hp.latents)
        self.latents = hp.latents if isinstance(hp.latents, int) else math.prod(hp.latents)
        self.likelihood = likelihoods.create(hp.likelihood, hp.levels)
        self.backbone, self.decoder = create_networks(
            hp.network,
            self.input_shape,
            hp.latents if self.grid is None else self.grid,
            encoder_outputs,
            decoder_inputs,
            self.likelihood.maps_per_channel * hp.in_channels,
            hp.hidden,
            hp.activation,
            hp.dropout,
            hp.width,
            hp.blocks,
        )
        if hp.lr_schedule not in ("cosine", "constant"):
            raise ValueError(f"unknown lr_schedule {hp.lr_schedule!r}: expected one of cosine, constant")
        self.step_log = StepLog()
        self.val_metrics, self.test_metrics = self._metrics(), self._metrics()

    def start(self, weights: str | None, compile: bool) -> None:
        """Ends a constructor: loads weights, and compiles."""
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))
        if compile:
            self.compile()

    # The technique.

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters for latents z (B, N, D): for "bernoulli" logits (B, C, H, W)."""
        return self.decoder(z.to(self.dtype))

    def forward(self, images: Tensor) -> VAEOutput:
        """The training objective of images (B, C, H, W) in [0, 1], at this step's temperature and weight of the KL."""
        self._check(images)
        return self.objective(images, *self.knobs().values())

    def distortion(self, z: Tensor, images: Tensor) -> Tensor:
        """Minus log p(x|z), (S, B) nats, for z (S, B, N, D) and images (B, C, H, W)."""
        repeated = images.expand(len(z), *images.shape).flatten(0, 1)
        return -self.likelihood.log_prob(self.decode(z.flatten(0, 1)), repeated).unflatten(0, z.shape[:2])

    @torch.no_grad()
    def elbo(self, images: Tensor, samples: int = 1) -> Tensor:
        """The evidence lower bound of log p(x), (B,) nats: z drawn as it is, KL in closed form.

        Args:
            images: (B, C, H, W) in [0, 1].
            samples: How many z for each image; more of them make it less noisy, and no larger.
        """
        return self._elbo(images, self._posterior(images), samples)

    def _elbo(self, images: Tensor, posterior: Tensor, samples: int) -> Tensor:
        found = []
        for some, _, draws in self._parts(images, posterior, samples):
            found.append(torch.stack([-self.distortion(z, some).sum(0) for z in draws]).sum(0))
        return torch.cat(found) / samples - self.kl(posterior)

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, samples: int = 1000, chunk: int | None = None) -> Tensor:
        """The importance-weighted bound of log p(x), (B,) nats (Burda et al. 2016, equation 8).

        In expectation it rises with the number of samples, from the ELBO at one to log p(x).

        Args:
            images: (B, C, H, W) in [0, 1].
            samples: How many z for each image.
            chunk: How many images to decode at a time, at least one. None: :meth:`images_at_a_time`.
        """
        found = []
        for some, posterior, draws in self._parts(images, self._posterior(images), samples, chunk):
            weights = [(self.log_ratio(z, posterior) - self.distortion(z, some)).logsumexp(0) for z in draws]
            found.append(torch.stack(weights).logsumexp(0))
        return torch.cat(found) - math.log(samples)

    def images_at_a_time(self) -> int:
        """The number of images to decode at a time, so that no tensor on the way has more than 8 million values.

        That is a matter of the likelihood's maps, 256 for each channel of "categorical", of the decoder's layers and of
        the codebook, each of whose categories has noise of its own for every latent.
        """
        maps = math.prod(self.input_shape) * self.likelihood.maps_per_channel
        code = self.latents * self.categories
        return max(1, VALUES_AT_A_TIME // max(maps, code, getattr(self.decoder, "widest", 0)))

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Minus nats an image as bits a pixel value: 1 for a fair coin, 8 for 256 grey levels."""
        return -nats / (math.prod(self.input_shape) * math.log(2))

    @torch.no_grad()
    def sample(self, n: int, pixels: Literal["mean", "drawn"] = "mean") -> Tensor:
        """Samples (n, C, H, W) in [0, 1]: images of z from the prior.

        Args:
            n: How many.
            pixels: "mean", each pixel's expectation, which is what pictures show; or "drawn", which is what the model
                takes images to be.
        """
        if pixels not in ("mean", "drawn"):
            raise ValueError(f"unknown pixels {pixels!r}: expected one of mean, drawn")
        of, chunk = self.likelihood.mean if pixels == "mean" else self.likelihood.sample, self.images_at_a_time()
        counts = [min(chunk, n - start) for start in range(0, max(n, 1), chunk)]
        return torch.cat([of(self.decode(self.draw_prior(count))) for count in counts])

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions (B, C, H, W) in [0, 1]: the likelihood's mean at the most likely z."""
        return self._shown(self.codes(self._posterior(images)))

    reconstructions = reconstruct  # whose images are in [0, 1] before as well

    def exported_reconstruction(self, images: Tensor) -> dict[str, Tensor]:
        """``reconstruction`` (B, C, H, W) as of :meth:`reconstruct`, all at once and with no look at values."""
        return {"reconstruction": self.likelihood.mean(self.decode(self.codes(self._posterior(images, values=False))))}

    @torch.no_grad()
    def interpolate(self, first: Tensor, second: Tensor, steps: int = 8) -> Tensor:
        """Interpolation: images (B, steps, C, H, W) in [0, 1] from one image to another, both (B, C, H, W).

        Categorical latents change one after the other; Gaussian ones along the sphere (Shoemake 1985).
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}: expected at least 2, the two ends")
        if first.shape != second.shape:
            raise ValueError(f"images are {tuple(first.shape)} and {tuple(second.shape)}: expected one shape")
        ends = self.codes(self._posterior(first)), self.codes(self._posterior(second))
        z = self.between(*ends, steps)
        return self._shown(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def variations(self, z: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """Latent traversal of a single z (N, D), one of the first 16 latents at a time: (latents, values, N, D).

        Args:
            z: On which all others stay.
            numbers: Some of them alone, by their number in that order: (numbers, N, D). All at once have values * N * D
                values for each latent, which is a great deal for a large codebook.
        """
        values, latents = self.latent_values(z), min(self.latents, VARIED)
        chosen = torch.as_tensor(range(latents * len(values)) if numbers is None else numbers, device=z.device)
        changed = z.expand(len(chosen), *z.shape).clone()
        changed[torch.arange(len(chosen), device=z.device), chosen // len(values)] = values[chosen % len(values)]
        return changed.unflatten(0, (latents, len(values))) if numbers is None else changed

    @torch.no_grad()
    def traverse(self, z: Tensor) -> Tensor:
        """Images (latents, values, C, H, W) in [0, 1] of a latent traversal: the :meth:`variations` of a single z."""
        latents, values = min(self.latents, VARIED), len(self.latent_values(z))
        numbers, chunk = range(latents * values), self.images_at_a_time()
        parts = (numbers[start : start + chunk] for start in range(0, len(numbers), chunk))
        shown = [self.likelihood.mean(self.decode(self.variations(z, part))) for part in parts]
        return torch.cat(shown).unflatten(0, (latents, values))

    def _shown(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of z (B, N, D), the likelihood's means, few at a time."""
        return torch.cat([self.likelihood.mean(self.decode(some)) for some in z.split(self.images_at_a_time())])

    def _posterior(self, images: Tensor, values: bool = True) -> Tensor:
        self._check(images, values)
        return self.encode(images)

    def _check(self, images: Tensor, values: bool = True) -> None:
        """Checks the shape and, where asked, the values, for which the host has to wait."""
        self.check_images(images.shape[1:])
        if values and not (images.is_meta or torch.compiler.is_compiling()):
            self.likelihood.check(images)

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take."""
        batches.check_shape(shape, self.input_shape)

    def _parts(
        self, images: Tensor, posterior: Tensor, samples: int, chunk: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Iterator[Tensor]]]:
        """Images and posteriors, few at a time where there are many, and their z (S, B, N, D), as few at a time."""
        if samples < 1 or (chunk is not None and chunk < 1):
            raise ValueError(f"samples is {samples}, chunk {chunk}: expected at least 1")
        chunk = chunk or self.images_at_a_time()
        for some, of_these in zip(images.split(chunk), posterior.split(chunk), strict=True):
            yield some, of_these, self._draws(of_these, samples, chunk)

    def _draws(self, posterior: Tensor, samples: int, chunk: int) -> Iterator[Tensor]:
        """Draws z (S, B, N, D) until there are enough."""
        at_a_time = max(1, min(samples, chunk // max(len(posterior), 1)))
        for start in range(0, samples, at_a_time):
            yield self.draw(posterior, min(at_a_time, samples - start))

    # Training.

    def training_forward(self, images: Tensor) -> Tensor:
        """The loss of each image, as a training step computes it."""
        return self.objective(images, *self.knobs().values()).loss

    @property
    def step(self) -> int:
        """Steps of the optimizer so far, those before a checkpoint included: what schedules go by."""
        trainer: Any = self._trainer
        return trainer.global_step if trainer is not None else 0

    def knobs(self) -> dict[str, Tensor]:
        """Scheduled values by name, as scalars on the device, so that compiled code need not change."""
        hp = self.hparams
        return {"kl_weight": self._scalar(cosine(self.step, 0.0, hp.kl_weight, hp.kl_warmup_steps))}

    def _scalar(self, value: float) -> Tensor:
        # float32, as what it is multiplied with: the default dtype is bfloat16 in a step in bf16-true.
        return torch.full((), value, dtype=torch.float32, device=self.device)

    def on_fit_start(self) -> None:
        differ_between_ranks(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batches.images(batch)
        self._check(images, values=images.device.type == "cpu" or batch_idx == 0)
        knobs = self.knobs()
        output = self.objective(images, *knobs.values())
        loss = output.loss.mean()
        seen = {"train/loss": loss, "train/distortion": output.distortion.mean(), "train/kl": output.kl.mean()}
        seen |= {f"train/{name}": value for name, value in knobs.items()}
        self.step_log(self, {name: value.detach() for name, value in seen.items()}, prog_bar=("train/loss",))
        return loss

    def _metrics(self) -> Any:
        means: dict[str, Metric] = {
            name: MeanMetric() for name in ("elbo", "loss", "kl", "bits_per_dim", "log_likelihood")
        }
        return nn.ModuleDict(means | self.latent_metrics())

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_metrics")

    @torch.no_grad()
    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        images = batches.images(batch)
        posterior = self._posterior(images)
        elbo = self._elbo(images, posterior, self.hparams.elbo_samples)
        found = {"elbo": elbo, "loss": -elbo, "kl": self.kl(posterior), "bits_per_dim": self.bits_per_dim(elbo)}
        found |= self.latent_statistics(posterior)
        if stage == "test" and self.hparams.iw_samples is not None:
            found["log_likelihood"] = self.log_likelihood(images, self.hparams.iw_samples)
        metrics = loaders.metric(self, f"{stage}_metrics", dataloader_idx)
        for name, value in found.items():
            metrics[name].update(value)
        loaders.log(self, {f"{stage}/{name}": metrics[name] for name in found})

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Pictures in [0, 1]: reconstructions, samples and a latent traversal.

        Reconstructions (B, 3, h, 2w) beside their originals; samples of the prior (B, 3, h, w); and "latents", one
        picture (1, 3, H, W) in which the first image has one latent changed at a time, a row for each.
        """
        images = batches.images(batch)
        pairs = torch.cat([images, self.reconstruct(images)], dim=3)
        changed = self.traverse(self.codes(self.encode(images[:1]))[0])
        tiles = pictures.displayable(changed.flatten(0, 1), least=32, values=VALUES)
        rows = make_grid(tiles, nrow=changed.shape[1], pad_value=0.5)
        return {
            "reconstructions": pictures.displayable(pairs, values=VALUES),
            "samples": pictures.displayable(self.sample(len(images)), values=VALUES),
            "latents": rows[None],
        }

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(self, hp.optimizer, hp.lr, hp.weight_decay, betas=hp.betas)
        if hp.lr_schedule == "constant":
            return optimizer
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)
