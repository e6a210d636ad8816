"""The service that docs/serving.md shows: it needs onnxruntime and Pillow alone, and answers what the zoo does."""

import ast
import re
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

import zoo
from datamodules import ImageFolderDataModule

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
PROGRAM = re.search(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]


def images(folder: Path) -> list[str]:
    """Images that phones, scanners and programs make, noise in their pixels; what a service gets."""
    draw = np.random.default_rng(0)
    folder.mkdir()

    def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        return Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise(40, 30).save(folder / f"turned{orientation}.jpg", exif=exif)
    noise(40, 30, "CMYK").save(folder / "cmyk.jpg")
    noise(33, 31, "L").save(folder / "grey.png")
    noise(33, 31).quantize(16).save(folder / "palette.png")
    noise(33, 31).convert("1").save(folder / "bits.png")
    noise(1, 9).save(folder / "narrow.png")
    noise(600, 50).save(folder / "wide.webp", lossless=True)
    noise(24, 24).save(folder / "as_it_is.bmp")
    noise(25, 24).save(folder / "nearly.tiff")
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("channels", "interpolation"), [(3, "bicubic"), (1, "bilinear")])
def test_the_service_of_twenty_lines_answers_what_the_zoo_does(channels, interpolation):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("cat", "dog"):
        Path("data", name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (9, 9), (number, 60 * number, 200)).save(f"data/{name}/{number}.png")
    data = ImageFolderDataModule(
        "data", (24, 16), channels=channels, interpolation=interpolation, crop_ratio=0.8, batch_size=2, num_workers=0
    )
    module = zoo.ViTClassifier(
        "vit_tiny_patch16_224",
        num_classes=2,
        image_size=(24, 16),
        in_channels=channels,
        patch_size=8,
        width=24,
        depth=1,
        heads=2,
        lr=0.01,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = zoo.guards.guard(Trainer(max_epochs=1, limit_val_batches=0, **quiet))
    trainer.fit(module, data)
    trainer.save_checkpoint("a.ckpt")
    zoo.export("a.ckpt", "a.onnx", compiled=False)
    paths = images(Path("images"))
    Path("serve.py").write_text(PROGRAM, encoding="utf-8")
    done = forked.run([sys.executable, "serve.py", "a.onnx", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = zoo.load("a.ckpt")(paths)
    assert len(paths) == 16
    assert len({round(answer["probability"], 4) for answer in answers}) > 8, "it tells images apart"
    said = [re.fullmatch(r"(.*): (\w+) (\S+)", line).groups() for line in done.stdout.splitlines()]
    assert [(path, label) for path, label, _ in said] == [(answer["file"], answer["label"]) for answer in answers]
    for (_, _, probability), answer in zip(said, answers, strict=True):
        assert float(probability) == pytest.approx(answer["probability"], abs=6e-5)


def test_it_needs_onnxruntime_and_pillow_alone():
    tree = ast.parse(PROGRAM)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "sys", "numpy", "onnxruntime", "PIL"}
