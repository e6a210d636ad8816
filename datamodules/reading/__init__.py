"""Samples out of files, archives and caches: 8-bit images and what is known of them."""
