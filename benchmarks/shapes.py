"""The MLPs that are measured: sizes of real models, and of their factorizations."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one MLP.

    ``model_size``: features of its input and output (d). ``hidden_size``: features between its matrices. ``gated``:
    whether the matrices are gate, up and down, or fc1 and fc2. ``sparse_rank``: rank of the basis under 1:4
    projections, about 4/3 d. ``graded``: numbers of rank entries of graded projections, and of their basis, with 4, 3
    and 2 bits. Both ranks are chosen for about 2 stored bits per weight.
    """

    model_size: int
    hidden_size: int
    gated: bool
    sparse_rank: int
    graded: tuple[int, int, int]

    @property
    def graded_rank(self) -> int:
        return sum(self.graded)

    @property
    def weights(self) -> int:
        """Weights of the dense MLP."""
        return (3 if self.gated else 2) * self.model_size * self.hidden_size


SHAPES = {
    "gemma3-270m": Shape(640, 2048, gated=True, sparse_rank=896, graded=(128, 128, 128)),
    "gemma2-2b": Shape(2304, 9216, gated=True, sparse_rank=3072, graded=(128, 256, 1408)),
    "vit-base": Shape(768, 3072, gated=False, sparse_rank=1024, graded=(128, 128, 256)),
    "tiny": Shape(256, 512, gated=True, sparse_rank=384, graded=(128, 128, 128)),
}
"""Shapes by name; ``tiny`` is for the benchmark's own test."""
