"""FSDP2 on two processes beside DDP: the same losses, half of the weights, checkpoints that anyone goes on from."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from zoo import MAEPretrainer, weights
from zoo.checkpoints import damage
from zoo.sharding import FSDP2Strategy, Shardable, _blocks, shard

# Two epochs, validations and a test of each module, under DDP and FSDP2; then one goes on from the first epoch.
TRAINED = '''
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

import zoo
from zoo.callbacks import ExportBackbone, GradientNorm, SavePictures
from zoo.guards import guard

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "heads": 4}
MAE = {**VIT, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
MODULES = {
    "vit": lambda: zoo.ViTClassifier(**VIT, num_classes=4),
    "compiled": lambda: zoo.ViTClassifier(**VIT, num_classes=4, compile=True),
    "mae": lambda: zoo.MAEPretrainer(**MAE),
    "cross": lambda: zoo.MAEPretrainer(**MAE, decoder="cross"),
    "gumbel": lambda: zoo.GumbelVAE(image_size=32, in_channels=3, likelihood="logistic", prior="learned"),
    "detector": lambda: zoo.FPNDetector(backbone="resnet10t", image_size=32, num_classes=3, channels=32),
    "two_stages": lambda: zoo.FasterRCNN(
        backbone="resnet10t", image_size=32, num_classes=3, channels=32, head_width=64, region_samples=64
    ),
    "efficientnet": lambda: zoo.EfficientNetClassifier(image_size=64, num_classes=4, lr=1e-3, depth=0.3, width=0.25),
    "aligner": lambda: zoo.ImageTextAligner(
        "test_vit", 32, "sigmoid", 32, text_width=64, text_depth=2, text_heads=4, bias_init="auto", max_scale=10.0
    ),
    "language": lambda: zoo.VisionLanguageModel(
        "test_vit", image_size=32, language_width=64, language_depth=2, language_heads=4, context_length=96,
        vision_lr=None, language_lr=None
    ),
}


class Images(LightningDataModule):
    """16 images: two steps of four on two processes, in each of two epochs."""

    def __init__(self, size, boxes, texts, asked):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        box = torch.tensor([[4.0, 4.0, 20.0, 28.0]])
        images = torch.rand(16, 3, size, size, generator=generator)
        targets = [{"boxes": box, "labels": torch.tensor([i % 3])} if boxes else i % 4 for i in range(16)]
        targets = [f"number {i}" for i in range(16)] if texts else targets
        if asked:
            targets = [{"turns": [["<image> what is it?", f"number {i}"]], "images": 1} for i in range(16)]
        self.items = list(zip(images, targets))
        listed = boxes or asked
        self.collate = (lambda batch: (torch.stack([x for x, _ in batch]), [y for _, y in batch])) if listed else None

    def preprocessing(self):
        return {"kind": "somebody's own"}

    def train_dataloader(self):
        return DataLoader(self.items, 4, collate_fn=self.collate)

    val_dataloader = test_dataloader = train_dataloader


class Watch(Callback):
    def __init__(self):
        self.losses, self.part = [], 1.0

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.item())

    def on_train_batch_end(self, trainer, pl_module, *_):
        held = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in pl_module.parameters()]
        self.part = sum(held) / sum(p.numel() for p in pl_module.parameters())


def train(name, strategy, out, **options):
    seed_everything(1, verbose=False)
    module, watch = MODULES[name](), Watch()
    if name == "compiled" and strategy != "fsdp2":  # graphs are cut for DDP as well, but one compiler of C++ will do
        module.backbone.compile(backend="aot_eager")
    every = 2 if name == "mae" else 4  # to gather what is split takes longer than to train it
    save = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    callbacks = [save, watch, GradientNorm(), SavePictures()]
    callbacks += [ExportBackbone()] if hasattr(module, "backbone") else []
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, logger=CSVLogger(out, name="", version=""), log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    data = Images(module.input_shape[1], hasattr(module, "detect"), hasattr(module, "encode_text"), name == "language")
    guard(trainer).fit(module, data, weights_only=True, **options)
    trainer.test(module, data, ckpt_path=f"{out}/step=4.ckpt", weights_only=True, verbose=False)
    tested = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("test/loss")}
    Path(out, f"found{trainer.global_rank}.json").write_text(json.dumps([watch.losses, watch.part, tested]))


for name in sys.argv[1:]:
    train(name, "ddp_find_unused_parameters_true", f"{name}-ddp")
    train(name, "fsdp2", f"{name}-fsdp2")
if "mae" in sys.argv:
    train("mae", "fsdp2", "rest-fsdp2", ckpt_path="mae-fsdp2/step=2.ckpt")
    train("mae", "ddp_find_unused_parameters_true", "rest-ddp", ckpt_path="mae-fsdp2/step=2.ckpt")
    plain = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    train("mae", plain, "plain")
'''


def found(folder: str, rank: int = 0) -> tuple[list[float], float, dict[str, float]]:
    losses, part, tested = json.loads(Path(folder, f"found{rank}.json").read_text())
    return losses, part, tested


def train(*names: str) -> None:
    Path("trained.py").write_text(TRAINED)
    done = forked.run([sys.executable, "trained.py", *names], capture_output=True, launches=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_module_trains_as_under_ddp_on_half_of_its_weights():
    names = ["vit", "compiled", "cross", "gumbel", "detector", "two_stages", "efficientnet", "aligner", "language"]
    train(*names)
    for name in names:
        for rank in (0, 1):
            (whole, _, tested), (split, part, tested_split) = found(f"{name}-ddp", rank), found(f"{name}-fsdp2", rank)
            assert len(split) == 4
            assert split == pytest.approx(whole, rel=1e-3), name  # other memory orders, other kernels
            assert part == pytest.approx(0.5, abs=0.05), name
            if name != "efficientnet":  # statistics of its BatchNorm are each process's own
                assert tested_split == pytest.approx(tested, rel=1e-3), name
        assert list(Path(f"{name}-fsdp2", "images").glob("*.png"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_checkpoint_of_split_weights_is_whole_and_anyone_goes_on_from_it():
    train("mae")
    losses, _, tested = found("mae-fsdp2")
    assert losses == pytest.approx(found("mae-ddp")[0], rel=1e-5)
    assert damage("mae-fsdp2/step=4.ckpt") is None
    saved, rest, ddp = (
        torch.load(f"{run}/step=4.ckpt", weights_only=True) for run in ("mae-fsdp2", "rest-fsdp2", "rest-ddp")
    )
    assert found("rest-fsdp2")[0] == losses[2:]
    assert found("rest-ddp")[0] == pytest.approx(losses[2:], rel=1e-5)
    for name, value in saved["state_dict"].items():
        assert torch.equal(rest["state_dict"][name], value), name
        assert torch.allclose(ddp["state_dict"][name], value, atol=1e-6), name
    for index, moments in saved["optimizer_states"][0]["state"].items():
        assert all(torch.equal(rest["optimizer_states"][0]["state"][index][key], moments[key]) for key in moments)
    alone = MAEPretrainer.load_from_checkpoint("mae-fsdp2/step=4.ckpt")
    weights.load(alone, "mae-fsdp2/encoder.safetensors")  # of the last step as well
    for name, value in alone.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name]), name
    # Lightning's own strategy, whose checkpoints are folders.
    assert found("plain")[0] == losses
    assert found("plain")[2] == pytest.approx(tested)
    assert damage("plain/step=4.ckpt") is None
    assert Path("plain/step=4.ckpt").is_dir()
    for content in (saved, ddp, torch.load("plain/step=4.ckpt/meta.pt", weights_only=True)):
        assert content["module"] == "MAEPretrainer"  # torch has put a class of its own before it
        assert content["preprocessing"] == {"kind": "somebody's own"}


class Net(Shardable, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.stages = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
        self.neck = nn.ModuleDict({"tops": nn.ModuleList([nn.Linear(8, 8)])})
        self.fuse = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.ModuleList([nn.Linear(8, 8)])])


def test_blocks_are_the_elements_of_outermost_lists():
    net = Net()
    assert _blocks(net) == [*net.stages, net.neck["tops"][0], *net.fuse[0], *net.fuse[1]]


def test_what_cannot_be_split_is_refused_before_anything_is():
    class Mesh(dict):  # sizes are all that is asked for until then
        def __getitem__(self, name):
            return SimpleNamespace(size=lambda: {"data_parallel": 1, "tensor_parallel": 2}[name])

    with pytest.raises(ValueError, match="tensor_parallel_size is 2: Net is split by data_parallel_size alone"):
        shard(Net(), Mesh())
    net = Net()
    net.scale = nn.Parameter(torch.ones(()))
    whole = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    with pytest.raises(ValueError, match=r"scale has no dimension to split: make it a parameter of shape \(1,\)"):
        shard(net, whole)


def test_under_other_strategies_nothing_happens():
    net = Net()
    net.configure_model()
    assert type(net) is Net


def test_checkpoints_are_whole_unless_asked_for_in_parts():
    assert not FSDP2Strategy()._save_distributed_checkpoint
    assert FSDP2Strategy(save_distributed_checkpoint=True)._save_distributed_checkpoint
