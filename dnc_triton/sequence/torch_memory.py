"""The memory's part of a sequence in plain PyTorch: the equations of a step and their adjoints, written out for speed.

The same equations in the same order as `dnc_reference.memory` and `dnc_reference.backward`, where each is explained.
Here every result goes to a buffer that was made once for the whole sequence, what depends on the forward alone is
computed for all steps at once before the backward starts, and autograd records nothing. K = 1.

Letters in every shape: T steps, B batch, N memory slots, W word size, R read heads, S the size of an interface vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnc_reference.addressing import NORM_EPSILON, SIMILARITY_EPSILON, USAGE_EPSILON
from dnc_reference.backward import product_of_others
from dnc_reference.types import MemoryState
from dnc_triton.sequence import pool
from dnc_triton.sequence.kept import Gates, Kept, LookUp, LookUpBackward, Slopes, Vectors, Views, by_step

_softmax_backward = torch._softmax_backward_data


class TorchMemory:
    """Steps forward and backward over one stretch of a sequence.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        kept: buffers for all steps.
        slots, word, reads: N, W, R.
        strength_offset: what is added to the softplus of raw strengths: 1 for oneplus, 0 for softplus.
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
        self.word, self.reads = word, reads
        self.strength_offset, self.stop_usage_gradient = strength_offset, stop_usage_gradient
        self.all_vectors, self.all_kept = Vectors.of(vectors, reads, word), kept
        self.all_gates = Gates.of(kept.squashed, reads, word)
        self.vectors, self.kept, self.gates = by_step(self.all_vectors), by_step(kept), by_step(self.all_gates)
        self.views = by_step(Views.of(kept))
        self.read_heads, self.write_head = slice(reads), slice(reads, None)
        keys, content = self.all_vectors.keys, kept.candidates[:, :, 1:]
        written = LookUp.of(self.write_head, kept.norms, kept.write_similarity, content, keys, kept)
        read = LookUp.of(self.read_heads, kept.new_norms, kept.read_similarity, kept.ways[:, 2], keys, kept)
        self.write_look_ups, self.read_look_ups = by_step(written), by_step(read)
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
        raw, kept, views, gates = self.vectors[step], self.kept[step], self.views[step], self.gates[step]
        one, row = self.one, self.row
        torch.ops.aten.softplus.out(raw.strengths, 1, 40, out=kept.strengths)
        if self.strength_offset:
            kept.strengths.add_(self.strength_offset)
        torch.sigmoid(raw.squashed, out=kept.squashed)
        torch.softmax(raw.modes, -1, out=kept.modes)
        prev_write_weights, write_weights = prev.write_weights.squeeze(1), new.write_weights.squeeze(1)

        # Free, and use.
        torch.addcmul(one, gates.free, prev.read_weights, value=-1, out=kept.factors)
        torch.prod(kept.factors, 1, out=kept.retention)
        torch.lerp(prev.usage, one, prev_write_weights, out=kept.written)
        torch.mul(kept.written, kept.retention, out=new.usage)

        # Allocate. What is sorted is 1 − u, as in `sort_usage`; sorted it is a factor of the allocation too.
        torch.add(self.usage_epsilon, new.usage, alpha=1 - USAGE_EPSILON, out=row)
        sorted_free, free_list = torch.sort(one - row, dim=-1, descending=True, stable=True)
        kept.free_list.copy_(free_list)
        torch.gather(row, -1, free_list, out=kept.sorted_usage)
        torch.cumprod(views.usage_but_last, -1, out=views.product_but_first)
        torch.mul(sorted_free, kept.exclusive_product, out=kept.sorted_allocation)
        views.allocation.scatter_(-1, free_list, kept.sorted_allocation)

        # Write.
        torch.linalg.vector_norm(raw.keys, dim=-1, out=kept.key_norms)
        torch.hypot(kept.key_norms, self.root_norm_epsilon, out=kept.key_norms)
        if fresh or step == 0:
            self._norm(prev.memory, kept.norms)
        else:
            kept.norms.copy_(self.kept[step - 1].new_norms)
        look_up = self.write_look_ups[step]
        self._look_up(prev.memory, look_up, self.head)
        torch.lerp(look_up.content.squeeze(1), views.allocation, gates.allocation, out=row)
        torch.mul(row, gates.write, out=write_weights)
        self._write(step, prev, new)
        self._norm(new.memory, kept.new_norms)
        torch.sum(write_weights, -1, keepdim=True, out=self.sum)
        torch.sub(one, self.sum, out=self.sum)
        torch.addcmul(write_weights, self.sum, prev.precedence.squeeze(1), out=new.precedence.squeeze(1))

        # Read.
        self._follow(prev, new, views.backward, views.forward)
        self._look_up(new.memory, self.read_look_ups[step], self.heads)
        torch.mul(kept.ways, views.by_way, out=self.three_ways)
        torch.sum(self.three_ways, 0, out=new.read_weights)
        torch.bmm(new.read_weights, new.memory, out=read_words)

    def replay(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """Memory and link of `new` from `prev` and the write weights of `new`, without the addressing before them."""
        self._write(step, prev, new)
        self._update_link(prev.link.squeeze(1), prev.precedence, new.write_weights, new.link.squeeze(1))

    def _write(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """M' = M − M ∘ w eᵀ + w vᵀ. `addcmul` is vectorised for three matrices, not for 1, a column and a row."""
        column = new.write_weights.mT
        torch.mul(column, self.gates[step].erase, out=self.words)
        torch.addcmul(prev.memory, prev.memory, self.words, value=-1, out=new.memory)
        new.memory.addcmul_(column, self.vectors[step].write_vector)

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """Before the last step's adjoint: all slopes.

        Args:
            usage, read_weights, write_weights: [T, ...], the fields of the memory before each step.
            d_vectors: [T, B, S], where the gradients of the raw interface vectors go.
        """
        kept, gates, reads, word = self.all_kept, self.all_gates, self.reads, self.word
        steps, batch, slots = usage.shape
        others = product_of_others(kept.factors.flatten(0, 1)).unflatten(0, (steps, batch)).neg_()
        by_allocation = gates.write * gates.allocation
        norms = torch.cat([kept.new_norms.unsqueeze(2).expand(-1, -1, reads, -1), kept.norms.unsqueeze(2)], 2)
        products = norms.mul_(kept.key_norms.unsqueeze(-1)).add_(SIMILARITY_EPSILON)
        vectors = torch.ones_like(d_vectors)
        fields = Vectors.of(vectors, reads, word)
        torch.sigmoid(self.all_vectors.strengths, out=fields.strengths)
        torch.mul(kept.squashed, 1 - kept.squashed, out=fields.squashed)
        slopes = Slopes(
            free=others * read_weights,
            read_weights=others.mul_(gates.free),
            usage=(1 - write_weights.squeeze(2)) * kept.retention,
            write_weights=(1 - usage) * kept.retention,
            candidates=torch.stack([by_allocation, gates.write - by_allocation], dim=2),
            vectors=vectors,
        )
        dots = torch.div(kept.strengths.unsqueeze(-1), products, out=products)
        by_key_norms, by_norms, by_new_norms = (
            norms.reciprocal().neg_() for norms in (kept.key_norms, kept.norms, kept.new_norms)
        )
        d_raw = Vectors.of(d_vectors, reads, word)
        self.slopes, self.d_raw, self.d_vectors = by_step(slopes), by_step(d_raw), d_vectors.unbind(0)
        self.d_gates = by_step(Gates.of(d_raw.squashed, reads, word))
        self.write_look_ups_backward, self.read_look_ups_backward = (
            by_step(
                LookUpBackward(
                    dots[:, :, heads],
                    by_key_norms[..., heads].unsqueeze(-1),
                    norms.unsqueeze(-2),
                    d_raw.keys[:, :, heads],
                    d_raw.strengths[..., heads],
                )
            )
            for heads, norms in ((self.write_head, by_norms), (self.read_heads, by_new_norms))
        )

        empty = usage.new_empty
        self.other_row, self.other_heads = torch.empty_like(self.row), torch.empty_like(self.heads)
        self.square = pool.empty((batch, slots, slots), usage)
        # Both parts that reading adds to the link's gradient are products of parts of [df | wʳ | db].
        self.linked = empty(batch, 3 * reads, slots)
        self.d_forward, self.linked_read_weights, self.d_backward = self.linked.split(reads, 1)
        self.linked_left, self.linked_right = self.linked[:, : 2 * reads].mT, self.linked[:, reads:]
        d_modes, self.d_raw_modes = empty(3, batch, reads), empty(batch, reads, 3)
        self.d_modes_by_way, self.d_modes = d_modes, d_modes.permute(1, 2, 0)
        self.pair, self.d_pair = empty(batch, 2, 1), empty(batch, 2, slots)
        self.by_allocation, self.by_content = self.pair.unbind(1)
        self.d_allocation, self.d_write_content = self.d_pair[:, 0], self.d_pair[:, 1:]
        # A product written to part of a tensor would be computed row by row of the batch, so it goes here first.
        self.vector, self.head_vectors, self.by_head = (
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
            d_read_words: [B, R, W], gradient of the words read.
            d: gradient of `new`, which is overwritten.

        Returns:
            the gradient of `prev`; that of the interface vector goes to the `d_vectors` of `begin_backward`.
        """
        raw, kept, slopes, d_raw = self.vectors[step], self.kept[step], self.slopes[step], self.d_raw[step]
        gates, d_gates, row = self.gates[step], self.d_gates[step], self.row
        write_weights, precedence = new.write_weights, prev.precedence
        prev_link, new_link, d_link = prev.link.squeeze(1), new.link.squeeze(1), d.link.squeeze(1)
        d_memory, d_usage, d_read_weights = d.memory, d.usage, d.read_weights
        d_write_weights, d_precedence = d.write_weights, d.precedence  # [B, 1, N]
        d_write_column = d_write_weights.mT

        # read
        d_memory.baddbmm_(new.read_weights.mT, d_read_words)
        d_read_weights.baddbmm_(d_read_words, new.memory.mT)
        torch.mul(kept.ways, d_read_weights, out=self.three_ways)
        torch.sum(self.three_ways, -1, out=self.d_modes_by_way)
        # Its `grad_input` must be contiguous.
        _softmax_backward(self.d_modes, kept.modes, -1, kept.modes.dtype, grad_input=self.d_raw_modes)
        d_raw.modes.copy_(self.d_raw_modes)
        by_backward, by_forward, by_content = self.views[step].by_way.unbind(0)
        torch.mul(d_read_weights, by_forward, out=self.d_forward)
        self.linked_read_weights.copy_(prev.read_weights)
        torch.mul(d_read_weights, by_backward, out=self.d_backward)
        torch.mul(d_read_weights, by_content, out=self.heads)
        look_up = self.read_look_ups[step], self.read_look_ups_backward[step]
        self._look_up_backward(self.heads, new.memory, *look_up, d_memory, self.other_heads, self.head_vectors)

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
        d_write_weights.baddbmm_(gates.erase, self.words.mT, alpha=-1)
        torch.neg(torch.bmm(write_weights, self.words, out=self.vector), out=d_gates.erase)
        d_memory.addcmul_(d_memory, torch.mul(write_weights.mT, gates.erase, out=self.words), value=-1)
        torch.bmm(kept.candidates, d_write_column, out=self.pair)
        torch.mul(self.by_allocation - self.by_content, gates.write, out=d_gates.allocation)
        torch.lerp(self.by_content, self.by_allocation, gates.allocation, out=d_gates.write)
        torch.mul(d_write_weights, slopes.candidates, out=self.d_pair)
        look_up = self.write_look_ups[step], self.write_look_ups_backward[step]
        self._look_up_backward(self.d_write_content, prev.memory, *look_up, d_memory, self.head, self.vector)

        # allocate and free
        d_sorted = torch.gather(self.d_allocation, -1, kept.free_list)
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
        d_gates.free.copy_(torch.bmm(slopes.free, d_retention.unsqueeze(-1), out=self.by_head))
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
        """The adjoint of what is read from the new link, from what is in `linked`, and of `_update_link`.

        Sets `d_read_weights` [B, R, N], adds to `d_write_weights` and `d_precedence` [B, 1, N], overwrites `d_link`
        [B, N, N] with the gradient of the link before.
        """
        square = self.square
        # A row times a matrix is twice as fast as a matrix times a column.
        d_link.baddbmm_(self.linked_left, self.linked_right)
        d_link.diagonal(dim1=-2, dim2=-1).zero_()
        torch.bmm(self.d_forward, new_link, out=d_read_weights)
        d_read_weights.baddbmm_(self.d_backward, new_link.mT)
        d_write_weights.baddbmm_(precedence, d_link.mT)
        torch.mul(d_link, prev_link, out=square)
        d_write_weights.baddbmm_(self.ones, square, alpha=-1).baddbmm_(self.ones, square.mT, alpha=-1)
        d_precedence.baddbmm_(write_weights, d_link)
        torch.sub((1 - write_weights).mT, write_weights, out=square)
        d_link.mul_(square)

    def _sum_of_later(self, row: Tensor) -> Tensor:
        """For each entry of [B, N] the sum of those after it."""
        return torch.mm(row, self.later, out=self.other_row)

    def _norm(self, memory: Tensor, norms: Tensor) -> None:
        torch.linalg.vector_norm(memory, dim=-1, out=norms)
        torch.hypot(norms, self.root_norm_epsilon, out=norms)

    def _look_up(self, memory: Tensor, look_up: LookUp, work: Tensor) -> None:
        """Sets similarity and content of a look-up; `work` is as large as these."""
        torch.addcmul(self.similarity_epsilon, look_up.key_norms.mT, look_up.norms, out=work)
        torch.bmm(look_up.keys, memory.mT, out=look_up.similarity)
        look_up.similarity.div_(work)
        torch.mul(look_up.similarity, look_up.strengths, out=work)
        torch.softmax(work, -1, out=look_up.content)

    @staticmethod
    def _look_up_backward(
        d_content: Tensor,
        memory: Tensor,
        look_up: LookUp,
        back: LookUpBackward,
        d_memory: Tensor,
        work: Tensor,
        work_keys: Tensor,
    ) -> None:
        """The adjoint: adds to `d_memory`, sets the gradients of `back`, overwrites `d_content`."""
        d_scaled = _softmax_backward(d_content, look_up.content, -1, d_content.dtype, grad_input=work)
        torch.sum(torch.mul(d_scaled, look_up.similarity, out=d_content), -1, out=back.d_strengths)
        d_dot = d_scaled.mul_(back.dots)
        d_norms = torch.mul(d_dot, look_up.similarity, out=d_content)  # of the products of norms, but for the sign
        torch.bmm(d_dot, memory, out=work_keys)
        d_key_norms = torch.bmm(d_norms, look_up.norms.mT).mul_(back.key_norms)
        torch.addcmul(work_keys, d_key_norms, look_up.keys, out=back.d_keys)
        d_memory.baddbmm_(d_dot.mT, look_up.keys)
        d_memory.addcmul_(torch.bmm(look_up.key_norms, d_norms).mul_(back.norms).mT, memory)
