"""Let a torchvision built for CUDA be imported beside a CPU build of torch.

The wheels of torchvision link its operators against CUDA libraries. Beside a CPU torch they cannot
be loaded, and ``import torchvision`` fails since it registers meta kernels for operators that do
not exist. Declaring the operators' schemas first is enough for everything except calling them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# torch forgets a schema when the Library object that declared it is collected.
_declared: list[Any] = []


def ensure_torchvision() -> bool:
    """Make ``import torchvision`` work; call it right before the first such import.

    Needed before torchvision, open_clip, timm, peft and torchmetrics, all of which import
    torchvision when it is installed. Does nothing when torch has CUDA or ROCm, when torchvision is
    absent or imported already, and when its operators load. Calling it again is free.

    Returns:
        True if schemas had to be declared, now or by an earlier call.
    """
    if _declared:
        return True
    if "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            # Links CUDA libraries that this machine lacks: the case this module is for.
            continue
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        fragment.define(_OPERATORS[name])
    _declared.append(fragment)
    return True
