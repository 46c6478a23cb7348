"""One training step: forward, sums over ranks, losses.

Tokens are cut over ranks: of the projected tokens and of their targets a rank has its own tokens of
every sample, and the similarities are sums of what the ranks make of theirs. No rank ever holds
the tokens of the global batch.

Axes: B samples of the global batch, b of this rank, f features that this rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.config.loss import LossConfig
from dist_decoder.cuts import Cuts
from dist_decoder.dist import World, gather_shared
from dist_decoder.errors import DataError
from dist_decoder.losses.mixing import Mixture
from dist_decoder.losses.objective import CUT, Inputs, Losses, Term, mixing_share, objective
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.train.class_terms import ClassTerms
from dist_decoder.train.mixing import mix_batch

Forward = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How many samples of the global batch each rank holds; known without communication."""

    counts: tuple[int, ...]

    @property
    def global_size(self) -> int:
        return sum(self.counts)


class Step:
    """The losses of one global step, as one rank computes them."""

    def __init__(
        self,
        batch: Batch,
        plan: Plan,
        terms: tuple[Term, ...],
        config: LossConfig,
        seed: int,
        world: World,
        num_steps: int = 1,
        num_voxels: Mapping[str, int] | None = None,
        classes: ClassTerms | None = None,
    ) -> None:
        """Mix the scans and look the targets up; a collective call. Arguments: ``compute_losses``.

        Raises:
            DataError: the batch lacks a target.
        """
        self.plan = plan
        self.terms = terms
        self.config = config
        self.seed = seed
        self.world = world
        self.num_steps = num_steps
        self.classes = classes
        self.cuts = Cuts(world, plan.counts)
        self.targets = _targets(batch, terms)
        self.mixture: Mixture | None = None
        if batch.step / num_steps < mixing_share(config):
            voxels = num_voxels or {name: v.shape[1] for name, v in batch.voxels.items()}
            batch, self.mixture = mix_batch(batch, plan.counts, config.mixing, seed, voxels, world)
        self.batch = batch

    def outputs(
        self,
        forward: Forward,
        batch: Batch,
        cuts: Cuts,
        terms: tuple[Term, ...],
        clean_BTD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return what some terms need of some samples; a collective call.

        Args:
            forward: the decoder or the engine around it.
            batch: this rank's share of the samples.
            cuts: how those samples are divided over the ranks.
            terms: whose outputs are wanted.
            clean_BTD: their tokens, for the prior.
        """
        needed = tuple(sorted({_ASKED.get(term.output, term.output) for term in terms}))
        return forward(
            batch.voxels,
            batch.rows,
            batch.size,
            keys=SampleKeys(self.seed, batch.step, tuple(batch.positions_B.tolist())),
            prior_target_BTD=clean_BTD if "prior" in needed else None,
            outputs=needed,
            cuts=cuts,
        )

    def losses(self, outputs: Mapping[str, Tensor], terms: tuple[Term, ...]) -> Losses:
        """Return the losses of some terms from the outputs of the whole batch; a collective call.

        The memories of the terms on classes take the samples in.
        """
        batch, plan, world, cuts, classes = (
            self.batch, self.plan, self.world, self.cuts, self.classes
        )  # fmt: skip
        class_inputs = None
        if classes is not None:
            labels = classes.labels_of(batch.image_uids).to(world.device)
            labels = gather_shared(labels.float(), plan.counts, world) > 0
            class_inputs = classes.inputs(labels)
            if self.config.classes.perturbed_prob > 0:
                everyone = gather_shared(batch.positions_B, plan.counts, world)
                all_keys = SampleKeys(self.seed, batch.step, tuple(everyone.tolist()))
                moved = classes.perturb(
                    outputs["retrieval"], labels, all_keys, self.config.classes, cuts
                )
                outputs = {**outputs, "retrieval": moved}
        gathered: dict[str, Tensor] = {}
        gathered_targets: dict[str, Tensor] = {}
        for term in terms:
            if term.scope == "own":
                continue
            if term.output in CUT:
                gathered[term.output] = outputs[term.output].flatten(1)
            elif term.output not in gathered:
                whole = outputs[term.output].float().flatten(1)
                gathered[term.output] = gather_shared(whole, plan.counts, world)
            for name in _target_names(term):
                if name in gathered_targets:
                    continue
                if term.output in CUT:
                    shard = cuts.to_shards(self.targets[name].to(outputs[term.output].dtype))
                    gathered_targets[name] = shard.flatten(1)
                else:
                    whole = self.targets[name].flatten(1)
                    gathered_targets[name] = gather_shared(whole, plan.counts, world)
        inputs = Inputs(
            config=self.config,
            own=outputs,
            own_targets=self.targets,
            gathered=gathered,
            gathered_targets=gathered_targets,
            image_ids_B=gather_shared(batch.image_ids_B, plan.counts, world),
            step=batch.step,
            num_steps=self.num_steps,
            mixture=self.mixture,
            classes=class_inputs,
            temperature=_of_all_ranks(outputs.get("temperature"), world),
            total=cuts.sum_partials,
        )
        losses = objective(terms, inputs)
        if class_inputs is not None:
            if "subject_latents" in gathered:
                class_inputs.latents.add(gathered["subject_latents"], class_inputs.labels_BC)
            if self.config.relational > 0:
                class_inputs.tokens.add(
                    gathered["retrieval"],
                    class_inputs.labels_BC,
                    inputs.image_ids_B,
                    cuts.sum_partials,
                )
        return losses


def compute_losses(
    forward: Forward,
    batch: Batch,
    plan: Plan,
    terms: tuple[Term, ...],
    config: LossConfig,
    seed: int,
    world: World,
    num_steps: int = 1,
    num_voxels: Mapping[str, int] | None = None,
    classes: ClassTerms | None = None,
) -> Losses:
    """Return this rank's losses of one global step; a collective call.

    ``backward((shared + own) * world_size)`` on every rank, followed by the engine's average over
    ranks, gives the gradient of the loss over the global batch to the middle; the ends' gradient
    is whole on its rank, times ``world_size``.

    Args:
        forward: the decoder or the engine around it.
        batch: this rank's samples; may be empty.
        plan: samples of every rank.
        terms: active terms.
        config: weights.
        seed: of noise, dropout, mixtures and the prior's draws.
        world: this rank.
        num_steps: of the run: schedules go by the finished share of it.
        num_voxels: of every subject of the model; mixing needs it.
        classes: what the terms on classes need; its memories take this step's samples in.
    """
    step = Step(batch, plan, terms, config, seed, world, num_steps, num_voxels, classes)
    outputs = step.outputs(forward, step.batch, step.cuts, terms, step.targets.get("tokens"))
    return step.losses(outputs, terms)


_ASKED = {"low_level_maps": "low_level"}
"""Outputs that the decoder gives together with another one."""


def _of_all_ranks(parameter: Tensor | None, world: World) -> Tensor | None:
    """Return a parameter of shared terms; its gradient is divided over the ranks.

    Every rank computes the whole shared loss, so that each would count the parameter's gradient
    in full, while samples count on their own rank only.
    """
    if parameter is None:
        return None
    return parameter.detach() + (parameter - parameter.detach()) / world.size


def _target_names(term: Term) -> tuple[str, ...]:
    if term.target is None:
        return ()
    if term.name == "low_level_contrastive":
        return ("low_level_maps", "low_level_maps_augmented")
    return (term.target,)


def _targets(batch: Batch, terms: tuple[Term, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(batch.low_level)
    for name, value in (("pooled", batch.pooled_BE), ("tokens", batch.tokens_BTD)):
        if value is not None:
            found[name] = value
    for term in terms:
        for name in _target_names(term):
            if name not in found:
                raise DataError(
                    f"step {batch.step}: the batch has no {name} but loss.{term.name} needs them; "
                    f"embed with an encoder that gives them, or switch the term off"
                )
    return found
