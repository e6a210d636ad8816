"""Variational autoencoders with categorical latents, and with Gaussian ones to compare with.

Jang, Gu, Poole 2017, "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144; Maddison, Mnih, Teh 2017,
"The Concrete Distribution", arXiv 1611.00712. Read ``estimators/``, how a gradient passes a discrete sample;
``likelihoods.py``, what a decoder's output says of an image; ``networks.py``; ``latents.py``, what a technique
provides; ``base.py``, bounds and steps; ``gumbel.py`` and ``gaussian.py``, the latents. ``compare.py`` and
``measure.py`` are the command that compares estimators.

Everything is in nats an image, and none of it leaves out a constant. What is called ELBO is one: of samples as they
are, never of relaxed ones, whatever training minimises.

Deviations: the closed form of the KL between categories by default, where Maddison et al. have that between the
densities of relaxed samples (``kl="relaxed"``). One-hot vectors go into the decoder, where theirs are corners of a
cube, which a linear layer makes of them. Their centring of the encoder's input and output biases by data means, and
Jang et al.'s variance normalisation of the score-function baselines, are not here.
"""

from zoo.gumbel_vae.base import VAE, VAEOutput
from zoo.gumbel_vae.gaussian import GaussianVAE
from zoo.gumbel_vae.gumbel import GumbelVAE

__all__ = ["VAE", "GaussianVAE", "GumbelVAE", "VAEOutput"]
