"""Image files of the less usual kinds, on which programs that read images differ.

``python tests/odd_images.py`` prints a classifier's answers to them by the zoo and by its exported file.
"""

import tempfile
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


def main() -> None:
    """Prints the likeliest class and its probability by the zoo, by onnxruntime, and how far they are apart."""
    import onnxruntime
    import torch

    import zoo
    from datamodules import ImageFolderDataModule, preprocessing
    from zoo.serving.predictor import Predictor

    torch.manual_seed(0)
    module = zoo.ViTClassifier("vit_tiny_patch16_224", num_classes=10, image_size=32, patch_size=4, depth=2).eval()
    torch.nn.init.normal_(module.head.weight, std=0.2)  # so that it tells images apart
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = save(folder / "images")
        data = ImageFolderDataModule(place, 32, predict_root=str(folder / "images"), num_workers=0)
        zoo.export(module, folder / "a.onnx", data=data, compiled=False, limit=1)
        session = onnxruntime.InferenceSession(folder / "a.onnx")
        steps = preprocessing.create(data.preprocessing())
        answers = Predictor(module, steps)([folder / "images" / name for name in names], top=10)
        print("| image | zoo | exported file | largest difference |\n|---|---|---|---|")
        for name, answer in zip(names, answers, strict=True):
            pixels = steps.collate([steps.read(folder / "images" / name)])
            (found,) = session.run(["probabilities"], {"images": pixels.numpy()})[0]
            difference = max(abs(each["probability"] - found[each["index"]]) for each in answer["top"])
            ours, theirs = f"{answer['label']} {answer['probability']:.6f}", f"{found.argmax()} {found.max():.6f}"
            print(f"| {name} | {ours} | {theirs} | {difference:.1e} |")


if __name__ == "__main__":
    main()
