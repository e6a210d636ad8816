"""Images and texts in one space: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023)."""
