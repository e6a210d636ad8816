"""Generation with and without a cache of keys and values, side by side.

    OMP_NUM_THREADS=1 python benchmarks/generation_speed.py
    python benchmarks/generation_speed.py --device cuda --width 768 --depth 12 --prompt 256

The same network writes as many tokens after the same prompts, greedily; without a cache it reads all of them again for
each token. Both write the same, or the script ends. Rows take turns; the ratio is the median over the rounds of the
time without by the time with a cache, on a CPU in processor time.
"""

import argparse
import time
from statistics import median

import torch
from side_by_side import milliseconds, where

from zoo.vision_language.generation import generate
from zoo.vision_language.language_model import CausalTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64, the width of a head")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device, written = torch.device(arguments.device), arguments.tokens
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    torch.manual_seed(0)
    sizes = {"width": arguments.width, "depth": arguments.depth, "heads": arguments.width // 64}
    context = arguments.prompt + written
    model = CausalTransformer(arguments.vocabulary, **sizes, context_length=context).to(device).eval()
    prompts = torch.randint(arguments.vocabulary, (arguments.batch_size, arguments.prompt), device=device)
    real = torch.ones_like(prompts, dtype=torch.bool)
    # No token ends a text before its time.
    forbidden = torch.arange(arguments.vocabulary, device=device) == 0
    embeddings = model.embed(prompts).detach()

    def run(cache: bool) -> tuple[float, torch.Tensor]:
        start = clock()
        options = {"end_id": 0, "max_new_tokens": written, "forbidden": forbidden, "cache": cache}
        tokens = generate(model, embeddings, real, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start, tokens

    if not torch.equal(run(True)[1], run(False)[1]):  # warms up, too
        raise SystemExit("with and without a cache other tokens are written")
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(arguments.rounds):
        for cache in (True, False) if number % 2 else (False, True):
            times[cache].append(run(cache)[0])
    ratio = median(slow / fast for slow, fast in zip(times[False], times[True], strict=True))
    print(f"{where(arguments.device, 'torch')}, {torch.get_num_threads()} threads\n")
    print("| blocks | width | batch | prompt | written | without a cache, ms | with, ms | ratio |\n" + "|---" * 8 + "|")
    print(
        f"| {arguments.depth} | {arguments.width} | {arguments.batch_size} | {arguments.prompt} | {written} | "
        f"{milliseconds(median(times[False]))} | {milliseconds(median(times[True]))} | {ratio:.1f} |"
    )


if __name__ == "__main__":
    main()
