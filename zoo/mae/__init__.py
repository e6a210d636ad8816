"""Masked autoencoder: learns from images without labels by predicting what was removed from them.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377. Read ``patches.py``, what is
masked and what is predicted; ``encoder.py``, what sees the rest; ``decoders.py``, what predicts it; ``pretrainer.py``,
how all of it is put together and trained.

The loss is the paper's to rounding, at less cost: only visible patches are embedded, only removed ones predicted; the
last decoder block computes removed patches alone, the first one mask tokens once a position and not once an image; one
sort makes the mask. Nothing has a shape that depends on data, so that all of it is one compiled graph.

Deviations: class and mask token do not take weight decay, while the released code's do; the number of visible patches
is reckoned exactly, so that 10 of 100 stay at a ratio of 0.9, where the released code keeps 9. ``decoder="cross"`` is
another paper's; its last encoder feature is the normalised one, so that the encoder's final norm is trained.
"""

from zoo.mae.outputs import MAEOutput, Reconstruction
from zoo.mae.pretrainer import MAEPretrainer

__all__ = ["MAEOutput", "MAEPretrainer", "Reconstruction"]
