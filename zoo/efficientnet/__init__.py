"""EfficientNet: compound scaling of depth, width and resolution, and the networks it makes.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, arXiv 1905.11946.
Read ``scaling.py``, the rule; ``networks.py``, what it scales; ``classifier.py``, how that is trained; ``search.py``,
how the rule's coefficients are found, and what it is worth beside scaling one dimension alone.

The published B0 to B7 are a table: they do not follow the rule. It makes B1's and B2's networks at other image sizes,
and from B3 on no phi makes them. ``variant`` is the table, ``phi`` the rule.

EfficientNet's initial weights are those of the paper's code: convolutions normal, with variance 2 / (outputs of a group
· kernel area), and the classifier uniform within 1 / sqrt(classes), its bias zero.

Deviations: BatchNorm's epsilon and momentum are torch's, 1e-5 and 0.1, unless weights or arguments say otherwise; the
paper's code has 1e-3 and 0.01. Weight decay leaves biases alone, of which the paper's code spares only BatchNorm's. By
phi, dropout follows the line that the paper draws from B0 to B7. ResNet and MobileNetV2, whose training the paper does
not describe, are trained like EfficientNet, and ResNet's bottlenecks have their stride in the 3x3 convolution, as all
libraries do since. V2 has the dropout that its progressive training ends with.
"""

from zoo.efficientnet.classifier import EfficientNetClassifier
from zoo.efficientnet.networks import create_network
from zoo.efficientnet.rounding import round_filters, round_repeats
from zoo.efficientnet.scaling import PUBLISHED, CompoundScaling, Scale, published_table

__all__ = [
    "PUBLISHED",
    "CompoundScaling",
    "EfficientNetClassifier",
    "Scale",
    "create_network",
    "published_table",
    "round_filters",
    "round_repeats",
]
