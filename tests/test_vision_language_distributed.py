"""Stages on two processes, under DDP and FSDP2: what changes is what the stage names, also where one has no images."""

import json
import sys
from pathlib import Path

import forked
import pytest

# One step of two processes, the second of which has text alone, for each strategy and stage.
STEPPED = """
import json
import sys

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

import zoo
from zoo.common.tokenizers import ByteTokenizer
from zoo.sharding import whole_state

STAGES = json.loads(sys.argv[1])


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.item())


def samples(rank):
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(2 - 2 * rank, 3, 64, 64, generator=generator)
    seen = {"turns": [["<image> what is it?", "a ring"]], "images": 1}
    said = {"turns": [["what is two plus two?", "four"]], "images": 0}
    return images, [said, said] if rank else [seen, dict(seen)]


def stepped(strategy, rates, out):
    seed_everything(1, verbose=False)
    module = zoo.VisionLanguageModel(
        "test_resnet", image_size=64, language_width=128, language_depth=2, language_heads=2,
        context_length=64, weight_decay=0.1, **rates
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[losses], use_distributed_sampler=False,
    )
    rank = trainer.global_rank
    trainer.fit(module, DataLoader([samples(rank)] * 2, batch_size=None))
    after = whole_state(module) if strategy == "fsdp2" else module.state_dict()
    changed = sorted(name for name, value in after.items() if not torch.equal(value.cpu(), before[name]))
    total = sum(value.double().sum().item() for value in after.values())
    with open(f"{out}-{rank}.json", "w") as file:
        json.dump([changed, total, losses.losses, sorted(before)], file)


for stage, rates in STAGES.items():
    stepped("ddp", rates, f"{stage}-ddp")
    stepped("fsdp2", rates, f"{stage}-fsdp2")
"""
STAGES = {
    "first": {"vision_lr": 0.0, "connector_lr": 1e-2, "language_lr": 0.0},
    "second": {"vision_lr": 0.0, "connector_lr": 1e-2, "language_lr": 1e-2},
}
PARTS = {"first": ("connector",), "second": ("connector", "language_model")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    program = path / "stepped.py"
    program.write_text(STEPPED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), json.dumps(STAGES)]
    forked.run([sys.executable, *launch], cwd=path, check=True, launches=True)
    return path


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_named_tensors_change_on_two_processes(folder, stage, strategy):
    changed, total, losses, names = json.loads((folder / f"{stage}-{strategy}-0.json").read_text())
    assert changed == [name for name in names if name.split(".")[0] in PARTS[stage]]
    one, other = (json.loads((folder / f"{stage}-{each}-0.json").read_text()) for each in ("ddp", "fsdp2"))
    assert one[2] == pytest.approx(other[2], abs=1e-5)  # the same losses by both
    assert losses[1] < losses[0]
    if strategy == "ddp":
        assert json.loads((folder / f"{stage}-ddp-1.json").read_text())[1] == total  # the same weights on both
