"""Peak rates of devices, of dense operations, the denominators of model FLOP utilisation.

Vendors' figures for matrix products without sparsity, in TFLOP/s, accumulated in float32 wherever the vendor tells the
two apart. (Lightning's own table has the sparse figure for some devices, and one without tensor cores for others.) A
device that is not here has no utilisation: nothing is guessed.
"""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s by what is multiplied, and where it is published. None: the device cannot."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float
    source: str


# By what torch.cuda.get_device_name says; the first that fits, so that the longer names come first.
PEAKS = {
    "GB200": Peak(2500, 2500, 1250, 80, "NVIDIA GB200 NVL72 datasheet, halved where it is with sparsity"),
    "B200": Peak(2250, 2250, 1100, 75, "NVIDIA HGX B200 datasheet, halved where it is with sparsity"),
    "H200": Peak(989.4, 989.4, 494.7, 66.9, "NVIDIA H200 SXM datasheet, halved where it is with sparsity"),
    "GH200": Peak(989.4, 989.4, 494.7, 66.9, "NVIDIA GH200 datasheet, halved where it is with sparsity"),
    "H100 PCIe": Peak(756.4, 756.4, 378.2, 51.2, "NVIDIA H100 architecture whitepaper, table 2"),
    "H100 NVL": Peak(835.5, 835.5, 417.5, 60.0, "NVIDIA H100 NVL datasheet, halved where it is with sparsity"),
    "H100": Peak(989.4, 989.4, 494.7, 66.9, "NVIDIA H100 architecture whitepaper, table 2 (SXM5)"),
    "A100": Peak(312, 312, 156, 19.5, "NVIDIA A100 datasheet"),
    "A10": Peak(125, 125, 62.5, 31.2, "NVIDIA A10 datasheet"),
    "L40S": Peak(362.05, 362.05, 183, 91.6, "NVIDIA L40S datasheet"),
    "L4": Peak(121, 121, 60, 30.3, "NVIDIA L4 datasheet, halved where it is with sparsity"),
    "RTX A6000": Peak(154.8, 154.8, 77.4, 38.7, "NVIDIA GA102 architecture whitepaper, RTX A6000"),
    "RTX 4090": Peak(165.2, 165.2, 82.6, 82.6, "NVIDIA Ada architecture whitepaper, appendix A"),
    "RTX 3090": Peak(71, 71, 35.6, 35.6, "NVIDIA GA102 architecture whitepaper, table 9"),
    "V100": Peak(None, 125, None, 15.7, "NVIDIA V100 datasheet (SXM2)"),
    "T4": Peak(None, 65, None, 8.1, "NVIDIA T4 datasheet"),
    "MI300X": Peak(1307.4, 1307.4, 653.7, 163.4, "AMD Instinct MI300X datasheet"),
}


def peak_of(device_name: str, precision: str) -> tuple[float, str] | None:
    """The dense peak of a device, in FLOP/s, and its source; None if the device is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` has it.
        precision: Of the Trainer: "32-true", "bf16-mixed" and so on. In 32 bits it matters whether torch may use TF32.
    """
    words = device_name.replace("-", " ").split()
    known = next((peak for name, peak in PEAKS.items() if _is_in(name.split(), words)), None)
    if known is None:
        return None
    kind = "bf16" if "bf16" in precision else "fp16" if "16" in precision else "fp32"
    if kind == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        kind = "tf32"
    rate: float | None = getattr(known, kind)
    return None if rate is None or "64" in precision else (rate * 1e12, f"{rate:g} TFLOP/s in {kind}, {known.source}")


def _is_in(name: list[str], words: list[str]) -> bool:
    """True if words stand in a row somewhere: A10 is neither A100 nor A10G."""
    return any(words[i : i + len(name)] == name for i in range(len(words)))
