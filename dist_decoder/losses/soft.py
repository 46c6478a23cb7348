"""Contrastive losses whose targets are softmaxes of the images' own similarities.

Axes: B samples of the global batch, R rows (a sample may have several).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def softclip(brain_image_BB: Tensor, image_image_BB: Tensor, temperature: float) -> Tensor:
    """Return the soft cross entropy of both directions, a scalar.

    Two samples of one image have equal targets, so they are never each other's negatives.

    Args:
        brain_image_BB: cosines; rows are brains, columns images.
        image_image_BB: cosines of the images among themselves.
        temperature: divides both.

    Source: MindEye (Scotti et al. 2023), eq. 4; released MindEyeV2 code.
    """
    target = image_image_BB.float() / temperature
    logits = brain_image_BB.float() / temperature
    both = _soft_cross_entropy(target, logits) + _soft_cross_entropy(target, logits.transpose(0, 1))
    return both / 2


def soft_contrastive(
    teacher_augmented_RR: Tensor, student_augmented_RR: Tensor, temperature: float
) -> Tensor:
    """Return the low-level branch's soft contrastive loss against two views, a scalar.

    Args:
        teacher_augmented_RR: cosines; rows teacher, columns teacher on the augmented image.
        student_augmented_RR: cosines; rows student, columns teacher on the augmented image.
        temperature: divides both (MindEye2: 0.2).

    Source: released MindEyeV2 code (``soft_cont_loss``).
    """
    teacher = teacher_augmented_RR.float() / temperature
    student = student_augmented_RR.float() / temperature
    total = _soft_cross_entropy(teacher, student) + _soft_cross_entropy(
        teacher.transpose(0, 1), student.transpose(0, 1)
    )
    return total / 2


def _soft_cross_entropy(target_logits_RR: Tensor, logits_RR: Tensor) -> Tensor:
    target = target_logits_RR.softmax(dim=1)
    return -(target * logits_RR.log_softmax(dim=1)).sum() / len(logits_RR)


def absolute_error_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the sum over samples of the mean absolute error of a sample, a scalar.

    Args:
        prediction: (b, ...); b may be zero.
        target: (b, ...), for the low-level branch the latents of the frozen VAE.
    """
    features = max(prediction[0].numel() if len(prediction) else 1, 1)
    total = F.l1_loss(prediction.float(), target.float(), reduction="sum")
    return total / features
