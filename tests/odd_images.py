"""Image files of the less usual kinds, on which programs that read images differ."""

from pathlib import Path

import numpy as np
from PIL import Image


def save(folder: Path) -> list[str]:
    """Writes such images into a folder, some below it, and returns their names, sorted."""
    draw = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
        small = draw.integers(0, 256, (-(-height // 8), -(-width // 8), channels), dtype=np.uint8)
        return small.repeat(8, 0).repeat(8, 1)[:height, :width].squeeze()

    colour = Image.fromarray(noise(40, 56))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    (folder / "below").mkdir(parents=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        colour.save(folder / f"below/exif{orientation}.jpg", exif=exif)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("YCbCr").save(folder / "ycbcr.tiff")
    palette.save(folder / "palette.png")
    palette.save(folder / "transparent_palette.png", transparency=3)
    Image.fromarray(noise(40, 56, 4)).save(folder / "alpha.png")
    Image.fromarray(noise(40, 56, 2), "LA").save(folder / "grey_alpha.png")
    Image.fromarray(noise(33, 47, 1)).save(folder / "grey.png")
    Image.fromarray(noise(33, 47, 1).astype(np.uint16) * 257 + 5).save(folder / "sixteen_bits.png")
    Image.fromarray(noise(33, 47, 1) > 127).save(folder / "one_bit.png")
    Image.fromarray(noise(90, 1)[:, None]).save(folder / "one_wide.png")
    Image.fromarray(noise(1, 90)[None]).save(folder / "one_high.png")
    Image.fromarray(noise(16, 6000)).save(folder / "very_wide.png")
    colour.save(folder / "animated.gif", save_all=True, append_images=[colour.rotate(90)])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
