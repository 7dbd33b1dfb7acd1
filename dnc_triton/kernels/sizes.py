"""What is known of a step when its kernels are compiled: its sizes, and how it is cut up."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dnc_reference.interface import interface_sizes
from dnc_reference.types import Interface
from dnc_triton.kernels.layout import Layout

# Slots that a program ranks, and how many it compares them with at a time: four warps have registers for no more, and
# ranking more slots each would make fewer programs.
RANKED, AGAINST = 32, 128
WARP = 32  # threads of a warp
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Sizes(NamedTuple):
    """The constants of a memory step's kernel, which it passes to its functions.

    Derived ones are fields too: Triton recompiles for what it sees in here, not for what a property would say.

    Attributes:
        N, W, R: slots, word size, read heads.
        BLOCK_N, BLOCK_W, BLOCK_R: the next powers of two, the first two at least 16.
        ROWS, COLUMNS: of a tile of the link.
        STRIP: how many rows of a tile are in registers at a time, in three launches.
        ROW_BLOCKS, COLUMN_BLOCKS, TILES: how many tiles that makes, one below another, side by side, and in all.
        SLOTS: of a block of memory; the same in all phases.
        SLOT_BLOCKS: how many such blocks there are.
        PLACES: positions in a word that one program takes care of.
        PARTS: how many such programs a word has.
        AT_ONCE: partial sums that `reading.read` loads at a time.
        CHUNK: whole words that are loaded at a time, where words are not cut into parts.
        HEADS: read heads at a time, where something is multiplied with a vector of each.
        SPREAD, RANKS: of the layout.
        HEADS_READ: read heads that a program reads for.
        RANKED, AGAINST: slots that a program ranks, and those that it compares them with at a time.
        FEW: at most four read heads, which leaves registers for loading ahead.
        ALONE: some thread may hold a single element of a tile's row or column, whose product must then be rounded
            before it is added up across threads (`common.term`): with few slots, short, long or odd words, many heads
            or warps. `python -m benchmarks.static` fails where that is wrong.
        FORWARD_SCRATCH, BACKWARD_SCRATCH: numbers that a step's phases hand on, per batch element.
        INTERFACE: numbers of an interface vector.
        OFFSETS: where in it each field begins.
        RAW: the interface is not activated yet.
        STRENGTH_OFFSET: what is added to the softplus of raw strengths.
        STOP_USAGE_GRADIENT: as in `memory_step`.
        FAR: what a link is recomputed from lies further back than offsets in 32 bits reach.
        COMPUTE: the type of the arithmetic.
    """

    N: int
    W: int
    R: int
    BLOCK_N: int
    BLOCK_W: int
    BLOCK_R: int
    ROWS: int
    COLUMNS: int
    STRIP: int
    ROW_BLOCKS: int
    COLUMN_BLOCKS: int
    TILES: int
    SLOTS: int
    SLOT_BLOCKS: int
    PLACES: int
    PARTS: int
    AT_ONCE: int
    CHUNK: int
    HEADS: int
    SPREAD: bool
    RANKS: bool
    HEADS_READ: int
    RANKED: int
    AGAINST: int
    FEW: bool
    ALONE: bool
    FORWARD_SCRATCH: int
    BACKWARD_SCRATCH: int
    INTERFACE: int
    OFFSETS: Interface
    RAW: bool
    STRENGTH_OFFSET: float
    STOP_USAGE_GRADIENT: bool
    FAR: bool
    COMPUTE: tl.dtype

    @classmethod
    def of(
        cls,
        slots: int,
        word: int,
        num_reads: int,
        layout: Layout,
        num_warps: int,
        *,
        raw: bool = True,
        strength_offset: float = 1.0,
        stop_usage_gradient: bool = False,
        far: bool = False,
        compute: torch.dtype = torch.float32,
        backward: bool = False,
    ) -> Sizes:
        """The sizes of a step that is cut up by `layout`, for a kernel whose programs have `num_warps`.

        A thread holds 32 numbers in registers, 64 where it holds nothing else. In a whole sequence a program takes
        fewer words and places at a time: otherwise its backward spills at N = 128.

        The middle phase has the layout's warps, the phases around it may have others. What must be the same in all
        phases (tiles of the link, blocks of slots) is sized for the layout's warps, the rest for the kernel's own.
        """
        threads, middle_threads = WARP * num_warps, WARP * layout.num_warps
        block_n, block_w = (max(16, triton.next_power_of_2(size)) for size in (slots, word))
        block_r, numbers = triton.next_power_of_2(num_reads), 32 * threads
        heads_read, ranked = 1 if layout.spread else block_r, min(block_n, RANKED)
        # The link, in tiles; where there are many numbers in a tile, in strips of so many for each thread.
        rows, columns = layout.rows, layout.columns
        row_blocks, column_blocks = triton.cdiv(slots, rows), triton.cdiv(slots, columns)
        few = num_reads <= 4
        all_at_once = few and rows * columns <= 64 * middle_threads
        strip = (16 if few else 8) if backward else 64 if all_at_once else 32
        # The memory, in blocks of slots, parts of words, chunks of whole words.
        slots_at_once = min(block_n, max(1, 16 * middle_threads // block_w))
        slot_blocks = triton.cdiv(slots, slots_at_once)
        places = min(block_w, max(4, (2 if layout.whole_sequence else 4) * numbers // (block_n * max(4, heads_read))))
        most_words = min(64, block_w) if layout.whole_sequence and block_n > 64 else block_n
        chunk = min(most_words, max(1, 2 * numbers // block_w))
        at_once = min(16, max(1, 4 * numbers // (block_n * heads_read)))
        # With many heads the sums over rows, if they are more than 64 numbers of a thread, come in two halves: all at
        # once Triton 3.6 spilled, and later ones left no room for a second program.
        if heads_read > 4 and row_blocks <= at_once and row_blocks * block_n * heads_read > 2 * numbers:
            at_once = triton.cdiv(row_blocks, 2)
        # Scratch, in rows of N numbers: `buffers.ForwardScratch` and `buffers.BackwardScratch` without its `d_vectors`.
        forward_rows = (row_blocks + column_blocks) * num_reads
        backward_rows = 1 + 4 * num_reads + column_blocks * (1 + num_reads) + row_blocks * (2 + num_reads)
        alone = block_n <= 64 or not 16 < block_w < 256 or rows * columns <= 8 * middle_threads or strip == 8
        # With words of odd length a thread loads no two numbers at once; and all it has of memory may be of one slot.
        alone = alone or word % 2 == 1 or places * block_n <= 8 * threads
        fields = interface_sizes(num_reads, 1, word)
        *offsets, interface = accumulate(fields.values(), initial=0)
        return cls(
            N=slots,
            W=word,
            R=num_reads,
            BLOCK_N=block_n,
            BLOCK_W=block_w,
            BLOCK_R=block_r,
            ROWS=rows,
            COLUMNS=columns,
            STRIP=min(rows, max(1, strip * middle_threads // columns)),
            ROW_BLOCKS=row_blocks,
            COLUMN_BLOCKS=column_blocks,
            TILES=row_blocks * column_blocks,
            SLOTS=slots_at_once,
            SLOT_BLOCKS=slot_blocks,
            PLACES=places,
            PARTS=triton.cdiv(word, places),
            AT_ONCE=at_once,
            CHUNK=chunk,
            HEADS=min(block_r, max(1, numbers // max(rows * columns, block_n * block_w))),
            SPREAD=layout.spread,
            RANKS=layout.ranks,
            HEADS_READ=heads_read,
            RANKED=ranked,
            AGAINST=min(block_n, AGAINST),
            FEW=few,
            ALONE=alone,
            FORWARD_SCRATCH=max(forward_rows, layout.ranks * triton.cdiv(slots, ranked)) * slots,
            BACKWARD_SCRATCH=backward_rows * slots + slot_blocks * (2 + num_reads) * word,
            INTERFACE=interface,
            OFFSETS=Interface(**dict(zip(fields, offsets, strict=True))),  # type: ignore[arg-type]
            RAW=raw,
            STRENGTH_OFFSET=strength_offset,
            STOP_USAGE_GRADIENT=stop_usage_gradient,
            FAR=far,
            COMPUTE=TRITON_DTYPES[compute],
        )
