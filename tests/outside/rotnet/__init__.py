"""Rotation prediction: learns from images without labels by telling by how many right angles they were turned.

Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018, arXiv
1803.07728. Each batch is seen in all four rotations at once, as in the paper.

Deviations: the network is three convolutions, where the paper has AlexNet.
"""

from rotnet.pretrainer import RotationPretrainer

__all__ = ["RotationPretrainer"]
