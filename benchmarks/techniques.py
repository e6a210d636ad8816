"""Every technique's training step beside its peers', by ``zoo benchmark``: the tables of docs/benchmarks.md.

    python benchmarks/techniques.py                  # small networks in float32, on the CPU
    python benchmarks/techniques.py --device cuda    # the recipes' networks, eager and compiled, float32 and bf16

Each row is a process of its own, rows take turns, and what is not here (a GPU, a peer's package) is a row that says so.
Files, tables and plots go to runs/techniques/TECHNIQUE.
"""

import argparse
import subprocess
import sys
from pathlib import Path

CPU = ["--precision", "32-true", "--accelerator", "cpu"]
GPU = ["--precision", "32-true", "bf16-mixed", "--compile", "false", "true", "--accelerator", "cuda"]
TRAINED = ["--model.freeze_norm", "false", "--model.frozen_stages", "0"]  # all of it, as the peer
# By technique, what is measured: on a CPU something small, on a GPU what the recipe is about.
TECHNIQUES = {
    "vit": (
        ["vit/imagefolder", "--model.backbone", "vit_tiny_patch16_224", "--batch-size", "16"],
        ["vit/base_imagenet_deit3", "--batch-size", "256"],
    ),
    "mae": (
        ["mae/base_imagenet", "--model.backbone", "vit_small_patch16_224", "--batch-size", "16", "--compile", "false"],
        ["mae/base_imagenet", "--batch-size", "256"],
    ),
    "efficientnet": (
        ["efficientnet/b0_imagenet", "--image-size", "128", "--batch-size", "16"],
        ["efficientnet/b0_imagenet", "--batch-size", "256"],
    ),
    "detection": (
        [
            "detection/coco_fcos_r50",
            "--model.backbone",
            "resnet18",
            "--image-size",
            "256",
            "--batch-size",
            "8",
            *TRAINED,
        ],
        ["detection/coco_fcos_r50", "--batch-size", "16", *TRAINED],
    ),
    "gumbel_vae": (
        ["gumbel_vae/mnist_jang2017", "--batch-size", "128"],
        ["gumbel_vae/mnist_jang2017", "--batch-size", "1024"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--mode", nargs="+", default=["step"])
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--limit", default="60", help="seconds that a process measures at most")
    parser.add_argument("--out", type=Path, default=Path("runs", "techniques"))
    own = parser.parse_args()
    status = 0
    for name in own.only:
        recipe = TECHNIQUES[name][own.device == "cuda"]
        command = ["benchmark", *recipe, *(GPU if own.device == "cuda" else CPU), "--mode", *own.mode, "--peers"]
        command += ["--repeats", own.repeats, "--limit", own.limit, "--out", str(own.out / name)]
        ended = subprocess.run([sys.executable, "-m", "zoo", *command]).returncode
        if ended not in (0, 1) or not (own.out / name / "table.md").is_file():
            raise SystemExit(ended)
        status |= ended  # 1: a row without a figure, which the table tells
        print(f"\n`zoo {' '.join(command)}`\n\n{(own.out / name / 'table.md').read_text()}", flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
