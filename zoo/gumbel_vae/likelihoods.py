"""Likelihoods of images given a decoder's output: four normalised densities, in nats, nothing left out.

Images are (..., C, H, W) in [0, 1], a decoder's parameters (..., M * C, H, W) as they leave it: M maps a channel, those
of one kind together, as in "all C means, then all C log scales". Everything is computed in float32, or in float64 where
the parameters are, whatever the precision around it.

Where an image has levels, they are k / (levels - 1) for k = 0 ... levels - 1, and what lies between two counts as the
nearer one; so 256 levels survive an image in bfloat16. That images are in a likelihood's support is taken for granted:
:meth:`Likelihood.check` looks, for which the host waits.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_SCALE = 7.0
"""Log scales of the logistic and Laplace densities are clamped to plus and minus this; beyond, they get no gradient.

The lower end is that of Salimans et al. 2017. Of 256 bins one between others can have 97 % of the mass there, so that
little is left to gain, while each level that a mean is further off costs 9 nats. At the upper end the density is flat.
"""


class Likelihood(ABC):
    """p(image | parameters). Plain: no parameters of its own, nothing to train or move.

    Args:
        levels: How many grey levels there are.

    Attributes:
        maps_per_channel: M, how many maps of parameters a channel of the image needs.
    """

    name: str
    maps_per_channel: int

    def __init__(self, levels: int = 256) -> None:
        if levels < 2:
            raise ValueError(f"levels is {levels}: expected at least 2")
        self.levels = levels

    def log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        """log p of whole images, (...) nats; the leading dimensions of parameters and images are broadcast.

        Raises:
            ValueError: If the parameters are not maps_per_channel maps for each channel, of the images' size.
        """
        C, H, W = images.shape[-3:]
        expected = (self.maps_per_channel * C, H, W)
        if parameters.shape[-3:] != expected:
            raise ValueError(
                f"parameters are {tuple(parameters.shape)} for images {tuple(images.shape)}: the likelihood "
                f"{self.name!r} needs (..., {', '.join(map(str, expected))})"
            )
        maps = self._maps(parameters)
        return self._log_prob(maps, images.to(maps.dtype)).sum((-3, -2, -1))

    def mean(self, parameters: Tensor) -> Tensor:
        """The image to show for parameters: each pixel's expectation, in [0, 1]."""
        return self._mean(self._maps(parameters))

    def sample(self, parameters: Tensor) -> Tensor:
        """Images drawn, every pixel by itself, of values in the support."""
        return self._sample(self._maps(parameters))

    def check(self, images: Tensor) -> None:
        """Checks all values; the host waits for the device.

        Raises:
            ValueError: If images have values outside of [0, 1], or NaN; with Bernoulli, if they have grey ones.
        """
        if not images.numel():
            return
        low, high = (value.item() for value in images.aminmax())
        if math.isnan(low):
            raise ValueError(f"images hold NaN: the likelihood {self.name!r} needs values in [0, 1]")
        if low < 0 or high > 1:
            raise ValueError(
                f"images have values from {low:.4g} to {high:.4g}: the likelihood {self.name!r} needs them in [0, 1], "
                "which a data module gives with mean 0 and std 1"
            )

    def _maps(self, parameters: Tensor) -> Tensor:
        """(..., M * C, H, W) as (..., M, C, H, W), float32 or float64."""
        M = self.maps_per_channel
        return _precise(parameters).unflatten(-3, (M, parameters.shape[-3] // M))

    def _nearest(self, images: Tensor) -> Tensor:
        """The number of each value's level, 0 to levels - 1, as a float."""
        return (images * (self.levels - 1)).round()

    def _image(self, level: Tensor) -> Tensor:
        """The value of the level of that number, and of the last where it is out of range."""
        return level.clamp(0, self.levels - 1) / (self.levels - 1)

    @abstractmethod
    def _log_prob(self, maps: Tensor, images: Tensor) -> Tensor:
        """Log-likelihood of each value, (..., C, H, W)."""

    @abstractmethod
    def _mean(self, maps: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample(self, maps: Tensor) -> Tensor: ...


def _precise(values: Tensor) -> Tensor:
    """Casts to float32, or leaves float64 as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _BernoulliLogProb(torch.autograd.Function):
    """x l - log(1 + e^l), elementwise.

    Equal to ``-F.binary_cross_entropy_with_logits`` within 1e-7 and rounding, with the same gradient, but on a CPU in
    0.4 of the time: log(1 + e^l) = max(l, 0) - log sigmoid(|l|), and torch's sigmoid and log are several times as fast
    there as its log1p. Left to autograd, which keeps a tensor for each of these steps and goes back through them, most
    of that is lost; the gradient needs logits and images alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, images: Tensor) -> Tensor:
        ctx.save_for_backward(logits, images)
        # x l - max(l, 0) is exactly 0 where a pixel is right, and only then something small is added.
        return (logits * images).sub_(logits.clamp(min=0)).add_(logits.abs().sigmoid_().log_())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, images = ctx.saved_tensors
        return (images - torch.sigmoid(logits)) * grads[0], None


class Bernoulli(Likelihood):
    """Pixels of 0 or 1: log p(x) = x log sigmoid(l) + (1 - x) log sigmoid(-l), l the logit of a one.

    Of grey values this expression is no density (its integral over [0, 1] depends on l, and is at most 1/2), so that
    nats computed with them compare with nothing: :meth:`check` refuses them.

    Gradients go to the parameters, none to the images.
    """

    name, maps_per_channel = "bernoulli", 1

    def __init__(self) -> None:
        super().__init__(levels=2)

    def check(self, images: Tensor) -> None:
        super().check(images)
        flat = images.flatten()
        if torch.dot(flat, 1 - flat) != 0:  # a sum of what is 0 at 0 and 1, and positive between them
            grey = images[images != images.round()][0].item()
            raise ValueError(
                f"images have grey values, such as {grey:.4g}: the likelihood 'bernoulli' needs 0 and 1 alone, which "
                "a data module gives with binarize; for grey ones there are categorical, logistic and logit_laplace"
            )

    def _log_prob(self, maps: Tensor, images: Tensor) -> Tensor:
        if maps.shape != images.shape:  # the gradient of the function knows no broadcasting
            maps, images = torch.broadcast_tensors(maps, images)
        return _BernoulliLogProb.apply(maps, images)

    def _maps(self, parameters: Tensor) -> Tensor:
        return _precise(parameters)  # one map, and no dimension for it

    def _mean(self, maps: Tensor) -> Tensor:
        return torch.sigmoid(maps)

    def _sample(self, maps: Tensor) -> Tensor:
        return torch.bernoulli(self._mean(maps))


class Categorical(Likelihood):
    """A logit for each grey level: log p(level k) = l_k - log sum_j e^(l_j), as van den Oord et al. 2016 have it.

    "Pixel Recurrent Neural Networks", arXiv 1601.06759, section 2.2. It knows nothing of the order of levels.
    """

    name = "categorical"

    def __init__(self, levels: int = 256) -> None:
        super().__init__(levels)
        self.maps_per_channel = levels

    def _log_prob(self, maps: Tensor, images: Tensor) -> Tensor:
        level = self._nearest(images).to(torch.int64).unsqueeze(-4)
        log_p = maps.log_softmax(-4)
        leading = torch.broadcast_shapes(log_p.shape[:-4], level.shape[:-4])
        # Not copied: parameters for many images at once, or an image for many parameters, are seen as many.
        log_p, level = log_p.expand(*leading, *log_p.shape[-4:]), level.expand(*leading, *level.shape[-4:])
        return log_p.gather(-4, level).squeeze(-4)

    def _mean(self, maps: Tensor) -> Tensor:
        values = torch.linspace(0, 1, self.levels, dtype=maps.dtype, device=maps.device)
        return (maps.softmax(-4) * values[:, None, None, None]).sum(-4).clamp(0, 1)

    def _sample(self, maps: Tensor) -> Tensor:
        probabilities = maps.softmax(-4).movedim(-4, -1)
        level = torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])
        return self._image(level.to(maps.dtype))


def _mean_and_log_scale(maps: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_scale = maps.unbind(-4)
    return mean, log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)


class Logistic(Likelihood):
    """A logistic density's mass between the halves of neighbouring levels; the first and last bin are open.

    With images scaled to [-1, 1], y = 2 x - 1, levels are 2 / (levels - 1) apart, and with h half of that

        P(y) = sigmoid((y + h - m) / s) - sigmoid((y - h - m) / s),

    without the second term at -1, and 1 instead of the first at 1. Kingma et al. 2016, "Improving Variational Inference
    with Inverse Autoregressive Flow", arXiv 1606.04934; open edges as in Salimans et al. 2017,
    "PixelCNN++", arXiv 1701.05517, equation 2. The maps are m, then log s, which is clamped: :data:`MAX_LOG_SCALE`.
    """

    name, maps_per_channel = "logistic", 2

    def _log_prob(self, maps: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = _mean_and_log_scale(maps)
        half, inverse = 1 / (self.levels - 1), torch.exp(-log_scale)
        level = self._nearest(images)
        off = 2 * half * level - 1 - mean
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)). In this form no difference of two nearly
        # equal numbers is taken, and a mean far off gets the gradient of a straight line.
        below = F.logsigmoid((off + half) * inverse)  # of the upper boundary
        above = F.logsigmoid((half - off) * inverse)  # of the lower one
        width = torch.log(-torch.expm1(-2 * half * inverse))
        first, last = level <= 0, level >= self.levels - 1
        inside = width.masked_fill(first | last, 0.0)
        return below.masked_fill(last, 0.0) + above.masked_fill(first, 0.0) + inside

    def _mean(self, maps: Tensor) -> Tensor:
        """Sum over levels of P(at least that level): exact, a pass over the image for each level."""
        mean, log_scale = _mean_and_log_scale(maps)
        inverse, total = torch.exp(-log_scale), torch.zeros_like(mean)
        for level in range(1, self.levels):
            total += torch.sigmoid((mean - ((2 * level - 1) / (self.levels - 1) - 1)) * inverse)
        return self._image(total)

    def _sample(self, maps: Tensor) -> Tensor:
        mean, log_scale = _mean_and_log_scale(maps)
        drawn = mean + log_scale.exp() * torch.rand_like(mean).logit()
        return self._image(self._nearest((drawn + 1) / 2))


class LogitLaplace(Likelihood):
    """A density on (0, 1) whose logit is Laplace, of images dequantised with uniform noise.

    Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", arXiv 2102.12092, appendix A.3, have the density of v

        f(v) = exp(-|logit(v) - m| / b) / (2 b v (1 - v)),   v = EPSILON + (1 - 2 EPSILON) (k + u) / levels,

    at u = 0, where it says nothing of P(level k): it has another unit, and log f may be positive. Here u is drawn from
    [0, 1) at every call, and log_prob is log f(v) + log((1 - 2 EPSILON) / levels), the log density of k + u. Its
    exponential is in expectation the mass that f gives to the level's bin, so that log_prob is in expectation a lower
    bound of the mass's log (Theis et al. 2016, arXiv 1511.01844), and so is an importance-weighted average's log. The
    mass below EPSILON and above 1 - EPSILON belongs to no level.

    The maps are m, then log b, which is clamped: :data:`MAX_LOG_SCALE`. ``mean`` gives the median, as in the paper: the
    expectation has no closed form.
    """

    name, maps_per_channel = "logit_laplace", 2
    EPSILON = 0.1

    def _log_prob(self, maps: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = _mean_and_log_scale(maps)
        span = 1 - 2 * self.EPSILON
        level = self._nearest(images).expand(torch.broadcast_shapes(images.shape, mean.shape))
        v = self.EPSILON + span / self.levels * (level + torch.rand_like(level))
        distance = (torch.logit(v) - mean).abs() * torch.exp(-log_scale)
        return math.log(span / self.levels / 2) - distance - log_scale - torch.log(v * (1 - v))

    def _mean(self, maps: Tensor) -> Tensor:
        mean, _ = _mean_and_log_scale(maps)
        return self._image(self._position(mean) - 0.5)  # a bin's middle is its level

    def _sample(self, maps: Tensor) -> Tensor:
        mean, log_scale = _mean_and_log_scale(maps)
        drawn = torch.distributions.Laplace(mean, log_scale.exp(), validate_args=False).sample()
        return self._image(self._position(drawn).floor())

    def _position(self, logit: Tensor) -> Tensor:
        """The place of a logit on the scale of k + u, 0 to levels."""
        return (torch.sigmoid(logit) - self.EPSILON) * (self.levels / (1 - 2 * self.EPSILON))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.name: kind for kind in (Bernoulli, Categorical, Logistic, LogitLaplace)
}


def create(name: str, levels: int = 256) -> Likelihood:
    """The likelihood of that name, out of :data:`LIKELIHOODS`.

    Args:
        name: "bernoulli", "categorical", "logistic" or "logit_laplace".
        levels: How many grey levels images have; without effect for Bernoulli, whose pixels are 0 or 1.

    Raises:
        ValueError: For an unknown name, and fewer than two levels.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {name!r}: expected one of {', '.join(LIKELIHOODS)}")
    return Bernoulli() if name == "bernoulli" else LIKELIHOODS[name](levels)
