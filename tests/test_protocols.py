"""The contract of modules, callbacks, data and command line: what is asked for stands in ``zoo.common.protocols``."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    ImageTextAligner,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo.common import data_protocols, protocols

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("zoo", "datamodules") for path in (ROOT / package).rglob("*.py"))
PROTOCOLS = {
    name: each
    for name, each in vars(protocols).items()
    if inspect.isclass(each) and each.__module__ in (protocols.__name__, data_protocols.__name__)
}

# What may be looked for by name, since it belongs to others and may truly be missing; by whose it is.
OTHERS = {
    "Python and its platforms": "__name__ SIGHUP SIGUSR1 __len__ _fields memfd_create pthread_sigmask "
    "sched_getaffinity sigtimedwait exitcode",
    "torch: loaders, samplers, optimizers, schedulers, tensors of one kind or another": "_get_closed_form_lr "
    "_schedulers _step_supports_amp_scaling batch_sampler batch_size data_source dataset item optimizer param_groups "
    "reset sampler set_epoch to_local tolist",
    "torchvision: box formats, policies, archives": "data format value ops _ARCHIVE_EXTRACTORS _decompress",
    "timm, and networks like its": "act attn blocks channels dist_token drop drop_path1 drop_path2 drop_rate "
    "feature_info forward_features forward_head forward_intermediates grid_size group_matcher head head_drop heads "
    "img_size no_weight_decay num_heads output_fmt patch_embed pretrained_cfg proj prune_intermediate_layers "
    "reset_classifier window_size",
    "Lightning: what is missing without a Trainer, or of some loggers, plugins and callbacks": "_batch_sampler "
    "_timeout _trainer add_image auto_requeue best_model_path datamodule dirpath hparams last_model_path "
    "lightning_module monitor overfit_batches procs rank requeue_signal root_dir save_on_exception scaler "
    "train_dataloader",
    "transformers: configurations and outputs of models of one kind or another": "eos_token_id hidden_size image_size "
    "is_encoder_decoder max_position_embeddings num_channels pad_token_id pooler_output",
    "jsonargparse's parsers": "parent_parser print_config subcommand_parser",
    "submodules, which an instance check does not see since Python 3.12": "backbone decoder",
    "the optional attributes of datamodules' Samples, which its docstring lists": "batch in_batch labels names random "
    "raw sizes sizing unreadable",
    "modules, for datamodules, which import nothing of the zoo: HasClasses, HasCategories": "classes category_ids",
    "an estimator, a decoder of somebody's own": "samples widest",
}
KNOWN = {name for names in OTHERS.values() for name in names.split()}


def asked(path: Path) -> Iterator[tuple[int, str]]:
    """The names that a file looks for by ``hasattr``, or by ``getattr`` with something else in their place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def test_nothing_is_asked_for_by_name_but_what_belongs_to_others():
    unknown = [f"{path.relative_to(ROOT)}:{line} {name}" for path in SOURCES for line, name in asked(path)]
    unknown = [each for each in unknown if each.split()[1] not in KNOWN]
    assert not unknown, "write a protocol in zoo/common/protocols.py, or say here whose it is"


def test_what_protocols_have_is_not_looked_for_by_name_in_the_zoo():
    """Data modules cannot import them, and Lightning's own hparams are everybody's."""
    members = {name for each in PROTOCOLS.values() for name in own_members(each)} - {"hparams"}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "zoo")
        for line, name in asked(path)
        if name in members and name not in ("__len__", "channels", "samples")  # of others as well, see above
    ]
    assert not found


def own_members(protocol: type) -> set[str]:
    fields = set(inspect.get_annotations(protocol)) | set(vars(protocol))
    return {name for name in fields if not name.startswith("_")}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_protocol_is_asked_for_and_says_what_it_is(name):
    protocol = PROTOCOLS[name]
    assert protocol.__doc__
    texts = [path.read_text(encoding="utf-8") for path in SOURCES if not path.name.endswith("protocols.py")]
    assert any(f", {name})" in text for text in texts), "nobody asks for it"
    members = own_members(protocol)
    assert members
    text = "\n".join(texts)
    for member in members - {"layer_norm_eps"}:  # which says all by being there
        assert f".{member}" in text


VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
VAE = {"latents": 2, "image_size": 8, "hidden": (8,)}
# By class: a small one, and what it can be asked for beside what all can.
MODULES = {
    ViTClassifier: (
        lambda: ViTClassifier(num_classes=3, **VIT),
        "SetsLayerNorm Mixes HasPeers HasClasses ExchangesLoss GivesProbabilities UsesThresholds",
    ),
    EfficientNetClassifier: (
        lambda: EfficientNetClassifier(phi=-6, num_classes=3, image_size=32),
        "FollowsWeights Mixes HasPeers HasClasses ExchangesLoss GivesProbabilities UsesThresholds",
    ),
    MAEPretrainer: (
        lambda: MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2),
        "SetsLayerNorm Changeable Unpredicted ForeignWeights HasPeers TrainsOtherwise PredictsRows WordsMetrics "
        "Watched Reconstructs",
    ),
    FPNDetector: (
        lambda: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1),
        "Changeable Pruned ForeignWeights NamesPredictionWriter WordsMetrics DrawsTargets HasPeers HasClasses "
        "MeasuresDetections PredictsInViews TrainsOtherwise",
    ),
    FasterRCNN: (
        lambda: FasterRCNN("test_resnet", num_classes=3, channels=8, head_width=8),
        "Changeable Pruned ForeignWeights NamesPredictionWriter WordsMetrics DrawsTargets HasPeers HasClasses "
        "MeasuresDetections PredictsInViews TrainsOtherwise PredictsOtherwise",
    ),
    ImageTextAligner: (
        lambda: ImageTextAligner("test_resnet", embed_dim=6, text_width=8, text_depth=1, text_heads=2, image_size=32),
        "Changeable DrawsTargets FollowsWeights ForeignWeights HasClasses PredictsOtherwise PredictsRows "
        "TrainsOtherwise Watched WordsMetrics",
    ),
    VisionLanguageModel: (
        lambda: VisionLanguageModel("test_resnet", language_width=8, language_depth=1, language_heads=2, image_size=32),
        "Changeable DrawsTargets PredictsOtherwise PredictsRows TrainsOtherwise Watched WordsMetrics",
    ),
    GumbelVAE: (
        lambda: GumbelVAE(categories=2, **VAE),
        "Changeable Unpredicted TrainsOtherwise PredictsRows WordsMetrics HasPeers Reconstructs",
    ),
    GaussianVAE: (
        lambda: GaussianVAE(**VAE),
        "Changeable Unpredicted TrainsOtherwise PredictsRows WordsMetrics Reconstructs",
    ),
}


@pytest.mark.parametrize("technique", MODULES)
def test_what_a_technique_can_be_asked_for(technique):
    make, beside = MODULES[technique]
    with torch.device("meta"):
        module = make()
    found = {name for name, each in PROTOCOLS.items() if isinstance(module, each)} - {"HasCategories"}
    assert found == {
        "HasInputShape",
        "ChecksImages",
        "DrawsPictures",
        "KeepsArguments",
        "NamesResults",
        "Exports",
        *beside.split(),
    }
