"""The memory's part of a sequence in plain PyTorch: the equations of a step and their adjoints, written out for speed.

The same equations in the same order as `dnc_reference.memory` and `dnc_reference.backward`, where each is explained.
Here every result goes to a buffer that was made once for the whole sequence, what depends on the forward alone is
computed for all steps at once before the backward starts, and autograd records nothing. K = 1.

Letters in every shape: T steps, B batch, N memory slots, W word size, R read heads, S the size of an interface vector.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dnc_reference.addressing import NORM_EPSILON, SIMILARITY_EPSILON, USAGE_EPSILON
from dnc_reference.backward import product_of_others
from dnc_reference.interface import interface_sizes
from dnc_reference.types import MemoryState
from dnc_triton.sequence import pool

_softmax_backward = torch._softmax_backward_data


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


class Slopes(NamedTuple):
    """By what a gradient is multiplied on its way back through a step. Of all steps [T, ...], or of one."""

    free: Tensor  # [B, R, N], from retention to the free gates, to be summed
    read_weights: Tensor  # [B, R, N], from retention to the read weights before
    usage: Tensor  # [B, N], from usage to the usage before
    write_weights: Tensor  # [B, N], from usage to the write weights before
    candidates: Tensor  # [B, 2, 1], from the write weights to `Kept.candidates`
    dots: Tensor  # [B, R+1, N], from scaled similarities to keyᵀ word
    key_norms: Tensor  # [B, R+1, 1]
    norms: Tensor  # [B, 1, N]
    new_norms: Tensor  # [B, 1, N]
    vectors: Tensor  # [B, S], from the activated interface to the raw one, but for the modes


Fields = TypeVar("Fields", Vectors, Kept, Slopes)


def _steps(fields: Fields) -> list[Fields]:
    """Cut into steps, as views."""
    return [type(fields)(*views) for views in zip(*(tensor.unbind(0) for tensor in fields), strict=True)]


class TorchMemory:
    """Steps forward and backward over one stretch of a sequence.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        kept: buffers for all steps.
        slots, word, reads: N, W, R.
        strength_offset: what raw strengths get on top of softplus: 1 for oneplus, 0 for softplus.
        stop_usage_gradient: as in `dnc_reference.memory_step`.
    """

    def __init__(
        self,
        vectors: Tensor,
        kept: Kept,
        *,
        slots: int,
        word: int,
        reads: int,
        strength_offset: float,
        stop_usage_gradient: bool,
    ) -> None:
        batch = vectors.shape[1]
        self.slots, self.word, self.reads = slots, word, reads
        self.strength_offset, self.stop_usage_gradient = strength_offset, stop_usage_gradient
        self.all_vectors, self.all_kept = Vectors.of(vectors, reads, word), kept
        self.vectors, self.kept = _steps(self.all_vectors), _steps(kept)
        self.one = vectors.new_ones(())
        self.usage_epsilon = vectors.new_full((), USAGE_EPSILON)
        self.root_norm_epsilon = vectors.new_full((), math.sqrt(NORM_EPSILON))
        self.similarity_epsilon = vectors.new_full((), SIMILARITY_EPSILON)
        # Work space, used again in every step.
        empty = vectors.new_empty
        self.row, self.head, self.heads = empty(batch, slots), empty(batch, 1, slots), empty(batch, reads, slots)
        self.words, self.three_ways = empty(batch, slots, word), empty(3, batch, reads, slots)
        self.sum = empty(batch, 1)

    def begin_forward(self) -> None:
        """Before the first step."""
        self.all_kept.exclusive_product[..., 0].fill_(1)  # of no factors

    def forward(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor, *, fresh: bool) -> None:
        """One step.

        Args:
            step: which.
            prev: the memory before it.
            new: where the memory after it goes.
            read_words: [B, R, W], where the words read go.
            fresh: `prev` is not what the step before left, so the norms of its words are not known yet.
        """
        raw, kept, one, row, reads = self.vectors[step], self.kept[step], self.one, self.row, self.reads
        torch.ops.aten.softplus.out(raw.strengths, 1, 40, out=kept.strengths)
        if self.strength_offset:
            kept.strengths.add_(self.strength_offset)
        torch.sigmoid(raw.squashed, out=kept.squashed)
        torch.softmax(raw.modes, -1, out=kept.modes)
        _, free_gates, allocation_gate, write_gate = self._gates(kept.squashed)
        prev_write_weights, write_weights = prev.write_weights.squeeze(1), new.write_weights.squeeze(1)

        # Free, and use.
        torch.addcmul(one, free_gates.unsqueeze(-1), prev.read_weights, value=-1, out=kept.factors)
        torch.prod(kept.factors, 1, out=kept.retention)
        torch.lerp(prev.usage, one, prev_write_weights, out=kept.written)
        torch.mul(kept.written, kept.retention, out=new.usage)

        # Allocate. What is sorted is 1 − u, as in `sort_usage`; sorted it is a factor of the allocation too.
        torch.add(self.usage_epsilon, new.usage, alpha=1 - USAGE_EPSILON, out=row)
        sorted_free, free_list = torch.sort(one - row, dim=-1, descending=True, stable=True)
        kept.free_list.copy_(free_list)
        torch.gather(row, -1, free_list, out=kept.sorted_usage)
        torch.cumprod(kept.sorted_usage[:, :-1], -1, out=kept.exclusive_product[:, 1:])
        torch.mul(sorted_free, kept.exclusive_product, out=kept.sorted_allocation)
        allocation, write_content = kept.candidates.unbind(1)
        allocation.scatter_(-1, free_list, kept.sorted_allocation)

        # Write.
        torch.linalg.vector_norm(raw.keys, dim=-1, out=kept.key_norms)
        torch.hypot(kept.key_norms, self.root_norm_epsilon, out=kept.key_norms)
        if fresh or step == 0:
            self._norm(prev.memory, kept.norms)
        else:
            kept.norms.copy_(self.kept[step - 1].new_norms)
        self._look_up(
            prev.memory, kept.norms, raw.keys[:, reads:], kept.key_norms[:, reads:], kept.strengths[:, reads:],
            kept.write_similarity, write_content.unsqueeze(1), self.head,
        )  # fmt: skip
        torch.lerp(write_content, allocation, allocation_gate, out=row)
        torch.mul(row, write_gate, out=write_weights)
        self._write(step, prev, new)
        self._norm(new.memory, kept.new_norms)
        torch.sum(write_weights, -1, keepdim=True, out=self.sum)
        torch.sub(one, self.sum, out=self.sum)
        torch.addcmul(write_weights, self.sum, prev.precedence.squeeze(1), out=new.precedence.squeeze(1))

        # Read.
        backward, forward, content = kept.ways.unbind(0)
        self._follow(prev, new, backward, forward)
        self._look_up(
            new.memory, kept.new_norms, raw.keys[:, :reads], kept.key_norms[:, :reads], kept.strengths[:, :reads],
            kept.read_similarity, content, self.heads,
        )  # fmt: skip
        torch.mul(kept.ways, self._by_way(kept.modes), out=self.three_ways)
        torch.sum(self.three_ways, 0, out=new.read_weights)
        torch.bmm(new.read_weights, new.memory, out=read_words)

    def replay(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """Memory and link of `new` from `prev` and the write weights of `new`, without the addressing before them."""
        self._write(step, prev, new)
        self._update_link(prev.link.squeeze(1), prev.precedence, new.write_weights, new.link.squeeze(1))

    def _write(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """M' = M − M ∘ w eᵀ + w vᵀ: of three whole matrices `addcmul` is vectorised, of a scalar, a column and a row not."""
        column = new.write_weights.mT
        erase, *_ = self._gates(self.kept[step].squashed)
        torch.mul(column, erase.unsqueeze(1), out=self.words)
        torch.addcmul(prev.memory, prev.memory, self.words, value=-1, out=new.memory)
        new.memory.addcmul_(column, self.vectors[step].write_vector)

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """Before the last step: all slopes.

        Args:
            usage, read_weights, write_weights: [T, ...], the fields of the memory before each step.
            d_vectors: [T, B, S], where the gradients by the raw interface vectors go.
        """
        kept, reads, word = self.all_kept, self.reads, self.word
        steps, batch, slots = usage.shape
        _, free_gates, allocation_gate, write_gate = self._gates(kept.squashed)
        others = product_of_others(kept.factors.flatten(0, 1)).unflatten(0, (steps, batch)).neg_()
        by_allocation = write_gate * allocation_gate
        norms = torch.cat([kept.new_norms.unsqueeze(2).expand(-1, -1, reads, -1), kept.norms.unsqueeze(2)], 2)
        products = norms.mul_(kept.key_norms.unsqueeze(-1)).add_(SIMILARITY_EPSILON)
        vectors = torch.ones_like(d_vectors)
        fields = Vectors.of(vectors, reads, word)
        torch.sigmoid(self.all_vectors.strengths, out=fields.strengths)
        torch.mul(kept.squashed, 1 - kept.squashed, out=fields.squashed)
        slopes = Slopes(
            free=others * read_weights,
            read_weights=others.mul_(free_gates.unsqueeze(-1)),
            usage=(1 - write_weights.squeeze(2)) * kept.retention,
            write_weights=(1 - usage) * kept.retention,
            candidates=torch.stack([by_allocation, write_gate - by_allocation], dim=2),
            dots=torch.div(kept.strengths.unsqueeze(-1), products, out=products),
            key_norms=kept.key_norms.reciprocal().neg_().unsqueeze(-1),
            norms=kept.norms.reciprocal().neg_().unsqueeze(2),
            new_norms=kept.new_norms.reciprocal().neg_().unsqueeze(2),
            vectors=vectors,
        )
        self.slopes, self.d_raw = _steps(slopes), _steps(Vectors.of(d_vectors, reads, word))
        self.d_vectors = d_vectors.unbind(0)

        empty = usage.new_empty
        self.other_row, self.other_heads = torch.empty_like(self.row), torch.empty_like(self.heads)
        self.square, self.linked = pool.empty((batch, slots, slots), usage), empty(batch, 3 * reads, slots)
        self.d_modes, self.d_raw_modes = empty(3, batch, reads), empty(batch, reads, 3)
        self.pair, self.d_pair = empty(batch, 2, 1), empty(batch, 2, slots)
        # A product that goes to a part of a tensor is computed row by row of the batch, so it goes here before.
        self.vector, self.head_vectors, self.gates = (
            empty(batch, 1, word),
            empty(batch, reads, word),
            empty(batch, reads, 1),
        )
        self.later = usage.new_ones(slots, slots).tril_(-1)
        self.ones = usage.new_ones(batch, 1, slots)

    def backward(
        self, step: int, prev: MemoryState, new: MemoryState, d_read_words: Tensor, d: MemoryState
    ) -> MemoryState:
        """The adjoint of one step.

        Args:
            step: which.
            prev, new: the memory before and after it.
            d_read_words: [B, R, W], gradient by the words read.
            d: gradient by `new`, which is overwritten.

        Returns:
            the gradient by `prev`; that by the interface vector goes to the `d_vectors` of `begin_backward`.
        """
        raw, kept, slopes, d_raw = self.vectors[step], self.kept[step], self.slopes[step], self.d_raw[step]
        reads, row = self.reads, self.row
        erase, _, allocation_gate, write_gate = self._gates(kept.squashed)
        d_erase, d_free_gates, d_allocation_gate, d_write_gate = self._gates(d_raw.squashed)
        erase, key_norms = erase.unsqueeze(1), kept.key_norms.unsqueeze(1)
        write_weights, precedence = new.write_weights, prev.precedence
        prev_link, new_link, d_link = prev.link.squeeze(1), new.link.squeeze(1), d.link.squeeze(1)
        d_memory, d_usage, d_read_weights = d.memory, d.usage, d.read_weights
        d_write_weights, d_precedence = d.write_weights, d.precedence  # [B, 1, N]
        d_write_column = d_write_weights.mT

        # read
        d_memory.baddbmm_(new.read_weights.mT, d_read_words)
        d_read_weights.baddbmm_(d_read_words, new.memory.mT)
        torch.mul(kept.ways, d_read_weights, out=self.three_ways)
        torch.sum(self.three_ways, -1, out=self.d_modes)
        # Its `grad_input` must be contiguous.
        d_modes = self.d_modes.permute(1, 2, 0)
        _softmax_backward(d_modes, kept.modes, -1, d_modes.dtype, grad_input=self.d_raw_modes)
        d_raw.modes.copy_(self.d_raw_modes)
        # Both gradients by the link are products of parts of [df | wʳ | db].
        d_forward, linked_read_weights, d_backward = self.linked.split(reads, 1)
        by_backward, by_forward, by_content = self._by_way(kept.modes).unbind(0)
        torch.mul(d_read_weights, by_forward, out=d_forward)
        linked_read_weights.copy_(prev.read_weights)
        torch.mul(d_read_weights, by_backward, out=d_backward)
        torch.mul(d_read_weights, by_content, out=self.heads)
        self._look_up_backward(
            self.heads, kept.ways[2], kept.read_similarity, slopes.dots[:, :reads],
            new.memory, kept.new_norms, slopes.new_norms,
            raw.keys[:, :reads], key_norms[..., :reads], slopes.key_norms[:, :reads],
            d_memory, d_raw.keys[:, :reads], d_raw.strengths[:, :reads], self.other_heads, self.head_vectors,
        )  # fmt: skip

        # link
        d_write_weights.add_(d_precedence).sub_(torch.bmm(d_precedence, precedence.mT))
        d_precedence.mul_(1 - write_weights.sum(-1, keepdim=True))
        self._link_backward(
            prev_link, new_link, precedence, write_weights, d_link, d_read_weights, d_write_weights, d_precedence
        )

        # write
        d_raw.write_vector.copy_(torch.bmm(write_weights, d_memory, out=self.vector))
        d_write_weights.baddbmm_(raw.write_vector, d_memory.mT)
        torch.mul(d_memory, prev.memory, out=self.words)
        d_write_weights.baddbmm_(erase, self.words.mT, alpha=-1)
        torch.neg(torch.bmm(write_weights, self.words, out=self.vector), out=d_erase.unsqueeze(1))
        d_memory.addcmul_(d_memory, torch.mul(write_weights.mT, erase, out=self.words), value=-1)
        torch.bmm(kept.candidates, d_write_column, out=self.pair)
        by_allocation, by_content = self.pair.unbind(1)
        torch.mul(by_allocation - by_content, write_gate, out=d_allocation_gate)
        torch.lerp(by_content, by_allocation, allocation_gate, out=d_write_gate)
        torch.mul(d_write_weights, slopes.candidates, out=self.d_pair)
        self._look_up_backward(
            self.d_pair[:, 1:], kept.candidates[:, 1:], kept.write_similarity, slopes.dots[:, reads:],
            prev.memory, kept.norms, slopes.norms,
            raw.keys[:, reads:], key_norms[..., reads:], slopes.key_norms[:, reads:],
            d_memory, d_raw.keys[:, reads:], d_raw.strengths[:, reads:], self.head, self.vector,
        )  # fmt: skip

        # allocate and free
        d_sorted = torch.gather(self.d_pair[:, 0], -1, kept.free_list)
        torch.mul(d_sorted, kept.sorted_allocation, out=row)
        later = self._sum_of_later(row).div_(kept.sorted_usage)
        later.addcmul_(d_sorted, kept.exclusive_product, value=-1)
        d_usage.add_(row.scatter_(-1, kept.free_list, later), alpha=1 - USAGE_EPSILON)
        d_retention = torch.mul(d_usage, kept.written, out=row)
        if self.stop_usage_gradient:
            d_write_weights.zero_()
        else:
            torch.mul(d_usage, slopes.write_weights, out=d_write_weights.squeeze(1))
        d_usage.mul_(slopes.usage)
        d_free_gates.unsqueeze(-1).copy_(torch.bmm(slopes.free, d_retention.unsqueeze(-1), out=self.gates))
        d_read_weights.addcmul_(d_retention.unsqueeze(1), slopes.read_weights)
        self.d_vectors[step].mul_(slopes.vectors)
        return d

    def _follow(self, prev: MemoryState, new: MemoryState, backward: Tensor, forward: Tensor) -> None:
        """Sets the link of `new` and the backward and forward weights [B, R, N]."""
        link = new.link.squeeze(1)
        self._update_link(prev.link.squeeze(1), prev.precedence, new.write_weights, link)
        torch.bmm(prev.read_weights, link, out=backward)
        torch.bmm(prev.read_weights, link.mT, out=forward)

    def _update_link(self, prev_link: Tensor, precedence: Tensor, write_weights: Tensor, link: Tensor) -> None:
        """L'[i,j] = L + w[i] (p[j] − L) − w[j] L, in two passes over L. Sets `link` [B, N, N]; rows are [B, 1, N]."""
        torch.lerp(prev_link, precedence, write_weights.mT, out=link)
        link.addcmul_(prev_link, write_weights, value=-1)
        link.diagonal(dim1=-2, dim2=-1).zero_()

    def _link_backward(
        self,
        prev_link: Tensor,
        new_link: Tensor,
        precedence: Tensor,
        write_weights: Tensor,
        d_link: Tensor,
        d_read_weights: Tensor,
        d_write_weights: Tensor,
        d_precedence: Tensor,
    ) -> None:
        """The adjoint of what is read from the new link, by way of `linked`, and of `_update_link`.

        Sets `d_read_weights` [B, R, N], adds to `d_write_weights` and `d_precedence` [B, 1, N], overwrites `d_link`
        [B, N, N] with the gradient by the link before.
        """
        reads, square = self.reads, self.square
        d_forward, _, d_backward = self.linked.split(reads, 1)
        # A row times a matrix is twice as fast as a matrix times a column.
        d_link.baddbmm_(self.linked[:, : 2 * reads].mT, self.linked[:, reads:])
        d_link.diagonal(dim1=-2, dim2=-1).zero_()
        torch.bmm(d_forward, new_link, out=d_read_weights)
        d_read_weights.baddbmm_(d_backward, new_link.mT)
        d_write_weights.baddbmm_(precedence, d_link.mT)
        torch.mul(d_link, prev_link, out=square)
        d_write_weights.baddbmm_(self.ones, square, alpha=-1).baddbmm_(self.ones, square.mT, alpha=-1)
        d_precedence.baddbmm_(write_weights, d_link)
        torch.sub((1 - write_weights).mT, write_weights, out=square)
        d_link.mul_(square)

    def _sum_of_later(self, row: Tensor) -> Tensor:
        """Of each entry in [B, N] the sum of those after it."""
        return torch.mm(row, self.later, out=self.other_row)

    def _gates(self, squashed: Tensor) -> tuple[Tensor, ...]:
        """Erase vector [..., W], free gates [..., R], allocation gate and write gate [..., 1]."""
        return squashed.split([self.word, self.reads, 1, 1], dim=-1)

    @staticmethod
    def _by_way(modes: Tensor) -> Tensor:
        """The read modes [B, R, 3] as [3, B, R, 1], for `Kept.ways`."""
        return modes.permute(2, 0, 1).unsqueeze(-1)

    def _norm(self, memory: Tensor, norms: Tensor) -> None:
        torch.linalg.vector_norm(memory, dim=-1, out=norms)
        torch.hypot(norms, self.root_norm_epsilon, out=norms)

    def _look_up(
        self,
        memory: Tensor,
        norms: Tensor,
        keys: Tensor,
        key_norms: Tensor,
        strengths: Tensor,
        similarity: Tensor,
        content: Tensor,
        work: Tensor,
    ) -> None:
        """Sets `similarity` and `content` [B, H, N] for keys [B, H, W]; `work` is as large."""
        torch.addcmul(self.similarity_epsilon, key_norms.unsqueeze(-1), norms.unsqueeze(1), out=work)
        torch.bmm(keys, memory.mT, out=similarity)
        similarity.div_(work)
        torch.mul(similarity, strengths.unsqueeze(-1), out=work)
        torch.softmax(work, -1, out=content)

    @staticmethod
    def _look_up_backward(
        d_content: Tensor,
        content: Tensor,
        similarity: Tensor,
        by_dots: Tensor,
        memory: Tensor,
        norms: Tensor,
        by_norms: Tensor,
        keys: Tensor,
        key_norms: Tensor,
        by_key_norms: Tensor,
        d_memory: Tensor,
        d_keys: Tensor,
        d_strengths: Tensor,
        work: Tensor,
        work_keys: Tensor,
    ) -> None:
        """The adjoint: adds to `d_memory`, sets `d_keys` and `d_strengths`, overwrites `d_content`. See `Slopes`."""
        d_scaled = _softmax_backward(d_content, content, -1, content.dtype, grad_input=work)
        torch.sum(torch.mul(d_scaled, similarity, out=d_content), -1, out=d_strengths)
        d_dot = d_scaled.mul_(by_dots)
        d_norms = torch.mul(d_dot, similarity, out=d_content)  # of the products of norms, but for the sign
        torch.bmm(d_dot, memory, out=work_keys)
        torch.addcmul(work_keys, torch.bmm(d_norms, norms.unsqueeze(-1)).mul_(by_key_norms), keys, out=d_keys)
        d_memory.baddbmm_(d_dot.mT, keys)
        d_memory.addcmul_(torch.bmm(key_norms, d_norms).mul_(by_norms).mT, memory)
