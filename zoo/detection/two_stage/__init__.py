"""Two-stage detection: region proposals, and a head that classifies and refines them.

- Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015,
  arXiv 1506.01497
- He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870 (RoIAlign)
"""
