"""The adjoint of every equation in `addressing`, derived by hand: same order, same names, plain PyTorch.

The backward kernels are written from this. For each y = f(x…) there is `f_backward(d_y, x…, saved…)`, which returns
d_x…, where d_z is the gradient of the loss with respect to z. (oneplus shares softplus's, a sort has none, and those of
helpers are part of their callers'.) None of it uses autograd or divides by anything that can be 0. The tests compare
each with autograd.

Letters in every shape: B batch, N memory slots, W word size, R read heads, K write heads, H heads of either kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_reference import addressing
from dnc_reference.interface import interface_sizes
from dnc_reference.memory import memory_step_with_addressing
from dnc_reference.types import Interface, MemoryState


def memory_step_backward(
    interface: Interface,
    state: MemoryState,
    d_read_words: Tensor,
    d_state: MemoryState,
    *,
    stop_usage_gradient: bool = False,
) -> tuple[Interface, MemoryState]:
    """The adjoint of `memory_step`: the equations' adjoints in reverse order.

    Args:
        interface, state: what `memory_step` was called with.
        d_read_words: [B, R, W], gradient with respect to the words read.
        d_state: gradient with respect to the state after the step.
        stop_usage_gradient: as in `memory_step`.

    Returns:
        gradients with respect to the interface and to the state before the step, in the same shapes.
    """
    prev = state
    # A kernel keeps these from its forward or computes them again; here they are computed again.
    with torch.no_grad():
        _, new, way = memory_step_with_addressing(interface, state)

    # read
    d_memory, d_read_weights = read_words_backward(d_read_words, new.memory, new.read_weights)
    d_memory = d_memory + d_state.memory
    d_read_weights = d_read_weights + d_state.read_weights
    d_read_content, d_forward, d_backward, d_read_modes = read_weights_backward(
        d_read_weights, way.read_content_weights, way.forward_weights, way.backward_weights, interface.read_modes
    )
    d_memory_looked_up, d_read_keys, d_read_strengths = content_weights_backward(
        d_read_content, new.memory, interface.read_keys, interface.read_strengths
    )
    d_memory = d_memory + d_memory_looked_up

    # link
    d_link_back, d_prev_read_back = backward_weights_backward(d_backward, new.link, prev.read_weights)
    d_link_forth, d_prev_read_forth = forward_weights_backward(d_forward, new.link, prev.read_weights)
    d_prev_precedence, d_write_weights = update_precedence_backward(
        d_state.precedence, prev.precedence, new.write_weights
    )
    d_prev_link, d_precedence_linked, d_write_linked = update_link_backward(
        d_state.link + d_link_back + d_link_forth, prev.link, prev.precedence, new.write_weights
    )
    d_prev_precedence = d_prev_precedence + d_precedence_linked
    d_write_weights = d_write_weights + d_write_linked + d_state.write_weights

    # write
    d_prev_memory, d_write_written, d_erase_vectors, d_write_vectors = update_memory_backward(
        d_memory, prev.memory, new.write_weights, interface.erase_vectors, interface.write_vectors
    )
    d_write_weights = d_write_weights + d_write_written
    d_write_content, d_allocation, d_allocation_gates, d_write_gates = write_weights_backward(
        d_write_weights,
        way.write_content_weights,
        way.allocation_weights,
        interface.allocation_gates,
        interface.write_gates,
    )
    d_memory_looked_up, d_write_keys, d_write_strengths = content_weights_backward(
        d_write_content, prev.memory, interface.write_keys, interface.write_strengths
    )
    d_prev_memory = d_prev_memory + d_memory_looked_up

    # allocate and free
    d_usage, d_allocation_gates_simulated, d_write_gates_simulated = write_allocation_weights_backward(
        d_allocation, new.usage, way.allocation_weights, interface.allocation_gates, interface.write_gates
    )
    d_usage = d_usage + d_state.usage
    d_prev_usage, d_prev_write_weights, d_retention = update_usage_backward(
        d_usage, prev.usage, prev.write_weights, way.retention
    )
    if stop_usage_gradient:
        d_prev_write_weights = torch.zeros_like(d_prev_write_weights)
    d_free_gates, d_prev_read_freed = retention_backward(d_retention, interface.free_gates, prev.read_weights)

    return (
        Interface(
            read_keys=d_read_keys,
            read_strengths=d_read_strengths,
            write_keys=d_write_keys,
            write_strengths=d_write_strengths,
            erase_vectors=d_erase_vectors,
            write_vectors=d_write_vectors,
            free_gates=d_free_gates,
            allocation_gates=d_allocation_gates + d_allocation_gates_simulated,
            write_gates=d_write_gates + d_write_gates_simulated,
            read_modes=d_read_modes,
        ),
        MemoryState(
            memory=d_prev_memory,
            usage=d_prev_usage,
            link=d_prev_link,
            precedence=d_prev_precedence,
            read_weights=d_prev_read_back + d_prev_read_forth + d_prev_read_freed,
            write_weights=d_prev_write_weights,
        ),
    )


def activate_interface_backward(d_interface: Interface, interface: Interface, vector: Tensor) -> Tensor:
    """dx = d for keys and write vectors, σ(x) d for strengths, s (1 − s) d for s = σ(x), π (d − Σ π d) for modes.

    Args:
        d_interface: in the shapes of `Interface`.
        interface: what `activate_interface` made of the vector.
        vector: [B, S].

    Returns:
        d_vector, [B, S].
    """
    _, reads, word = interface.read_keys.shape
    writes = interface.write_keys.shape[1]
    sizes = interface_sizes(reads, writes, word)
    raw = dict(zip(sizes, vector.split(list(sizes.values()), -1), strict=True))
    fields = []
    for name in sizes:
        activated, d = getattr(interface, name), getattr(d_interface, name)
        if name.endswith("strengths"):
            d = softplus_backward(d, raw[name])
        elif name in ("erase_vectors", "free_gates", "allocation_gates", "write_gates"):
            d = d * activated * (1 - activated)
        elif name == "read_modes":
            d = activated * (d - (activated * d).sum(-1, keepdim=True))
        fields.append(d.flatten(1))
    return torch.cat(fields, -1)


def softplus_backward(d_strength: Tensor, x: Tensor) -> Tensor:
    """dx = σ(x) d. Also the adjoint of `oneplus`.

    Args:
        d_strength: any shape.
        x: same shape.

    Returns:
        d_x, same shape.
    """
    return d_strength * torch.sigmoid(x)


def retention_backward(d_retention: Tensor, free_gates: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """With q_r the product of the other heads' factors: df_r = −Σ_n d q_r w_r;  dw_r = −d q_r f_r.

    Args:
        d_retention: [B, N].
        free_gates: [B, R].
        read_weights: [B, R, N].

    Returns:
        d_free_gates [B, R], d_read_weights [B, R, N].
    """
    d_factor = d_retention.unsqueeze(1) * product_of_others(1 - free_gates.unsqueeze(-1) * read_weights)
    return -(d_factor * read_weights).sum(-1), -d_factor * free_gates.unsqueeze(-1)


def update_usage_backward(
    d_usage: Tensor, prev_usage: Tensor, prev_write_weights: Tensor, retention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With ω = 1 − ∏_k (1 − w_k):  du = d ψ (1 − ω);  dω = d ψ (1 − u);  dψ = d (u + (1 − u) ω).

    Args:
        d_usage: [B, N].
        prev_usage: [B, N].
        prev_write_weights: [B, K, N].
        retention: [B, N].

    Returns:
        d_prev_usage [B, N], d_prev_write_weights [B, K, N], d_retention [B, N].
    """
    unwritten = (1 - prev_write_weights).prod(1)
    d_kept = d_usage * retention
    d_written = d_kept * (1 - prev_usage)
    d_retention = d_usage * (prev_usage + (1 - prev_usage) * (1 - unwritten))
    return d_kept * unwritten, d_written.unsqueeze(1) * product_of_others(1 - prev_write_weights), d_retention


def allocation_weights_backward(d_allocation: Tensor, usage: Tensor) -> Tensor:
    """In the order of the free list, with x = ε + (1 − ε)u and P_j = ∏_{i<j} x_i:

    dx_j = −d_j P_j + (Σ_{i>j} d_i a_i) / x_j;  du = (1 − ε) dx.

    The division is safe: x ≥ ε. The sum runs over the later slots alone: subtracting from the total would lose every
    digit where a slot's own part is the largest.

    Args:
        d_allocation: [B, N].
        usage: [B, N].

    Returns:
        d_usage [B, N].
    """
    sorted_usage, free_list = addressing.sort_usage(usage)
    before = addressing.exclusive_product(sorted_usage)
    d_sorted = d_allocation.gather(-1, free_list)
    weighted = d_sorted * (1 - sorted_usage) * before
    later = torch.zeros_like(weighted)
    later[:, :-1] = weighted[:, 1:].flip(-1).cumsum(-1).flip(-1)
    d_sorted_usage = later / sorted_usage - d_sorted * before
    return (1 - addressing.USAGE_EPSILON) * torch.empty_like(usage).scatter(-1, free_list, d_sorted_usage)


def write_allocation_weights_backward(
    d_allocation: Tensor,
    usage: Tensor,
    allocation: Tensor,
    allocation_gates: Tensor,
    write_gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the last head to the first, with g_k = gᵃ_k gʷ_k and dv_K = 0:

    da_k += dv_{k+1} (1 − v_k) g_k;  dg_k = Σ_n dv_{k+1} (1 − v_k) a_k;
    dv_k = dv_{k+1} (1 − g_k a_k) + allocation_weights_backward(da_k, v_k).

    Args:
        d_allocation: [B, K, N].
        usage: [B, N].
        allocation: [B, K, N], what `write_allocation_weights` returned.
        allocation_gates: [B, K].
        write_gates: [B, K].

    Returns:
        d_usage [B, N], d_allocation_gates [B, K], d_write_gates [B, K].
    """
    gates = allocation_gates * write_gates
    heads = gates.shape[1]
    simulated = [usage]
    for head in range(heads - 1):
        simulated.append(simulated[-1] + (1 - simulated[-1]) * gates[:, head, None] * allocation[:, head])

    d_gates = torch.zeros_like(gates)
    d_usage = allocation_weights_backward(d_allocation[:, -1], simulated[-1])
    for head in reversed(range(heads - 1)):
        gate, taken = gates[:, head, None], allocation[:, head]
        d_taken = d_usage * (1 - simulated[head])
        d_gates[:, head] = (d_taken * taken).sum(-1)
        d_usage = d_usage * (1 - gate * taken) + allocation_weights_backward(
            d_allocation[:, head] + d_taken * gate, simulated[head]
        )
    return d_usage, d_gates * write_gates, d_gates * allocation_gates


def cosine_similarity_backward(d_similarity: Tensor, memory: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """With q = |k||M| + ε and D = k·M / q:  dk = Σ_n d/q (M − D |M|/|k| k);  dM = Σ_h d/q (k − D |k|/|M| M).

    Args:
        d_similarity: [B, H, N].
        memory: [B, N, W].
        keys: [B, H, W].

    Returns:
        d_memory [B, N, W], d_keys [B, H, W].
    """
    dtype = memory.dtype
    if dtype.itemsize < 4:  # as in the forward
        d_similarity, memory, keys = d_similarity.float(), memory.float(), keys.float()
    key_norms, memory_norms = addressing.norm(keys).unsqueeze(-1), addressing.norm(memory).unsqueeze(-2)
    norms = key_norms * memory_norms + addressing.SIMILARITY_EPSILON
    d_dot = d_similarity / norms
    d_norms = -d_dot * (keys @ memory.mT) / norms
    d_keys = d_dot @ memory + (d_norms * memory_norms).sum(-1, keepdim=True) / key_norms * keys
    d_memory = d_dot.mT @ keys + ((d_norms * key_norms).sum(-2, keepdim=True) / memory_norms).mT * memory
    return d_memory.to(dtype), d_keys.to(dtype)


def content_weights_backward(
    d_content: Tensor, memory: Tensor, keys: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With s = β D and c = softmax(s):  ds = c (d − Σ_n d c);  dβ = Σ_n ds D;  dD = β ds.

    Args:
        d_content: [B, H, N].
        memory: [B, N, W].
        keys: [B, H, W].
        strengths: [B, H].

    Returns:
        d_memory [B, N, W], d_keys [B, H, W], d_strengths [B, H].
    """
    similarity = addressing.cosine_similarity(memory, keys)
    content = torch.softmax(similarity * strengths.unsqueeze(-1), dim=-1)
    d_scaled = content * (d_content - (d_content * content).sum(-1, keepdim=True))
    d_memory, d_keys = cosine_similarity_backward(d_scaled * strengths.unsqueeze(-1), memory, keys)
    return d_memory, d_keys, (d_scaled * similarity).sum(-1)


def write_weights_backward(
    d_write_weights: Tensor, content: Tensor, allocation: Tensor, allocation_gates: Tensor, write_gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da = d gʷ gᵃ;  dc = d gʷ (1 − gᵃ);  dgᵃ = Σ_n d gʷ (a − c);  dgʷ = Σ_n d (gᵃ a + (1 − gᵃ) c).

    Args:
        d_write_weights: [B, K, N].
        content: [B, K, N].
        allocation: [B, K, N].
        allocation_gates: [B, K].
        write_gates: [B, K].

    Returns:
        d_content [B, K, N], d_allocation [B, K, N], d_allocation_gates [B, K], d_write_gates [B, K].
    """
    gate_a, gate_w = allocation_gates.unsqueeze(-1), write_gates.unsqueeze(-1)
    d_mixed = d_write_weights * gate_w
    d_allocation_gates = (d_mixed * (allocation - content)).sum(-1)
    d_write_gates = (d_write_weights * torch.lerp(content, allocation, gate_a)).sum(-1)
    return d_mixed * (1 - gate_a), d_mixed * gate_a, d_allocation_gates, d_write_gates


def update_memory_backward(
    d_memory: Tensor, prev_memory: Tensor, write_weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With E = ∏_k (1 − w_k eₖᵀ) and q_k the product of the other heads' factors:

    dM = d E;  dw_k = −Σ_c d M q_k e_k + Σ_c d v_k;  de_k = −Σ_n d M q_k w_k;  dv_k = Σ_n w_k d.

    Args:
        d_memory: [B, N, W].
        prev_memory: [B, N, W].
        write_weights: [B, K, N].
        erase_vectors: [B, K, W].
        write_vectors: [B, K, W].

    Returns:
        d_prev_memory [B, N, W], d_write_weights [B, K, N], d_erase_vectors [B, K, W], d_write_vectors [B, K, W].
    """
    factors = 1 - write_weights.unsqueeze(-1) * erase_vectors.unsqueeze(-2)  # [B, K, N, W]
    d_factors = (d_memory * prev_memory).unsqueeze(1) * product_of_others(factors)
    d_prev_memory = d_memory * factors.prod(1)
    d_write_weights = write_vectors @ d_memory.mT - (d_factors @ erase_vectors.unsqueeze(-1)).squeeze(-1)
    d_erase_vectors = -(write_weights.unsqueeze(-2) @ d_factors).squeeze(-2)
    return d_prev_memory, d_write_weights, d_erase_vectors, write_weights @ d_memory


def update_link_backward(
    d_link: Tensor, prev_link: Tensor, prev_precedence: Tensor, write_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With S = d and its diagonal 0:  dL[i,j] = (1 − w[i] − w[j]) S[i,j];  dp[j] = Σ_i S[i,j] w[i];

    dw[i] = Σ_j S[i,j] (p[j] − L[i,j]) − Σ_j S[j,i] L[j,i].

    Args:
        d_link: [B, K, N, N].
        prev_link: [B, K, N, N].
        prev_precedence: [B, K, N].
        write_weights: [B, K, N].

    Returns:
        d_prev_link [B, K, N, N], d_prev_precedence [B, K, N], d_write_weights [B, K, N].
    """
    d_link = d_link - torch.diag_embed(d_link.diagonal(dim1=-2, dim2=-1))
    rows, columns = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    d_prev_link = (1 - rows - columns) * d_link
    d_prev_precedence = (columns @ d_link).squeeze(-2)
    decayed = d_link * prev_link
    d_write_weights = (d_link @ prev_precedence.unsqueeze(-1)).squeeze(-1) - decayed.sum(-1) - decayed.sum(-2)
    return d_prev_link, d_prev_precedence, d_write_weights


def update_precedence_backward(
    d_precedence: Tensor, prev_precedence: Tensor, write_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """dp = (1 − Σ_i w[i]) d;  dw = d − Σ_i d[i] p[i].

    Args:
        d_precedence: [B, K, N].
        prev_precedence: [B, K, N].
        write_weights: [B, K, N].

    Returns:
        d_prev_precedence [B, K, N], d_write_weights [B, K, N].
    """
    d_prev_precedence = (1 - write_weights.sum(-1, keepdim=True)) * d_precedence
    return d_prev_precedence, d_precedence - (d_precedence * prev_precedence).sum(-1, keepdim=True)


def forward_weights_backward(d_forward: Tensor, link: Tensor, prev_read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """dL[i,j] = Σ_r d_r[i] w_r[j];  dw_r[j] = Σ_i L[i,j] d_r[i].

    Args:
        d_forward: [B, R, K, N].
        link: [B, K, N, N].
        prev_read_weights: [B, R, N].

    Returns:
        d_link [B, K, N, N], d_prev_read_weights [B, R, N].
    """
    d_heads = d_forward.transpose(1, 2)  # [B, K, R, N]
    return d_heads.mT @ prev_read_weights.unsqueeze(1), (d_heads @ link).sum(1)


def backward_weights_backward(d_backward: Tensor, link: Tensor, prev_read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """dL[i,j] = Σ_r w_r[i] d_r[j];  dw_r[i] = Σ_j L[i,j] d_r[j].

    Args:
        d_backward: [B, R, K, N].
        link: [B, K, N, N].
        prev_read_weights: [B, R, N].

    Returns:
        d_link [B, K, N, N], d_prev_read_weights [B, R, N].
    """
    d_heads = d_backward.transpose(1, 2)  # [B, K, R, N]
    return prev_read_weights.unsqueeze(1).mT @ d_heads, (d_heads @ link.mT).sum(1)


def read_weights_backward(
    d_read_weights: Tensor, content: Tensor, forward: Tensor, backward: Tensor, read_modes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each way gets its mode times d; each mode gets Σ_n d times its way.

    Args:
        d_read_weights: [B, R, N].
        content: [B, R, N].
        forward: [B, R, K, N].
        backward: [B, R, K, N].
        read_modes: [B, R, 1+2K].

    Returns:
        d_content [B, R, N], d_forward [B, R, K, N], d_backward [B, R, K, N], d_read_modes [B, R, 1+2K].
    """
    heads = forward.shape[2]
    d_ways = read_modes.unsqueeze(-1) * d_read_weights.unsqueeze(-2)  # [B, R, 1+2K, N]
    ways = torch.cat([backward, forward, content.unsqueeze(-2)], dim=-2)
    d_read_modes = (ways @ d_read_weights.unsqueeze(-1)).squeeze(-1)
    return d_ways[:, :, -1], d_ways[:, :, heads:-1], d_ways[:, :, :heads], d_read_modes


def read_words_backward(d_read_words: Tensor, memory: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """dM = wʳᵀ d;  dwʳ = d Mᵀ.

    Args:
        d_read_words: [B, R, W].
        memory: [B, N, W].
        read_weights: [B, R, N].

    Returns:
        d_memory [B, N, W], d_read_weights [B, R, N].
    """
    return read_weights.mT @ d_read_words, d_read_words @ memory.mT


def product_of_others(factors: Tensor) -> Tensor:
    """∏_{l≠k} factors[:, l] for each k along axis 1, without dividing by a factor, which may be 0."""
    ones = torch.ones_like(factors[:, :1])
    if factors.shape[1] == 1:
        return ones
    before = torch.cat([ones, factors[:, :-1]], dim=1).cumprod(1)
    after = torch.cat([factors[:, 1:], ones], dim=1).flip(1).cumprod(1).flip(1)
    return before * after
