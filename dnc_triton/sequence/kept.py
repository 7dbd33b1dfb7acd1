"""What a step of the memory in plain PyTorch leaves for its backward, and how its equations cut that up.

Views are cut for all steps at once: one by one they take as long as small products.

Letters in every shape: T steps, B batch, N memory slots, W word size, R read heads, S the size of an interface vector.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

from dnc_reference.interface import interface_sizes


class Vectors(NamedTuple):
    """The interface vectors of all steps [T, B, S], or of one, cut into what has one activation."""

    keys: Tensor  # [..., R+1, W], the write key last
    write_vector: Tensor  # [..., 1, W]
    strengths: Tensor  # [..., R+1]
    squashed: Tensor  # [..., W+R+2]: erase vector, free gates, allocation gate, write gate
    modes: Tensor  # [..., R, 3]

    @classmethod
    def of(cls, vectors: Tensor, reads: int, word: int) -> Vectors:
        """Views."""
        sizes = list(interface_sizes(reads, 1, word).values())
        lengths = [sum(sizes[:2]), sizes[2], sum(sizes[3:5]), sum(sizes[5:9]), sizes[9]]
        keys, write_vector, strengths, squashed, modes = vectors.split(lengths, dim=-1)
        return cls(
            keys.unflatten(-1, (reads + 1, word)),
            write_vector.unsqueeze(-2),
            strengths,
            squashed,
            modes.unflatten(-1, (reads, 3)),
        )


class Kept(NamedTuple):
    """What a step leaves for its backward. Of all steps [T, ...], or of one."""

    strengths: Tensor  # [B, R+1]
    squashed: Tensor  # [B, W+R+2]
    modes: Tensor  # [B, R, 3]
    factors: Tensor  # [B, R, N], of retention
    retention: Tensor  # [B, N]
    written: Tensor  # [B, N], usage before anything is freed
    sorted_usage: Tensor  # [B, N]
    exclusive_product: Tensor  # [B, N], of the usages sorted before
    sorted_allocation: Tensor  # [B, N]
    candidates: Tensor  # [B, 2, N], where to write: allocation, content
    key_norms: Tensor  # [B, R+1]
    norms: Tensor  # [B, N], of the words before the step
    new_norms: Tensor  # [B, N]
    write_similarity: Tensor  # [B, 1, N]
    read_similarity: Tensor  # [B, R, N]
    ways: Tensor  # [3, B, R, N], where to read: backward, forward, content
    free_list: Tensor  # [B, N] int64

    @classmethod
    def shapes(cls, batch: int, slots: int, word: int, reads: int) -> list[tuple[int, ...]]:
        """Those of one step, in the order of the fields."""
        row, head, heads = (batch, slots), (batch, 1, slots), (batch, reads, slots)
        shapes = {
            "strengths": (batch, reads + 1),
            "squashed": (batch, word + reads + 2),
            "modes": (batch, reads, 3),
            "factors": heads,
            "candidates": (batch, 2, slots),
            "key_norms": (batch, reads + 1),
            "write_similarity": head,
            "read_similarity": heads,
            "ways": (3, *heads),
        }
        return [shapes.get(name, row) for name in cls._fields]


class Gates(NamedTuple):
    """Views of what is squashed, or of its gradient. Of all steps [T, ...], or of one."""

    erase: Tensor  # [B, 1, W]
    free: Tensor  # [B, R, 1]
    allocation: Tensor  # [B, 1]
    write: Tensor  # [B, 1]

    @classmethod
    def of(cls, squashed: Tensor, reads: int, word: int) -> Gates:
        erase, free, allocation, write = squashed.split([word, reads, 1, 1], dim=-1)
        return cls(erase.unsqueeze(-2), free.unsqueeze(-1), allocation, write)


class Views(NamedTuple):
    """More views of what is kept, as the equations take it. Of all steps [T, ...], or of one."""

    usage_but_last: Tensor  # [B, N-1], sorted
    product_but_first: Tensor  # [B, N-1], exclusive
    allocation: Tensor  # [B, N]
    backward: Tensor  # [B, R, N]
    forward: Tensor  # [B, R, N]
    by_way: Tensor  # [3, B, R, 1], the read modes, for `Kept.ways`

    @classmethod
    def of(cls, kept: Kept) -> Views:
        backward, forward, _ = kept.ways.unbind(1)
        by_way = kept.modes.permute(0, 3, 1, 2).unsqueeze(-1)
        usage, product = kept.sorted_usage[..., :-1], kept.exclusive_product[..., 1:]
        return cls(usage, product, kept.candidates[:, :, 0], backward, forward, by_way)


class LookUp(NamedTuple):
    """Views of what H heads look up, and find. Of all steps [T, ...], or of one."""

    keys: Tensor  # [B, H, W]
    key_norms: Tensor  # [B, 1, H]
    strengths: Tensor  # [B, H, 1]
    norms: Tensor  # [B, 1, N], of the words
    similarity: Tensor  # [B, H, N]
    content: Tensor  # [B, H, N]

    @classmethod
    def of(cls, heads: slice, norms: Tensor, similarity: Tensor, content: Tensor, keys: Tensor, kept: Kept) -> LookUp:
        """For some of the heads, of which the last one writes."""
        key_norms, strengths = kept.key_norms[..., heads].unsqueeze(-2), kept.strengths[..., heads].unsqueeze(-1)
        return cls(keys[..., heads, :], key_norms, strengths, norms.unsqueeze(-2), similarity, content)


class LookUpBackward(NamedTuple):
    """Slopes of a look-up, and where its gradients go. Of all steps [T, ...], or of one."""

    dots: Tensor  # [B, H, N], from scaled similarities to keyᵀ word
    key_norms: Tensor  # [B, H, 1]
    norms: Tensor  # [B, 1, N]
    d_keys: Tensor  # [B, H, W]
    d_strengths: Tensor  # [B, H]


class Slopes(NamedTuple):
    """What a gradient is multiplied by on its way back through a step. Of all steps [T, ...], or of one."""

    free: Tensor  # [B, R, N], from retention to the free gates, to be summed
    read_weights: Tensor  # [B, R, N], from retention to the read weights before
    usage: Tensor  # [B, N], from usage to the usage before
    write_weights: Tensor  # [B, N], from usage to the write weights before
    candidates: Tensor  # [B, 2, 1], from the write weights to `Kept.candidates`
    vectors: Tensor  # [B, S], from the activated interface to the raw one, but for the modes


Fields = TypeVar("Fields", Vectors, Kept, Gates, Views, LookUp, LookUpBackward, Slopes)


def by_step(fields: Fields) -> list[Fields]:
    """Cut into steps, as views."""
    return [type(fields)(*views) for views in zip(*(tensor.unbind(0) for tensor in fields), strict=True)]
