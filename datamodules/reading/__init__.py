"""From files, archives and caches to samples: 8-bit images and what is known of them."""
