"""The memory step as kernels: three phases forward and three backward, in one launch each way or in one per phase.

In one launch a program does the whole step of a batch element, phase after phase; the phases communicate through
buffers that stay in the cache. In three launches the middle phase has a program per tile of the link and per block of
slots, and the last one a program per part of the words (backward, one per read head too). In a `spread` layout the
phase that reads (forward the last, backward the first) has a program per read head as well. A fourth launch may rank
the slots before the forward's phases. Which layout is the fastest depends on N and B.

K = 1. All tensors are contiguous, of one dtype, on one device; what is kept for the backward is in the dtype of the
arithmetic, float32 unless the tensors are float64.

Where to find each equation of `dnc_reference.addressing`, and of `dnc_reference.interface` in the last row:

    equation                  forward                           backward
    retention, usage          addressing.update_usage           addressing.address_backward
    free list                 addressing.address, .rank         none: the order has no gradient
    allocation                addressing.address                addressing.address_backward
    write content lookup      addressing.look_up, .address      addressing.by_scaled_similarity, .lookup_backward,
                                                                addressing.mixture_backward
    write weights             addressing.address                addressing.by_write_weights, .mixture_backward,
                                                                addressing.by_scaled_similarity, .address_backward
    memory write              linking.write                     linking.write_backward
    link                      linking.linked                    linking.link_tile_backward, .link_strips_backward
    precedence                addressing.address                addressing.mixture_backward, .by_write_weights
    forward weights,          linking.link_tile, .link_strips,  reading.read_backward,
    backward weights          reading.read                      linking.link_tile_backward, .link_strips_backward
    read content lookup       linking.write, reading.read       reading.read_backward, linking.write_backward
    read weights              reading.read                      reading.read_backward
    read                      reading.read                      reading.read_backward, linking.write_backward
    interface's activations   common.gate, .strength            common.d_gate, .d_strength
                              common.read_modes                 reading.read_backward

A lookup stores similarities; their softmax is taken wherever it is used. Partial sums, of several tiles of the link or
blocks of slots, are added up by the function that uses them; those of the interface's gradient in `lookup_backward`. An
activation is applied wherever its number is loaded, each time anew.
"""

import triton
import triton.language as tl

from dnc_reference.types import MemoryState
from dnc_triton.kernels.addressing import (
    address,
    address_backward,
    by_write_weights,
    lookup_backward,
    mixture_backward,
    rank,
)
from dnc_triton.kernels.buffers import (
    ENDED,
    FRESH,
    GRADIENT,
    LINK,
    LOST,
    MEMORY,
    Behind,
    backward_scratch_at,
    forward_scratch_at,
    interface_at,
    kept_at,
    state_at,
    zeros_or_state,
)
from dnc_triton.kernels.common import begin
from dnc_triton.kernels.linking import (
    link_strips,
    link_strips_backward,
    link_tile,
    link_tile_backward,
    write,
    write_backward,
)
from dnc_triton.kernels.reading import read, read_backward

# The phases of a direction; WHOLE: all of them in one launch; RANK: what may come before the forward's first.
FIRST, MIDDLE, LAST, WHOLE, RANK = (tl.constexpr(phase) for phase in range(5))


@triton.jit
def memory_step(interface, old, new, kept, scratch, read_words_ptr, runs, PHASE: tl.constexpr, sizes: tl.constexpr):
    """A phase of a step, or all of them, for a batch element; the tuples of pointers are those of `buffers`."""
    if PHASE == RANK:
        rank(tl.program_id(1), interface, old, new, kept, scratch, sizes)
    elif PHASE == FIRST:
        address(interface, old, new, kept, sizes)
    elif PHASE == MIDDLE:
        piece = tl.program_id(1)
        if piece < sizes.TILES:
            link_strips(piece, old, new, scratch, runs, sizes)
        else:
            write(piece - sizes.TILES, interface, old, new, kept, runs, sizes)
    elif PHASE == LAST:
        piece = tl.program_id(1)
        if sizes.SPREAD:
            read(piece % sizes.PARTS, piece // sizes.PARTS, interface, new, kept, scratch, read_words_ptr, sizes)
        else:
            read(piece, 0, interface, new, kept, scratch, read_words_ptr, sizes)
    else:
        address(interface, old, new, kept, sizes)
        tl.debug_barrier()
        for tile in range(sizes.TILES):
            link_tile(tile, old, new, scratch, runs, sizes)
        for block in range(sizes.SLOT_BLOCKS):
            write(block, interface, old, new, kept, runs, sizes)
        tl.debug_barrier()
        for part in range(sizes.PARTS):
            read(part, 0, interface, new, kept, scratch, read_words_ptr, sizes)


@triton.jit
def memory_step_backward(
    interface,
    old,
    new,
    kept,
    d_read_words_ptr,
    d_new,
    d_interface,
    d_old,
    scratch,
    runs,
    behind,
    PHASE: tl.constexpr,
    sizes: tl.constexpr,
):
    """The adjoint of `memory_step`. For an element that has ended (not `runs`) no gradient of the state is written.

    `behind`, a `Behind`, says how many steps the old link lies behind; with all phases in one launch, none.
    """
    if PHASE == FIRST or PHASE == WHOLE:
        first_head = tl.program_id(1) if sizes.SPREAD else 0
        read_backward(first_head, interface, new, kept, d_read_words_ptr, d_new, d_interface, scratch, sizes)
    if PHASE == MIDDLE:
        piece = tl.program_id(1)
        if piece < sizes.TILES:
            link_strips_backward(piece, old, new, d_new, d_old, scratch, runs, behind, sizes)
        else:
            block = piece - sizes.TILES
            write_backward(block, interface, old, new, kept, d_read_words_ptr, d_new, d_old, scratch, runs, sizes)
    if PHASE == WHOLE:
        tl.debug_barrier()
        for tile in range(sizes.TILES):
            link_tile_backward(tile, old, new, d_new, d_old, scratch, runs, sizes)
        for block in range(sizes.SLOT_BLOCKS):
            write_backward(block, interface, old, new, kept, d_read_words_ptr, d_new, d_old, scratch, runs, sizes)
        tl.debug_barrier()
    if PHASE == LAST or PHASE == WHOLE:
        offs_n = tl.arange(0, sizes.BLOCK_N)
        mask_n = (offs_n < sizes.N) & runs
        d_weights = by_write_weights(old, d_new, scratch, offs_n, mask_n, sizes)
        if PHASE == WHOLE:
            for part in range(sizes.PARTS):
                lookup_backward(part, interface, old, kept, d_weights, scratch, d_interface, d_old, runs, sizes)
            address_backward(
                0,
                interface,
                old,
                new,
                kept,
                d_weights,
                d_new,
                d_interface,
                d_old,
                scratch,
                runs,
                sizes.BLOCK_R,
                sizes,
            )
        else:
            part = tl.program_id(1)
            if part < sizes.PARTS:
                lookup_backward(part, interface, old, kept, d_weights, scratch, d_interface, d_old, runs, sizes)
            elif sizes.SPREAD and part == sizes.PARTS + sizes.R:
                mixture_backward(interface, new, kept, d_weights, d_new, d_interface, d_old, scratch, runs, sizes)
            else:
                address_backward(
                    part - sizes.PARTS,
                    interface,
                    old,
                    new,
                    kept,
                    d_weights,
                    d_new,
                    d_interface,
                    d_old,
                    scratch,
                    runs,
                    1,
                    sizes,
                )


@triton.jit(do_not_specialize=["shared"])
def step_forward_kernel(
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    read_words_ptr,
    new_memory_ptr,
    new_usage_ptr,
    new_link_ptr,
    new_precedence_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    scratch_ptr,
    marks_ptr,
    zeros_ptr,
    shared,
    PHASE: tl.constexpr,
    sizes: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: (B,) for all phases; else (B, programs of the phase), see `step_launch.launches`.

    With marks [B] come zeros, as many as the largest field of one element's state has numbers. `shared` says whether
    MEMORY and LINK of the state before are a single entry for all elements.
    """
    begin(OVERLAPS)
    element = tl.program_id(0).to(tl.int64)
    old = MemoryState(memory_ptr, usage_ptr, link_ptr, precedence_ptr, read_weights_ptr, write_weights_ptr)
    old = state_at(old, element, sizes, shared & MEMORY != 0, shared & LINK != 0)
    new = MemoryState(
        new_memory_ptr, new_usage_ptr, new_link_ptr, new_precedence_ptr, new_read_weights_ptr, new_write_weights_ptr
    )
    new = state_at(new, element, sizes)
    runs = True
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + element)
        runs = mark & ENDED == 0
        # An ended element goes on from zeros but for memory and link: by a link that no step makes it could grow.
        old = zeros_or_state(mark & FRESH != 0, zeros_ptr, old, but_large=not runs)
    memory_step(
        interface_at(interface_ptr, element, sizes),
        old,
        new,
        kept_at(kept_ptr, free_list_ptr, element, sizes),
        forward_scratch_at(scratch_ptr, element, sizes),
        read_words_ptr + element * sizes.R * sizes.W,
        runs,
        PHASE,
        sizes,
    )


@triton.jit(do_not_specialize=["shared", "behind", "row"])
def step_backward_kernel(
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    new_memory_ptr,
    new_usage_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    d_read_words_ptr,
    d_new_memory_ptr,
    d_new_usage_ptr,
    d_new_link_ptr,
    d_new_precedence_ptr,
    d_new_read_weights_ptr,
    d_new_write_weights_ptr,
    d_interface_ptr,
    d_memory_ptr,
    d_usage_ptr,
    d_link_ptr,
    d_precedence_ptr,
    d_read_weights_ptr,
    d_write_weights_ptr,
    scratch_ptr,
    marks_ptr,
    zeros_ptr,
    shared,
    behind,
    row,
    PHASE: tl.constexpr,
    sizes: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: (B,) for all phases; else (B, programs of the phase), see `step_launch.launches`.

    With marks [B] come zeros, as in the forward. For an ended element no gradient of the state is written. Besides
    MEMORY and LINK, the GRADIENT of both may be `shared`. In three launches the link may be that of `behind` steps
    earlier; then the precedence and write weights of the steps since lie before this step's, `row` units of 16 bytes
    apart, and their marks before its marks, B apart, rounded up to 16.
    """
    begin(OVERLAPS)
    element = tl.program_id(0).to(tl.int64)
    old = MemoryState(memory_ptr, usage_ptr, link_ptr, precedence_ptr, read_weights_ptr, write_weights_ptr)
    old = state_at(old, element, sizes, shared & MEMORY != 0, shared & LINK != 0)
    # The backward needs neither the new link nor the new precedence; the old ones stand in for them.
    new = MemoryState(
        new_memory_ptr, new_usage_ptr, link_ptr, precedence_ptr, new_read_weights_ptr, new_write_weights_ptr
    )
    new = state_at(new, element, sizes)
    d_new = MemoryState(
        d_new_memory_ptr,
        d_new_usage_ptr,
        d_new_link_ptr,
        d_new_precedence_ptr,
        d_new_read_weights_ptr,
        d_new_write_weights_ptr,
    )
    d_new = state_at(d_new, element, sizes, shared & GRADIENT != 0, shared & GRADIENT != 0)
    d_old = MemoryState(
        d_memory_ptr, d_usage_ptr, d_link_ptr, d_precedence_ptr, d_read_weights_ptr, d_write_weights_ptr
    )
    runs, earlier = True, Behind(behind, row, None, 0)
    if marks_ptr is not None:
        mark_ptr = marks_ptr + element
        mark = tl.load(mark_ptr)
        runs = mark & ENDED == 0
        fresh = mark & FRESH != 0
        steps = tl.where(runs & (not fresh), behind, 0)
        earlier = Behind(steps, row, mark_ptr, tl.cdiv(tl.num_programs(0), 16) * 16)
        old = zeros_or_state(fresh, zeros_ptr, old)
        d_new = zeros_or_state(mark & LOST != 0, zeros_ptr, d_new)
    memory_step_backward(
        interface_at(interface_ptr, element, sizes),
        old,
        new,
        kept_at(kept_ptr, free_list_ptr, element, sizes),
        d_read_words_ptr + element * sizes.R * sizes.W,
        d_new,
        interface_at(d_interface_ptr, element, sizes),
        state_at(d_old, element, sizes),
        backward_scratch_at(scratch_ptr, element, sizes),
        runs,
        earlier,
        PHASE,
        sizes,
    )
