"""Which part of the ends' parameters a rank holds: rows of latents and of tokens.

The token layer is cut by tokens, what reads voxels by latents, each along its first axis in chunks
of equal, rounded-up size. The narrow factors of adapters are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_decoder.cuts import chunk_of

PREFIX = "ends."
_TOKENS = "ends.tokens."


def is_cut(name: str) -> bool:
    """Return whether a parameter is cut over ranks that are several."""
    return name.startswith(PREFIX) and ".lora_A." not in name


@dataclass(frozen=True)
class Parts:
    """What rank ``rank`` of ``size`` holds; of one rank, everything."""

    latent_dim: int
    num_tokens: int
    rank: int = 0
    size: int = 1

    def width(self, name: str) -> int:
        """Return the length of the first axis of a whole parameter of the ends that is cut."""
        return self.num_tokens if name.startswith(_TOKENS) else self.latent_dim

    def rows(self, name: str) -> range | None:
        """Return the rows of a parameter that this rank holds, None if it holds it whole."""
        if self.size == 1 or not is_cut(name):
            return None
        return chunk_of(self.width(name), self.rank, self.size)

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, of the shape that this rank holds."""
        return shape if self.rows(name) is None else (self.width(name), *shape[1:])

    @property
    def latents(self) -> range:
        """Latents that this rank computes for all samples."""
        return chunk_of(self.latent_dim, self.rank, self.size)
