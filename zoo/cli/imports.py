"""Names that a configuration may have imported."""

from jsonargparse import set_parsing_settings

import zoo

# What --strict-imports lets a configuration name: classes whose arguments are numbers, names and files. Not timm,
# torchvision and torchmetrics, some of whose parts download, unpickle, or call what their arguments name, and of
# Lightning and torch the parts that a recipe needs.
ALLOWED = ["zoo", "datamodules", "torch.optim", "torch.nn"]
# The command line itself, which imports by name and starts programs, and what techniques add to it.
NEVER = ["zoo.cli", *(f"zoo.{technique}.commands" for technique in dict.fromkeys(zoo._EXPORTS.values()))]
NEVER += ["torch.nn.attention"]  # imports modules by name
for _package, _fabric in (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric")):
    ALLOWED += [f"{_package}.{part}" for part in ("callbacks", "plugins", "profilers", "strategies", "accelerators")]
    ALLOWED += [f"{_fabric}.{part}" for part in ("plugins", "strategies", "accelerators")]
    # Other loggers send what they get to a service.
    ALLOWED += [f"{_package}.loggers.{name}" for name in ("TensorBoardLogger", "CSVLogger", "tensorboard", "csv_logs")]
    # They call what their arguments name, or run programs.
    NEVER += [f"{_package}.callbacks.{name}" for name in ("LambdaCallback", "lambda_function")]
    NEVER += [f"{_package}.strategies.launchers", f"{_fabric}.strategies.launchers"]
# What nobody's configuration may name, beside jsonargparse's own list: it reads or builds code.
DENIED = ["torch.hub", "torch.load", "torch.serialization", "torch.jit", "torch.package", "torch.utils.cpp_extension"]
DENIED += ["torch.utils.model_zoo", "yaml"]


def restrict(strict: bool) -> None:
    """Makes jsonargparse refuse what a configuration may not name, for the rest of the process.

    Args:
        strict: Whether what is not allowed is refused, too; else only what is denied.
    """
    set_parsing_settings(
        import_path_denylist=["*", *NEVER, *DENIED] if strict else DENIED,
        import_path_allowlist=ALLOWED if strict else [],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=strict,  # else `--model s3://...` would read a configuration, too
    )
