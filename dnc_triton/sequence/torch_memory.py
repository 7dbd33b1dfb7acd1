"""The memory's part of a sequence in plain PyTorch: the equations of a step and their adjoints, written out for speed.

The same equations in the same order as `dnc_reference.memory` and `dnc_reference.backward`, where each is explained; here
every result goes to a buffer that was made once for the whole sequence, what depends on the forward alone is computed
for all steps at once before the backward starts, and no autograd keeps count. K = 1.

Letters in every shape: T steps, B batch, N memory slots, W word size, R read heads, S the size of an interface vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnc_reference.addressing import NORM_EPSILON, SIMILARITY_EPSILON, USAGE_EPSILON
from dnc_reference.backward import _product_of_others
from dnc_reference.interface import interface_sizes
from dnc_reference.types import MemoryState

_softmax_backward = torch.ops.aten._softmax_backward_data.out


class _Fields:
    """The fields of the interface vectors of all steps, each a list with a view per step."""

    def __init__(self, vectors: Tensor, reads: int, word: int) -> None:
        sizes = list(interface_sizes(reads, 1, word).values())
        keys, write_vectors, strengths, squashed, modes = vectors.split(
            [sum(sizes[:2]), sizes[2], sum(sizes[3:5]), sum(sizes[5:9]), sizes[9]], dim=-1
        )
        self.all_strengths, self.all_squashed = strengths, squashed
        self.keys = keys.unflatten(-1, (reads + 1, word)).unbind(0)  # [B, R+1, W], the write key last
        self.write_vectors = write_vectors.unsqueeze(-2).unbind(0)  # [B, 1, W]
        self.strengths = strengths.unbind(0)  # [B, R+1]
        self.squashed = squashed.unbind(0)  # [B, W+R+2]: erase vector, free gates, allocation gate, write gate
        self.modes = modes.unflatten(-1, (reads, 3)).unbind(0)  # [B, R, 3]


class TorchMemory:
    """Steps forward and backward over one stretch of a sequence.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        slots, word, reads: N, W, R.
        strength_offset: what raw strengths get on top of softplus: 1 for oneplus, 0 for softplus.
        stop_usage_gradient: as in `dnc_reference.memory_step`.
        kept: a buffer [T, ...] for each of `kept_shapes`.
    """

    @staticmethod
    def kept_shapes(batch: int, slots: int, word: int, reads: int) -> dict[str, tuple[int, ...]]:
        """What a step leaves for its backward. All in the dtype of the vectors, but `free_list`, which is int64."""
        return {
            "strengths": (batch, reads + 1),
            "squashed": (batch, word + reads + 2),
            "modes": (batch, reads, 3),
            "factors": (batch, reads, slots),  # of retention
            "retention": (batch, slots),
            "written": (batch, slots),  # usage before anything is freed
            "free_list": (batch, slots),
            "sorted_usage": (batch, slots),
            "product": (batch, slots),  # exclusive
            "sorted_allocation": (batch, slots),
            "candidates": (batch, 2, slots),  # where to write: allocation, content
            "key_norms": (batch, reads + 1),
            "norms": (batch, slots),  # of the words before the step
            "new_norms": (batch, slots),
            "write_similarity": (batch, 1, slots),
            "read_similarity": (batch, reads, slots),
            "ways": (3, batch, reads, slots),  # where to read: backward, forward, content
        }

    def __init__(
        self,
        vectors: Tensor,
        *,
        slots: int,
        word: int,
        reads: int,
        strength_offset: float,
        stop_usage_gradient: bool,
        kept: list[Tensor],
    ) -> None:
        batch = vectors.shape[1]
        self.word, self.reads = word, reads
        self.strength_offset, self.stop_usage_gradient = strength_offset, stop_usage_gradient
        self.raw = _Fields(vectors, reads, word)
        everything = self.all = dict(zip(self.kept_shapes(batch, slots, word, reads), kept, strict=True))
        for name, tensor in everything.items():
            setattr(self, name, tensor.unbind(0))
        erase, free, allocation_gate, write_gate = everything["squashed"].split([word, reads, 1, 1], dim=-1)
        self.erase = erase.unsqueeze(-2).unbind(0)  # [B, 1, W]
        self.free = free.unsqueeze(-1).unbind(0)  # [B, R, 1]
        self.allocation_gate, self.write_gate = allocation_gate.unbind(0), write_gate.unbind(0)  # [B, 1]
        # [3, B, R, 1]: a weight for each of `ways`. The interface has them as backward, forward, content too.
        self.way_weights = everything["modes"].permute(0, 3, 1, 2).unsqueeze(-1).unbind(0)

        def empty(*shape: int) -> Tensor:
            return vectors.new_empty(shape)

        self.one = vectors.new_ones(())
        self.usage_epsilon = vectors.new_full((), USAGE_EPSILON)
        self.root_norm_epsilon = vectors.new_full((), math.sqrt(NORM_EPSILON))
        self.similarity_epsilon = vectors.new_full((), SIMILARITY_EPSILON)
        # Used again in every step.
        self.row, self.other_row = empty(batch, slots), empty(batch, slots)
        self.column, self.lookup = empty(batch, slots, 1), empty(batch, 1, slots)
        self.heads, self.three_ways = empty(batch, reads, slots), empty(3, batch, reads, slots)
        self.words = empty(batch, slots, word)
        self.sum = empty(batch, 1)

    def begin_forward(self) -> None:
        """Before the first step."""
        self.all["product"][..., 0] = 1  # of no factors

    def forward(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor, *, fresh: bool) -> None:
        """One step.

        Args:
            step: which.
            prev: the memory before it.
            new: where the memory after it goes.
            read_words: [B, R, W], where the words read go.
            fresh: `prev` is not what the step before left, so the norms of its words are not known yet.
        """
        t, raw, one, rows, reads = step, self.raw, self.one, self.row, self.reads
        strengths = self.strengths[t]
        torch._C._nn.softplus(raw.strengths[t], 1, 40, out=strengths)
        if self.strength_offset:
            strengths.add_(self.strength_offset)
        torch.sigmoid(raw.squashed[t], out=self.squashed[t])
        torch.softmax(raw.modes[t], -1, out=self.modes[t])

        prev_write_weights, write_weights = prev.write_weights.squeeze(1), new.write_weights.squeeze(1)
        torch.addcmul(one, self.free[t], prev.read_weights, value=-1, out=self.factors[t])
        torch.prod(self.factors[t], 1, out=self.retention[t])
        torch.lerp(prev.usage, one, prev_write_weights, out=self.written[t])
        torch.mul(self.written[t], self.retention[t], out=new.usage)

        # Allocation. What is sorted is 1 − u, as `sort_usage` has it; sorted it is also the first factor.
        torch.add(self.usage_epsilon, new.usage, alpha=1 - USAGE_EPSILON, out=rows)
        free, free_list = torch.sort(one - rows, dim=-1, descending=True, stable=True)
        self.free_list[t].copy_(free_list)
        torch.gather(rows, -1, free_list, out=self.sorted_usage[t])
        torch.cumprod(self.sorted_usage[t][:, :-1], -1, out=self.product[t][:, 1:])
        torch.mul(free, self.product[t], out=self.sorted_allocation[t])
        candidates = self.candidates[t]
        allocation, write_content = candidates[:, 0], candidates[:, 1]
        allocation.scatter_(-1, free_list, self.sorted_allocation[t])

        # Look up where to write.
        keys, key_norms = raw.keys[t], self.key_norms[t]
        torch.linalg.vector_norm(keys, dim=-1, out=key_norms)
        torch.hypot(key_norms, self.root_norm_epsilon, out=key_norms)
        if fresh or t == 0:
            self._norm(prev.memory, self.norms[t])
        else:
            self.norms[t].copy_(self.new_norms[t - 1])
        self._look_up(
            prev.memory, keys[:, reads:], key_norms[:, reads:], self.norms[t], strengths[:, reads:],
            self.lookup, self.write_similarity[t], write_content.unsqueeze(1),
        )  # fmt: skip
        torch.lerp(write_content, allocation, self.allocation_gate[t], out=rows)
        torch.mul(rows, self.write_gate[t], out=write_weights)

        self.replay(step, prev, new)
        self._norm(new.memory, self.new_norms[t])
        torch.sum(write_weights, -1, keepdim=True, out=self.sum)
        torch.sub(one, self.sum, out=self.sum)
        torch.addcmul(write_weights, self.sum, prev.precedence.squeeze(1), out=new.precedence.squeeze(1))

        ways = self.ways[t]
        link = new.link.squeeze(1)
        torch.bmm(prev.read_weights, link, out=ways[0])
        torch.bmm(prev.read_weights, link.mT, out=ways[1])
        self._look_up(
            new.memory, keys[:, :reads], key_norms[:, :reads], self.new_norms[t], strengths[:, :reads],
            self.heads, self.read_similarity[t], ways[2],
        )  # fmt: skip
        torch.mul(ways, self.way_weights[t], out=self.three_ways)
        torch.sum(self.three_ways, 0, out=new.read_weights)
        torch.bmm(new.read_weights, new.memory, out=read_words)

    def replay(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """Memory and link of `new` from `prev` and the write weights of `new`, without the addressing before them.

        M' = M ∘ (1 − w eᵀ) + w vᵀ;  L'[i,j] = L + w[i] (p[j] − L) − w[j] L, in two passes over L.
        """
        column = new.write_weights.mT
        torch.addcmul(self.one, column, self.erase[step], value=-1, out=self.words)
        torch.mul(prev.memory, self.words, out=new.memory)
        new.memory.addcmul_(column, self.raw.write_vectors[step])

        prev_link, link = prev.link.squeeze(1), new.link.squeeze(1)
        torch.lerp(prev_link, prev.precedence, column, out=link)
        link.addcmul_(prev_link, new.write_weights, value=-1)
        link.diagonal(dim1=-2, dim2=-1).zero_()

    def _norm(self, memory: Tensor, norms: Tensor) -> None:
        torch.linalg.vector_norm(memory, dim=-1, out=norms)
        torch.hypot(norms, self.root_norm_epsilon, out=norms)

    def _look_up(
        self,
        memory: Tensor,
        keys: Tensor,
        key_norms: Tensor,
        norms: Tensor,
        strengths: Tensor,
        work: Tensor,
        similarity: Tensor,
        content: Tensor,
    ) -> None:
        """Similarity and softmax of [B, H] keys; `work` is as large as either."""
        torch.addcmul(self.similarity_epsilon, key_norms.unsqueeze(-1), norms.unsqueeze(1), out=work)
        torch.bmm(keys, memory.mT, out=similarity)
        similarity.div_(work)
        torch.mul(similarity, strengths.unsqueeze(-1), out=work)
        torch.softmax(work, -1, out=content)

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """What the adjoints need that depends on the forward alone, for all steps at once.

        Args:
            usage, read_weights, write_weights: [T, ...], the fields of the memory before each step.
            d_vectors: [T, B, S], where the gradients by the raw interface vectors go.
        """
        kept, reads, word = self.all, self.reads, self.word
        steps, batch, slots = usage.shape
        others = _product_of_others(kept["factors"].flatten(0, 1)).unflatten(0, (steps, batch)).neg_()
        self.d_free_by = (others * read_weights).unbind(0)
        self.d_freed_by = others.mul_(kept["squashed"][..., word : word + reads].unsqueeze(-1)).unbind(0)
        self.d_usage_by = ((1 - write_weights.squeeze(2)) * kept["retention"]).unbind(0)
        self.d_written_by = ((1 - usage) * kept["retention"]).unbind(0)

        gate_a, gate_w = kept["squashed"][..., -2:-1], kept["squashed"][..., -1:]
        self.d_candidates_by = torch.stack([gate_w * gate_a, gate_w * (1 - gate_a)], dim=2).unbind(0)  # [B, 2, 1]
        norms = torch.cat([kept["new_norms"].unsqueeze(2).expand(-1, -1, reads, -1), kept["norms"].unsqueeze(2)], 2)
        products = kept["key_norms"].unsqueeze(-1) * norms + SIMILARITY_EPSILON
        self.d_dot_by = (kept["strengths"].unsqueeze(-1) / products).unbind(0)  # [B, R+1, N]
        self.d_key_norm_by = kept["key_norms"].reciprocal().neg_().unsqueeze(-1).unbind(0)  # [B, R+1, 1]
        self.d_norm_by = kept["norms"].reciprocal().neg_().unsqueeze(2).unbind(0)  # [B, 1, N]
        self.d_new_norm_by = kept["new_norms"].reciprocal().neg_().unsqueeze(2).unbind(0)

        # By which the gradient of the activated interface becomes that of the raw one; the modes come as they are.
        slopes = torch.ones_like(d_vectors)
        fields = _Fields(slopes, reads, word)
        torch.sigmoid(self.raw.all_strengths, out=fields.all_strengths)
        torch.mul(kept["squashed"], 1 - kept["squashed"], out=fields.all_squashed)
        self.slopes, self.d_vectors, self.d_raw = slopes.unbind(0), d_vectors.unbind(0), _Fields(d_vectors, reads, word)
        d_erase, d_free, d_gates = self.d_raw.all_squashed.split([word, reads, 2], dim=-1)
        self.d_erase, self.d_free, self.d_gates = d_erase.unbind(0), d_free.unbind(0), d_gates.unbind(0)

        empty = usage.new_empty
        self.square, self.linked = empty(batch, slots, slots), empty(batch, 3 * reads, slots)
        self.more_words, self.more_heads = empty(batch, slots, word), empty(batch, reads, slots)
        self.d_modes, self.d_raw_modes = empty(3, batch, reads), empty(batch, reads, 3)
        self.pair, self.d_pair = empty(batch, 2, 1), empty(batch, 2, slots)
        self.ones = usage.new_ones(batch, slots, 1)
        self.later = usage.new_ones(slots, slots).tril_(-1)

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
            the gradient by `prev`; that by the interface vector goes to where `begin_backward` was told.
        """
        t, raw, reads, row = step, self.raw, self.reads, self.row
        write_weights, prev_link, new_link = new.write_weights, prev.link.squeeze(1), new.link.squeeze(1)
        d_memory, d_usage, d_read_weights = d.memory, d.usage, d.read_weights
        d_link, d_precedence, d_write_weights = d.link.squeeze(1), d.precedence.squeeze(1), d.write_weights.squeeze(1)
        d_write_column, d_write_row = d_write_weights.unsqueeze(2), d_write_weights.unsqueeze(1)

        # read
        d_memory.baddbmm_(new.read_weights.mT, d_read_words)
        d_read_weights.baddbmm_(d_read_words, new.memory.mT)
        ways, way_weights = self.ways[t], self.way_weights[t]
        torch.mul(ways, d_read_weights, out=self.three_ways)
        torch.sum(self.three_ways, -1, out=self.d_modes)
        modes = self.modes[t]
        # Its `grad_input` must be contiguous.
        _softmax_backward(self.d_modes.permute(1, 2, 0), modes, -1, modes.dtype, grad_input=self.d_raw_modes)
        self.d_raw.modes[t].copy_(self.d_raw_modes)
        # Both gradients by the link are products of two of [df | wʳ | db].
        linked = self.linked
        d_forward, d_backward = linked[:, :reads], linked[:, 2 * reads :]
        torch.mul(d_read_weights, way_weights[1], out=d_forward)
        linked[:, reads : 2 * reads].copy_(prev.read_weights)
        torch.mul(d_read_weights, way_weights[0], out=d_backward)
        torch.mul(d_read_weights, way_weights[2], out=self.heads)
        keys, key_norms, d_dot_by = raw.keys[t], self.key_norms[t].unsqueeze(1), self.d_dot_by[t]
        d_keys, d_strengths = self.d_raw.keys[t], self.d_raw.strengths[t]
        key_norm_by = self.d_key_norm_by[t]
        self._look_up_backward(
            self.heads, ways[2], self.read_similarity[t], d_dot_by[:, :reads], new.memory, self.new_norms[t],
            keys[:, :reads], key_norms[..., :reads], key_norm_by[:, :reads], self.d_new_norm_by[t],
            d_memory, d_keys[:, :reads], d_strengths[:, :reads], self.more_heads,
        )  # fmt: skip

        # link
        d_link.baddbmm_(linked[:, : 2 * reads].mT, linked[:, reads:])
        d_link.diagonal(dim1=-2, dim2=-1).zero_()
        torch.bmm(d_forward, new_link, out=d_read_weights)
        d_read_weights.baddbmm_(d_backward, new_link.mT)
        precedence = prev.precedence.mT
        d_write_weights.add_(d_precedence)
        d_write_weights.sub_(torch.bmm(d.precedence, precedence).squeeze(1))
        d_write_column.baddbmm_(d_link, precedence)
        square = torch.mul(d_link, prev_link, out=self.square)
        d_write_column.baddbmm_(square, self.ones, alpha=-1)
        d_write_row.baddbmm_(self.ones.mT, square, alpha=-1)
        torch.sum(write_weights, -1, out=self.sum)
        d_precedence.mul_(torch.sub(self.one, self.sum, out=self.sum))
        d.precedence.baddbmm_(write_weights, d_link)
        torch.sub(self.one, write_weights.squeeze(1), out=row)
        d_link.mul_(torch.sub(row.unsqueeze(2), write_weights, out=square))

        # write
        torch.bmm(write_weights, d_memory, out=self.d_raw.write_vectors[t])
        d_write_column.baddbmm_(d_memory, raw.write_vectors[t].mT)
        erase = self.erase[t]
        d_factors = torch.mul(d_memory, prev.memory, out=self.words)
        d_write_column.baddbmm_(d_factors, erase.mT, alpha=-1)
        torch.bmm(write_weights, d_factors, out=self.d_erase[t].unsqueeze(1)).neg_()
        d_memory.mul_(torch.addcmul(self.one, write_weights.mT, erase, value=-1, out=self.more_words))
        torch.bmm(self.candidates[t], d_write_column, out=self.pair)
        by_allocation, by_content = self.pair[:, 0], self.pair[:, 1]
        d_gates = self.d_gates[t]
        torch.mul(torch.sub(by_allocation, by_content), self.write_gate[t], out=d_gates[:, :1])
        torch.lerp(by_content, by_allocation, self.allocation_gate[t], out=d_gates[:, 1:])
        torch.mul(d_write_row, self.d_candidates_by[t], out=self.d_pair)
        self._look_up_backward(
            self.d_pair[:, 1:], self.candidates[t][:, 1:], self.write_similarity[t], d_dot_by[:, reads:],
            prev.memory, self.norms[t], keys[:, reads:], key_norms[..., reads:], key_norm_by[:, reads:],
            self.d_norm_by[t], d_memory, d_keys[:, reads:], d_strengths[:, reads:], self.lookup,
        )  # fmt: skip

        # allocate and free
        free_list = self.free_list[t]
        d_sorted = torch.gather(self.d_pair[:, 0], -1, free_list)
        torch.mul(d_sorted, self.sorted_allocation[t], out=row)
        later = torch.mm(row, self.later, out=self.other_row).div_(self.sorted_usage[t])
        later.addcmul_(d_sorted, self.product[t], value=-1)
        d_usage.add_(row.scatter_(-1, free_list, later), alpha=1 - USAGE_EPSILON)
        d_retention = torch.mul(d_usage, self.written[t], out=row)
        if self.stop_usage_gradient:
            d_write_weights.zero_()
        else:
            torch.mul(d_usage, self.d_written_by[t], out=d_write_weights)
        d_usage.mul_(self.d_usage_by[t])
        torch.bmm(self.d_free_by[t], d_retention.unsqueeze(-1), out=self.d_free[t].unsqueeze(-1))
        d_read_weights.addcmul_(d_retention.unsqueeze(1), self.d_freed_by[t])
        self.d_vectors[t].mul_(self.slopes[t])
        return d

    def _look_up_backward(
        self,
        d_content: Tensor,
        content: Tensor,
        similarity: Tensor,
        d_dot_by: Tensor,
        memory: Tensor,
        norms: Tensor,
        keys: Tensor,
        key_norms: Tensor,
        d_key_norm_by: Tensor,
        d_norm_by: Tensor,
        d_memory: Tensor,
        d_keys: Tensor,
        d_strengths: Tensor,
        work: Tensor,
    ) -> None:
        """The adjoint of `_look_up`: adds to `d_memory`, sets `d_keys` and `d_strengths`; overwrites `d_content`."""
        d_scaled = _softmax_backward(d_content, content, -1, content.dtype, grad_input=work)
        torch.sum(torch.mul(d_scaled, similarity, out=d_content), -1, out=d_strengths)
        d_dot = d_scaled.mul_(d_dot_by)
        d_norms = torch.mul(d_dot, similarity, out=d_content)  # their sign is in d_key_norm_by and d_norm_by
        torch.bmm(d_dot, memory, out=d_keys)
        d_keys.addcmul_(torch.bmm(d_norms, norms.unsqueeze(-1)).mul_(d_key_norm_by), keys)
        d_memory.baddbmm_(d_dot.mT, keys)
        d_memory.addcmul_(torch.bmm(key_norms, d_norms).mul_(d_norm_by).mT, memory)
