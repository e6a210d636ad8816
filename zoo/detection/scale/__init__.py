"""Objects of every size: views at test time and how their detections are merged, valid ranges of sizes, TridentNet.

- Singh and Davis, "An Analysis of Scale Invariance in Object Detection - SNIP", CVPR 2018, arXiv 1711.08189
- Li et al., "Scale-Aware Trident Networks for Object Detection", ICCV 2019, arXiv 1901.01892
"""
