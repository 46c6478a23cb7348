"""Our code behind the plain signatures of the recorded reference numbers: numpy in, numpy out.

Every function only converts types and calls the product.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.encoders.clip import normalise_pixels
from dist_decoder.eval import reconstruction
from dist_decoder.eval.retrieval import brain_to_image_hits, cosine_scores, image_to_brain_hits
from dist_decoder.exchange.pickles import read_released
from dist_decoder.exchange.released import decoder_from_released, ridge_voxels
from dist_decoder.losses import soft
from dist_decoder.losses.classes import alike, triplet_alignment
from dist_decoder.losses.contrastive import cosine_similarity, symmetric_contrastive
from dist_decoder.losses.mixing import Mixture, mix
from dist_decoder.losses.mixing import bimixco as mixed_contrastive
from dist_decoder.losses.perturbation import donor_spread, perturb_subject
from dist_decoder.losses.schedules import softclip_temperature
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.diffusion import DiffusionPrior, make_scheduler
from dist_decoder.nn.lora import add_lora, merge_lora
from dist_decoder.nn.low_rank import SkipLora
from dist_decoder.nn.mindeye2_names import key_table as released_key_table
from dist_decoder.nn.mindeye2_names import mindeye2_config, released_names
from dist_decoder.nn.neurofusion import load_neurofusion
from dist_decoder.nn.noise_schedule import noise_schedule as schedule_tables
from dist_decoder.train.optimizer import learning_rate

Array = NDArray[Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def adapters(
    weights: dict[str, Array],
    ridge_out: Array,
    voxels: Array,
    rank: int,
    alpha: float,
    n_blocks: int,
    clip_size: int,
) -> dict[str, Array]:
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    low_rank = {key: value for key, value in tensors.items() if ".lora_" in key}
    plain = {
        f"backbone.{key}": value
        for key, value in tensors.items()
        if key not in low_rank and not key.startswith("_skip_")
    }
    decoder = with_identity_ridge(plain, ridge_out.shape[-1])
    named = {
        theirs.removeprefix("backbone.").removesuffix(".weight"): ours.removesuffix(".weight")
        for ours, theirs in released_names(decoder, ["recorded/0"]).items()
    }
    everywhere = LoraConfig(
        rank=rank, alpha=alpha, targets=("backbone", "tokens", "projector"), dead_layers=True
    )
    add_lora(decoder, everywhere, seed=0)
    parameters = dict(decoder.named_parameters())
    subject, rows = "recorded/0", torch.arange(len(voxels))
    skip = SkipLora({subject: voxels.shape[-1]}, ridge_out.shape[-1], rank, alpha)
    with torch.no_grad():
        for key, value in low_rank.items():
            stem, _, factor = key.rpartition(".")
            ours = f"{named[stem]}.{factor}.default"
            target = parameters.get(ours, parameters.get(f"{ours}.weight"))
            assert target is not None
            target.copy_(value.reshape(target.shape))
        skip.lora_A[subject].copy_(tensors["_skip_adapter_align.A"])
        skip.lora_B[subject].copy_(tensors["_skip_adapter_align.B"])
        added = skip({subject: torch.from_numpy(voxels[:, 0])}, {subject: rows}, len(rows))
    merge_lora(decoder)
    return _outputs(decoder, ridge_out[:, 0] + added.numpy())


def two_way(real: Array, recon: Array) -> float:
    return float(reconstruction.two_way_identification(real, recon).mean())


def corr_distance(real: Array, recon: Array) -> Array:
    return reconstruction.correlation_distance(real, recon)


def pixcorr(images: Array, recons: Array) -> float:
    return float(reconstruction.pixel_correlation(images, recons).mean())


def ssim(images: Array, recons: Array) -> float:
    return float(reconstruction.structural_similarity(images, recons).mean())


def retrieval(brain: Array, image: Array) -> dict[str, float]:
    scores = cosine_scores(brain, image)
    own = np.arange(len(brain))
    return {
        "brain_to_image": float(brain_to_image_hits(scores, own).mean()),
        "image_to_brain": float(image_to_brain_hits(scores, own, np.zeros_like(own)).mean()),
    }


def nway(probs: Array, true_class: int, n_way: int) -> float:
    return reconstruction.n_way_top1(probs, true_class, n_way)


def clip_preprocess(image: Array) -> Array:
    pixels = torch.as_tensor(image, dtype=torch.float32)
    return normalise_pixels(pixels, CLIP_MEAN, CLIP_STD, "mindeye2").numpy()


def backbone(weights: dict[str, Array], ridge_out: Array, n_blocks: int, clip_size: int) -> Any:
    latents = ridge_out.shape[-1]
    state = {f"backbone.{key}": torch.from_numpy(value) for key, value in weights.items()}
    return _outputs(with_identity_ridge(state, latents), ridge_out[:, 0])


def prior(
    weights: dict[str, Array], noisy: Array, t: Array, brain: Array, drop: bool, **_: int
) -> Array:
    dropped = torch.full((len(noisy),), drop)
    with torch.no_grad():
        return (
            _prior(weights).net(*map(torch.from_numpy, (noisy, t, brain)), dropped, dropped).numpy()
        )


def q_sample(x0: Array, t: Array, noise: Array, timesteps: int) -> Array:
    scheduler = make_scheduler(timesteps)
    clean, drawn, steps = (torch.from_numpy(array) for array in (x0, noise, t))
    return scheduler.add_noise(clean, drawn, steps).numpy()  # type: ignore[arg-type]


def noise_schedule(timesteps: int) -> dict[str, Array]:
    return {name: table.numpy() for name, table in schedule_tables(timesteps).items()}


def prior_sample(weights: dict[str, Array], brain: Array, noises: Array, **_: int) -> Array:
    return _prior(weights).sample(torch.from_numpy(brain), torch.from_numpy(noises)).numpy()


def import_checkpoint(path: str, subject_index: int, voxels: Array) -> dict[str, Array]:
    state = read_released(Path(path))
    order = [f"recorded/{index}" for index in range(len(ridge_voxels(state)))]
    return _outputs(decoder_from_released(state, order), voxels[:, 0], order[subject_index])


def key_table(voxels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        decoder = Decoder(
            mindeye2_config(hidden, 4, True, PriorConfig()), {"nsd/subj01": voxels}, None,
            (256, 1664),
        )  # fmt: skip
    return released_key_table(decoder, ["nsd/subj01"])


def neurofusion_encoder(weights: dict[str, Array], x: Array, subject: Array) -> dict[str, Array]:
    return {
        name: _neurofusion(weights, x, subject, batch_attention)
        for name, batch_attention in (("as_released", True), ("per_sample", False))
    }


def with_identity_ridge(state: dict[str, torch.Tensor], latents: int) -> Decoder:
    """Return the decoder whose only subject's voxels are the latents themselves."""
    ridge = {"ridge.linears.0.weight": torch.eye(latents)}
    ridge["ridge.linears.0.bias"] = torch.zeros(latents)
    return decoder_from_released({**ridge, **state}, ["recorded/0"])


def _outputs(decoder: Decoder, voxels: Array, subject: str = "recorded/0") -> dict[str, Array]:
    rows = torch.arange(len(voxels))
    wanted = ("tokens", "retrieval", "low_level")
    with torch.no_grad():
        found = decoder(
            {subject: torch.from_numpy(voxels)}, {subject: rows}, len(rows), outputs=wanted
        )
    names = {"tokens": "tokens", "clip": "retrieval", "latent": "low_level"}
    names["aux"] = "low_level_maps"
    return {name: found[ours].numpy() for name, ours in names.items()}


def _prior(weights: dict[str, Array]) -> DiffusionPrior:
    state = {f"diffusion_prior.{key}": torch.from_numpy(value) for key, value in weights.items()}
    num_tokens, width = weights["net.null_brain_embeds"].shape
    state["backbone.backbone_linear.weight"] = torch.zeros(num_tokens * width, 1)
    state["backbone.backbone_linear.bias"] = torch.zeros(num_tokens * width)
    for index in range(9):
        if index % 3 != 1:
            square = (width, width) if index % 3 == 2 else (width,)
            state[f"backbone.clip_proj.{index}.weight"] = torch.zeros(square)
            state[f"backbone.clip_proj.{index}.bias"] = torch.zeros(width)
    made = with_identity_ridge(state, 1).middle.prior
    assert made is not None
    return made


def _neurofusion(
    weights: dict[str, Array], x: Array, subject: Array, batch_attention: bool
) -> Array:
    width = weights["net.1.weight"].shape[0]
    layers = sum(key.endswith(".linear1.weight") for key in weights)
    names = {f"recorded/{int(number)}": x.shape[1] for number in np.unique(subject)}
    config = ModelConfig(
        latent_dim=width,
        tokens=False,
        prior=PriorConfig(enabled=False),
        backbone=BackboneConfig(
            mixer="neurofusion",
            blocks=layers,
            hidden=weights["transformer.layers.0.linear1.weight"].shape[0],
            batch_attention=batch_attention,
        ),
    )
    decoder = Decoder(config, names, weights["net.5.weight"].shape[0], None)
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    load_neurofusion(decoder, tensors, {name: name.rpartition("/")[2] for name in names})
    rows = {name: np.flatnonzero(subject == int(name.rpartition("/")[2])) for name in names}
    with torch.no_grad():
        found = decoder(
            {name: torch.from_numpy(x[places]) for name, places in rows.items()},
            {name: torch.from_numpy(places) for name, places in rows.items()},
            len(x),
        )
    return found["pooled"].numpy()


def mixco(voxels: Array, perm: Array, beta: Array, select: Array) -> Array:
    share = torch.from_numpy(np.where(select, beta, np.float32(1)))
    return mix(torch.from_numpy(voxels), torch.from_numpy(voxels[perm]), share).numpy()


def bimixco(pred: Array, target: Array, perm: Array, beta: Array, temp: float) -> float:
    mixture = Mixture(torch.from_numpy(perm), torch.from_numpy(beta))
    similarity = cosine_similarity(torch.from_numpy(pred), torch.from_numpy(target))
    return float(mixed_contrastive(similarity, mixture, temp, legacy_fixed_points=True))


def softclip(pred: Array, target: Array, temp: float) -> float:
    brain, image = torch.from_numpy(pred), torch.from_numpy(target)
    return float(
        soft.softclip(cosine_similarity(brain, image), cosine_similarity(image, image), temp)
    )


def softcont(student: Array, teacher: Array, teacher_aug: Array, temp: float) -> float:
    own, image, view = map(torch.from_numpy, (student, teacher, teacher_aug))
    return float(
        soft.soft_contrastive(cosine_similarity(image, view), cosine_similarity(own, view), temp)
    )


def softclip_temps(start: float, end: float, steps: int) -> list[float]:
    return [softclip_temperature(start, end, step / steps, 0.0, steps) for step in range(steps)]


def onecycle(total_steps: int, epochs: int, max_lr: float) -> list[float]:
    warmup = 2 * total_steps // epochs
    config = OptimConfig(steps=total_steps, lr=max_lr, schedule="onecycle", warmup_steps=warmup)
    return [learning_rate(config, step) for step in range(total_steps)]


def triplet_bank(
    emb: Array, labels: Array, bank: Array, bank_labels: Array, margin: float
) -> float:
    # Labels may be any numbers, also -1: only equality counts.
    names = np.unique(np.concatenate([labels, bank_labels]))
    batch, memory = (torch.from_numpy(x[:, None] == names[None, :]) for x in (labels, bank_labels))
    similarity = cosine_similarity(torch.from_numpy(emb), torch.from_numpy(bank))
    return float(triplet_alignment(similarity, *alike(batch, memory), margin))


def sdp(x: Array, labels: Array, mu: Array, var: Array, scale: float) -> Array:
    known = labels >= 0
    mean, variance = (torch.from_numpy(values[np.maximum(labels, 0)]) for values in (mu, var))
    return perturb_subject(
        torch.from_numpy(x),
        mean,
        donor_spread(variance),
        torch.from_numpy(known),
        scale,
        x.shape[1],
    ).numpy()


def nt_xent(a: Array, b: Array, temp: float) -> float:
    similarity = cosine_similarity(torch.from_numpy(a), torch.from_numpy(b))
    return float(symmetric_contrastive(similarity, torch.arange(len(a)), temp))
