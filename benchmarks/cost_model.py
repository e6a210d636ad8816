"""On paper: what limits a recipe on one GPU, a node of eight and many nodes. The table of docs/benchmarks.md.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --peak 312 --utilisation 0.4 --gpus 8 --nodes 4    # another machine

Nothing is measured: operations and parameters are counted, the rest is arithmetic on the assumptions that are printed.

- Compute: images/s of a GPU = utilisation x peak / operations of an image (three times the forward pass).
- Gradients: a ring all-reduce moves 2 (n - 1) / n of the gradients' bytes (float32) over each GPU's slowest link. It is
  hidden behind the backward pass, two thirds of a step, as far as it is shorter; the rest is lost.
- State: weights, gradients and Adam's two moments in float32, 16 bytes a parameter, or, split over a node by FSDP2, its
  share of that; FSDP2 moves 3 (n - 1) / n instead of 2 (n - 1) / n of the bytes.
- Data: cores of a node = images/s of the node / images/s of a core.
"""

import argparse

from zoo.cli.plan import parse
from zoo.cli.recipes import find
from zoo.common.cost import count

RECIPES = (
    "vit/base_imagenet_deit3",
    "mae/base_imagenet",
    "mae/large_imagenet",
    "mae/huge_imagenet",
    "efficientnet/b0_imagenet",
    "efficientnet/b4_imagenet",
    "detection/coco_fcos_r50",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.4, help="dense TFLOP/s of a GPU")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of it that training reaches")
    parser.add_argument("--gpus", type=int, default=8, help="in a node")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--inside", type=float, default=450.0, help="GB/s of a GPU's link inside of a node, one way")
    parser.add_argument("--between", type=float, default=50.0, help="GB/s of a GPU's share of the network, one way")
    parser.add_argument("--core", type=float, default=600.0, help="images/s that a core decodes and crops")
    own = parser.parse_args()
    print(
        f"{own.peak:g} TFLOP/s at {own.utilisation:.0%}; links of {own.inside:g} GB/s in a node of {own.gpus} GPUs and "
        f"{own.between:g} between {own.nodes} nodes; {own.core:g} images/s a core\n"
    )
    titles = ["recipe", "parameters, million", "GFLOP an image", "images/s a GPU", "batch a GPU", "ms a step"]
    titles += ["all-reduce, ms in a node", f"over {own.nodes} nodes", "efficiency", "cores a node for the data"]
    titles += ["state, GB a GPU, DDP", "FSDP2"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in RECIPES:
        plan = parse("fit", [find(name)], [])
        model = plan.model("meta")
        cost = count(model, model.input_shape)
        batch = plan.config.data.init_args.batch_size
        rate = own.utilisation * own.peak * 1e12 / cost.training_flops
        step = batch / rate
        gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        reduced = [
            2 * (n - 1) / n * gradients / (link * 1e9)
            for n, link in ((own.gpus, own.inside), (own.gpus * own.nodes, own.between))
        ]
        lost = max(0.0, reduced[1] - 2 / 3 * step)
        cells = [
            f"`{name}`",
            f"{cost.parameters / 1e6:.1f}",
            f"{cost.training_flops / 1e9:.1f}",
            f"{rate:.0f}",
            str(batch),
            f"{1e3 * step:.0f}",
            *(f"{1e3 * seconds:.1f}" for seconds in reduced),
            f"{step / (step + lost):.0%}",
            f"{rate * own.gpus / own.core:.0f}",
            f"{4 * gradients / 1e9:.1f}",
            f"{4 * gradients / own.gpus / 1e9:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
