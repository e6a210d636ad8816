"""Optimizers, parameter groups and learning-rate schedules.

Layer decay is part of each parameter group's own learning rate. timm keeps it beside, as ``lr_scale``, which only its
own schedulers read: under a scheduler of torch every layer would silently learn at the same rate.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, cast

from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zoo._lightning import LightningModule, rank_zero_warn

# The last part of a parameter's name that says it is a token or a position, not a weight.
_NOT_WEIGHTS = ("*token", "*tokens", "*pos_embed", "*pos_embedding")


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    *,
    encoders: Sequence[str] = ("backbone",),
    lr_scale: Mapping[str, float] | None = None,
    apart: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a module in groups, as torch's optimizers take them.

    No weight decay for norms, biases and whatever else has one dimension, for position embeddings, for class, register
    and mask tokens, and for what a part of the module names in ``no_weight_decay()``, as timm's models do.

    With ``layer_decay`` the learning rate of layer i of n is ``lr * layer_decay**(n - i)``: for a ViT of depth d the
    embeddings are layer 0, block k is layer k + 1, and n = d + 1 is everything else: final norm, ``fc_norm``, attention
    pooling, and what is outside of the backbone (He et al. 2022, "Masked Autoencoders", appendix A.1; as in BEiT, Bao
    et al. 2021). timm itself gives a final ``norm`` to the last block instead.

    Args:
        module: A network, whose encoders are those of its parts that ``encoders`` names, or itself where it has none.
        lr: Learning rate of layer n.
        weight_decay: For those that decay.
        layer_decay: In (0, 1]. Other than 1 needs encoders with timm's ``group_matcher``.
        encoders: Names of the parts that have layers.
        lr_scale: Factors of the learning rate by the name of a parameter; 1 for all others.
        apart: Numbers by the name of a parameter, 0 for all others; those of one group have the same. torch's fused
            SGD needs it for parameters that get their first gradients later than others.

    Returns:
        Groups of ``params``, ``param_names``, ``lr`` and ``weight_decay``, the first layer first.

    Raises:
        ValueError: If nothing is trainable, ``layer_decay`` is out of range, or an encoder's layers are unknown.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}: expected a number above 0 and at most 1")
    behind = _layers_behind(module, encoders) if layer_decay != 1 else {}
    undecayed = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, part in module.named_modules()
        if callable(getattr(part, "no_weight_decay", None))
        for pattern in part.no_weight_decay()
    ]
    groups: dict[tuple[int, float, float, int], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        tail = name.rpartition(".")[2]
        plain = parameter.ndim > 1 and tail != "bias" and not any(fnmatch(tail, pattern) for pattern in _NOT_WEIGHTS)
        decay = weight_decay if plain and not any(fnmatch(name, pattern) for pattern in undecayed) else 0.0
        layers, scale = behind.get(name, 0), (lr_scale or {}).get(name, 1.0)
        rate = lr * layer_decay**layers * scale
        empty = {"params": [], "param_names": [], "lr": rate, "weight_decay": decay}
        group = groups.setdefault((-layers, decay, scale, (apart or {}).get(name, 0)), empty)
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no trainable parameters: unfreeze some before training")
    return [groups[key] for key in sorted(groups)]


def _layers_behind(module: nn.Module, encoders: Sequence[str]) -> dict[str, int]:
    """Numbers of layers behind that of each parameter of the encoders, by its name in the whole module."""
    parts = dict(module.named_children())
    found = {f"{name}.": parts[name] for name in encoders if name in parts} or {"": module}
    return {
        prefix + name: layers
        for prefix, encoder in found.items()
        if any(parameter.requires_grad for parameter in encoder.parameters())
        for name, layers in _layers_of(encoder).items()
    }


def _layers_of(encoder: nn.Module) -> dict[str, int]:
    """Numbers of layers behind that of each parameter of an encoder, by its name."""
    if not callable(getattr(encoder, "group_matcher", None)):
        raise ValueError(
            f"layer_decay needs to know the layers of {type(encoder).__name__}, which has no group_matcher() "
            "as timm's models do: give it one, or set layer_decay to 1"
        )
    matcher = cast(Any, encoder).group_matcher(coarse=False)
    if isinstance(matcher, dict):
        matcher = {name: _without_final_norms(spec) for name, spec in matcher.items()}
    # No pattern matches the empty name: it stands for the head, and falls in with the rest that no layer claims.
    names = [*(name for name, _ in encoder.named_parameters()), ""]
    layers = group_with_matcher(((name, None) for name in names), matcher, reverse=True)
    last = layers.pop("")
    if not last:  # as under torch.compile(backbone), which renames everything; backbone.compile() does not
        raise ValueError(f"layer_decay: group_matcher() of {type(encoder).__name__} matches none of its parameters")
    return {name: last - layer for name, layer in layers.items()}


def _without_final_norms(spec: Any) -> Any:
    """Drops timm's rules that put what follows all blocks into the last one; those within a stage carry its number."""
    if not isinstance(spec, list | tuple):
        return spec
    return [rule for rule in spec if rule[1] != MATCH_PREV_GROUP or re.compile(rule[0]).groups]


def create_optimizer(
    module: nn.Module,
    optimizer: str,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    betas: tuple[float, ...] | None = None,
    momentum: float | None = None,
    eps: float | None = None,
    **grouping: Any,
) -> Optimizer:
    """Creates one of timm's optimizers on :func:`parameter_groups`.

    Args:
        module, lr, weight_decay, layer_decay: See :func:`parameter_groups`.
        optimizer: A name out of ``timm.optim.list_optimizers()``: "adamw", "sgd" (Nesterov), "lamb", "rmsproptf", ...
        betas, momentum, eps: None: timm's default of that optimizer.
        grouping: ``encoders``, ``lr_scale`` and ``apart`` of :func:`parameter_groups`.

    Raises:
        ValueError: For an unknown optimizer, one that cannot run here, a setting that it does not have, and as
            :func:`parameter_groups`.
    """
    known = cast(list[str], list_optimizers())
    if optimizer not in known:
        near = get_close_matches(optimizer.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"unknown optimizer {optimizer!r}: {hint}")
    settings: dict[str, Any] = {"betas": betas and tuple(betas), "momentum": momentum, "eps": eps}
    settings = {name: value for name, value in settings.items() if value is not None}
    asked = {"lr": lr, "weight_decay": weight_decay, **settings}
    info = get_optimizer_info(optimizer)
    for name in settings:
        if not getattr(info, f"has_{name}"):
            raise ValueError(f"optimizer {optimizer!r} has no {name}: leave it out")
    groups = parameter_groups(module, lr, weight_decay, layer_decay, **grouping)
    if optimizer.endswith("lars"):
        # LARS adapts weights and leaves biases and norms alone. timm's leaves alone what does not decay instead, which
        # is everything in a linear probe.
        groups = [half for group in groups for half in _by_dimension(group)]
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    arguments = inspect.signature(info.opt_class).parameters if inspect.isclass(info.opt_class) else {}
    split = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    # torch has not taught every fused kernel to work on weights that FSDP2 has split.
    fusible = not split or info.opt_class in (Adam, AdamW)
    if devices <= {"cpu", "cuda"} and "fused" in arguments and fusible:
        settings["fused"] = True  # one kernel for all parameters: on a CPU a fraction of the time of torch's default
    try:
        created = create_optimizer_v2(groups, optimizer, lr=lr, weight_decay=weight_decay, **settings)
    except (AssertionError, ImportError) as error:  # what timm's wrappers of apex and bitsandbytes raise
        raise ValueError(f"optimizer {optimizer!r} cannot run here: {error}") from error
    except ValueError as error:  # of a value that this optimizer alone refuses
        given = ", ".join(f"{name} {value}" for name, value in asked.items())
        raise ValueError(f"optimizer {optimizer!r} does not take one of {given}: {error}") from error
    # Lightning 2.6 does not clip gradients where a fused optimizer could unscale them by itself. Nobody asked it to.
    created._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return created


def _by_dimension(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group's matrices, which LARS adapts, and its vectors, which it does not."""
    pairs = list(zip(group["params"], group["param_names"], strict=True))
    halves = []
    for adapt in (True, False):
        some = [(parameter, name) for parameter, name in pairs if (parameter.ndim > 1) == adapt]
        if some:
            params, names = zip(*some, strict=True)
            halves.append(group | {"params": list(params), "param_names": list(names), "always_adapt": adapt})
    return halves


def warmup_cosine_factor(step: int, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warm-up and half-cosine.

    It rises in a straight line from 0 at step 0 to 1 at ``warmup_steps``, then falls along half a cosine to
    ``min_lr_ratio`` at ``total_steps``, where training ends, so that the last step taken is just above. The very first
    step of a warm-up thus only fills the optimizer's moments, as in He et al. 2022.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    """A scheduler to be stepped after each step of the optimizer, by :func:`warmup_cosine_factor`.

    It multiplies each group's own learning rate, so that warm-up, decay and floor all keep the layer decay.

    Raises:
        ValueError: If the warm-up is negative, or the floor is not in [0, 1].
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}: expected 0 or more")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio is {min_lr_ratio}: expected a number from 0 to 1")
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, warmup_steps, total_steps, min_lr_ratio))


def warmup_staircase_factor(step: int, warmup_steps: int, decay_steps: float, decay_rate: float) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warm-up and staircase, as EfficientNet was trained.

    It rises in a straight line from 0 at step 0 until ``warmup_steps``; from then on it is ``decay_rate`` to the number
    of whole ``decay_steps`` since step 0, those of the warm-up included (Tan and Le 2019, section 5.2, and their code).
    """
    return step / warmup_steps if step < warmup_steps else decay_rate ** (step // decay_steps)


def warmup_steps_factor(step: int, warmup_steps: int, milestones: Sequence[float], gamma: float = 0.1) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warm-up and milestones, as detectors are trained.

    It rises in a straight line from 0 at step 0 to 1 at ``warmup_steps``, and falls to ``gamma`` of itself at each
    milestone, in steps, also within the warm-up.
    """
    risen = step / warmup_steps if step < warmup_steps else 1.0
    return risen * gamma ** sum(step >= milestone for milestone in milestones)


def lightning_schedule(
    module: LightningModule,
    optimizer: Optimizer,
    warmup_epochs: float,
    min_lr: float = 0.0,
    staircase: tuple[float, float] | None = None,
    milestones: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Warm-up and half-cosine, staircase or steps over the Trainer's run, as ``configure_optimizers`` returns them.

    Args:
        module: Attached to a Trainer, which knows how many steps of the optimizer there will be.
        optimizer: Its ``lr`` is that of the layers without layer decay.
        warmup_epochs: Length of the warm-up in epochs; fractions count. A shorter run ends on the way up, and says so.
        min_lr: Where the cosine ends; layers with layer decay end proportionally lower. A staircase has no such floor.
        staircase: ``(rate, epochs)``: multiply the learning rate by ``rate`` every so many epochs, and no cosine.
        milestones: Multiply the learning rate by 0.1 at each of these epochs, ascending, and no cosine.

    Raises:
        ValueError: If the run has no end, epochs cannot be counted, or a value is out of range.
    """
    trainer: Any = module.trainer  # Any: the Trainer sets some of its attributes out of mypy's sight
    lr = float(optimizer.defaults["lr"])
    if not 0 <= warmup_epochs < math.inf:
        raise ValueError(f"warmup_epochs is {warmup_epochs}: expected 0 or more, and finite")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr is {min_lr}: expected a number from 0 to lr, which is {lr}")
    if staircase is not None:
        rate, epochs = staircase
        if not 0 < rate <= 1 or not epochs > 0:
            raise ValueError(
                f"decay_rate is {rate}, decay_epochs {epochs}: expected a rate in (0, 1], and epochs above 0"
            )
        if min_lr:
            raise ValueError(f"min_lr is {min_lr}, but a staircase has no floor: leave it at 0")
    if milestones is not None:
        if staircase is not None or min_lr:
            raise ValueError("milestones go with neither a staircase nor min_lr: leave these out")
        if not milestones or sorted(milestones) != list(milestones) or milestones[0] <= 0:
            raise ValueError(f"milestones are {list(milestones)}: expected epochs above 0, ascending")
    in_epochs = "a staircase" if staircase is not None else "a schedule by milestones" if milestones is not None else ""
    total = trainer.estimated_stepping_batches
    if trainer.limit_train_batches == 0:
        raise ValueError("limit_train_batches is 0: there is nothing to train")
    if not in_epochs and (total < 0 or math.isinf(total)):
        missing = "max_epochs or max_steps"
        if trainer.max_epochs != -1:  # it has an end, but data without a length does not say when
            missing = "max_steps, or limit_train_batches, since the training data has no length"
        raise ValueError(f"a learning rate schedule needs a run with an end: set the Trainer's {missing}")
    epoch_steps = _epoch_steps(trainer, warmup_epochs, in_epochs) if warmup_epochs or in_epochs else 0
    warmup_steps = round(warmup_epochs * epoch_steps)
    if 0 <= total < warmup_steps and not trainer.fast_dev_run:
        rank_zero_warn(
            f"warmup_epochs={warmup_epochs} is {warmup_steps} steps, and the run ends after {int(total)}: "
            f"the learning rate only rises, to {lr * total / warmup_steps:.2g} of {lr:.2g}"
        )
    if milestones is not None:
        steps = [milestone * epoch_steps for milestone in milestones]
        scheduler = LambdaLR(optimizer, lambda step: warmup_steps_factor(step, warmup_steps, steps))
    elif staircase is None:
        scheduler = warmup_cosine(optimizer, warmup_steps, int(total), min_lr / lr if lr else 0.0)
    else:
        scheduler = LambdaLR(
            optimizer, lambda step: warmup_staircase_factor(step, warmup_steps, epochs * epoch_steps, rate)
        )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _epoch_steps(trainer: Any, warmup_epochs: float, in_epochs: str) -> int:
    """Steps of the optimizer in an epoch; ``in_epochs`` is what a schedule counted in them is called, if it is one."""
    if trainer.train_dataloader is None:  # with max_steps alone the Trainer has not counted batches yet
        trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches):
        setting = f"warmup_epochs={warmup_epochs}" if warmup_epochs else in_epochs
        remedy = "use the cosine and no warm-up" if in_epochs else "set warmup_epochs to 0"
        raise ValueError(
            f"{setting} needs epochs of known length, and the training data has none: {remedy}, or set the "
            "Trainer's limit_train_batches"
        )
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
