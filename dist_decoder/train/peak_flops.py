"""Peak rates of GPUs, the denominator of model FLOP utilisation.

Dense matrix rates without sparsity, TFLOP/s. **Source**: NVIDIA's data sheets of the boards named.
"""

from __future__ import annotations

from typing import Literal

_PEAKS: tuple[tuple[str, float, float], ...] = (
    # part of the device name, bf16 (and fp16) on tensor cores, fp32 without TF32
    ("B200", 2250.0, 80.0),
    ("GH200", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
    ("RTX A6000", 155.0, 38.7),
    ("RTX 4090", 165.0, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def peak_flops(device_name: str, precision: Literal["fp32", "bf16", "fp16"]) -> float | None:
    """Return the FLOP/s that a device reaches at most, or None for a device that is not known.

    The first row whose name is part of ``device_name`` counts.
    """
    for name, narrow, wide in _PEAKS:
        if name in device_name:
            return 1e12 * (wide if precision == "fp32" else narrow)
    return None
