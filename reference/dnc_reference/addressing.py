"""Every equation of the DNC's memory as one function, in the order in which a step applies them.

Each is pure, takes any floating dtype on any device, and works on a batch. They do not check their arguments:
`dnc_reference.memory_step` does, once for all of them.

Letters in every shape: B batch, N memory slots, W word size, R read heads, K write heads, H heads of either kind.
"Source" names the paragraph of Graves et al., "Hybrid computing using a neural network with dynamic external memory",
Nature 538 (2016), Methods, unless it says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# The paper does not say how to treat a zero vector or an empty slot. These three are DeepMind's published choices.
NORM_EPSILON = 1e-6  # inside the root of every norm: a zero word has a gradient
SIMILARITY_EPSILON = 1e-6  # added to the product of two norms: a zero word has a similarity, 0
USAGE_EPSILON = 1e-6  # least usage in the allocation: the backward can divide its product by usage


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), the strength of a key in DeepMind's published code.

    Args:
        x: any shape.

    Returns:
        same shape and dtype, at least 0.

    Source: DeepMind's published code, addressing.py.
    """
    # Beyond 40 the term that is left out, e⁻ˣ, is below half an ulp in float64; torch's default of 20 is not.
    return F.softplus(x, threshold=40.0)


def oneplus(x: Tensor) -> Tensor:
    """1 + log(1 + eˣ), the strength of a key in the paper.

    Args:
        x: any shape.

    Returns:
        same shape and dtype, at least 1.

    Source: "Interface parameters".
    """
    return 1 + softplus(x)


def retention(free_gates: Tensor, read_weights: Tensor) -> Tensor:
    """How much of each slot the free gates leave in use: ψ = ∏_r (1 − f_r wʳ_r).

    Args:
        free_gates: [B, R], in [0, 1].
        read_weights: [B, R, N], of the previous step.

    Returns:
        [B, N], in [0, 1].

    Source: "Dynamic memory allocation".
    """
    return _product(1 - free_gates.unsqueeze(-1) * read_weights)


def update_usage(prev_usage: Tensor, prev_write_weights: Tensor, retention: Tensor) -> Tensor:
    """Usage grows by what was written and shrinks by what was freed: u' = (u + wʷ − u∘wʷ)∘ψ.

    With several write heads wʷ stands for 1 − ∏_k (1 − wʷ_k): written by any of them.

    Args:
        prev_usage: [B, N], in [0, 1].
        prev_write_weights: [B, K, N], of the previous step.
        retention: [B, N], in [0, 1].

    Returns:
        [B, N], in [0, 1].

    Source: "Dynamic memory allocation"; several heads: DeepMind's published code, addressing.py, Freeness.
    """
    written = 1 - _product(1 - prev_write_weights)
    return (prev_usage + (1 - prev_usage) * written) * retention


def allocation_weights(usage: Tensor) -> Tensor:
    """Weight the free slots, least used first.

    a[φ[j]] = (1 − u[φ[j]]) ∏_{i<j} u[φ[i]], with φ the free list: the stable ascending sort of usage, so that of
    equally used slots the lower comes first. u is first mapped to ε + (1 − ε)u.

    Args:
        usage: [B, N], in [0, 1]; 1 is full.

    Returns:
        [B, N]; each row sums to at most 1. No gradient flows through φ.

    Source: "Dynamic memory allocation"; ε: DeepMind's published code, addressing.py, Freeness.
    """
    sorted_usage, free_list = sort_usage(usage)
    sorted_allocation = (1 - sorted_usage) * exclusive_product(sorted_usage)
    return torch.empty_like(usage).scatter(-1, free_list, sorted_allocation)


def sort_usage(usage: Tensor) -> tuple[Tensor, Tensor]:
    """The free list φ, and ε + (1 − ε)u in its order.

    As in DeepMind's code, 1 − u is sorted, descending: usages too close for 1 − u to tell them apart count as equal,
    and the lower slot comes first, so slots whose usages differ from 0 by a rounding error are not shuffled. Larger
    usages are not protected: where two differ by a rounding error alone, it decides their order.

    Args:
        usage: [B, N], in [0, 1].

    Returns:
        sorted usage [B, N] in [ε, 1]; φ [B, N] int64, slots from least to most used.

    Source: "Dynamic memory allocation"; 1 − u: DeepMind's published code, addressing.py, Freeness._allocation.
    """
    usage = USAGE_EPSILON + (1 - USAGE_EPSILON) * usage
    free_list = (1 - usage.detach()).argsort(dim=-1, descending=True, stable=True)
    return usage.gather(-1, free_list), free_list


def exclusive_product(x: Tensor) -> Tensor:
    """∏_{i<j} x[i] for each j, along the last axis; 1 for the first.

    Args:
        x: [B, N].

    Returns:
        [B, N].
    """
    return F.pad(x[..., :-1], (1, 0), value=1.0).cumprod(-1)


def write_allocation_weights(usage: Tensor, allocation_gates: Tensor, write_gates: Tensor) -> Tensor:
    """Allocation for several write heads, one after the other, each aware of what the heads before it will take.

    v_0 = u;  a_k = allocation_weights(v_k);  v_{k+1} = v_k + (1 − v_k) gᵃ_k gʷ_k a_k.
    v is simulated: it is not the usage that the next step starts from.

    Args:
        usage: [B, N], in [0, 1].
        allocation_gates: [B, K], in [0, 1].
        write_gates: [B, K], in [0, 1].

    Returns:
        [B, K, N], before the gates.

    Source: DeepMind's published code, addressing.py, Freeness.write_allocation_weights.
    """
    gates = (allocation_gates * write_gates).unsqueeze(-1)
    allocations = [allocation_weights(usage)]
    for head in range(1, gates.shape[1]):
        usage = usage + (1 - usage) * gates[:, head - 1] * allocations[-1]
        allocations.append(allocation_weights(usage))
    return torch.stack(allocations, dim=1)


def cosine_similarity(memory: Tensor, keys: Tensor) -> Tensor:
    """D(k, M[n]) = k·M[n] / (|k| |M[n]| + ε), where |x| = √(Σ x² + ε).

    Args:
        memory: [B, N, W].
        keys: [B, H, W].

    Returns:
        [B, H, N], in (−1, 1).

    Source: "Content-based addressing"; ε: DeepMind's published code, addressing.py.
    """
    dtype = memory.dtype
    if dtype.itemsize < 4:  # where a square may be infinite, or lose its ε, and spoil what is returned
        memory, keys = memory.float(), keys.float()
    norms = norm(keys).unsqueeze(-1) * norm(memory).unsqueeze(-2)
    return ((keys @ memory.mT) / (norms + SIMILARITY_EPSILON)).to(dtype)


def norm(x: Tensor) -> Tensor:
    """√(Σ x² + ε) over the last axis, which has a gradient at 0.

    Args:
        x: [..., W].

    Returns:
        [...], at least √ε.
    """
    return ((x * x).sum(-1) + NORM_EPSILON).sqrt()


def content_weights(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """Look up by content: C(M, k, β)[n] = exp(β D(k, M[n])) / Σ_m exp(β D(k, M[m])).

    Args:
        memory: [B, N, W].
        keys: [B, H, W].
        strengths: [B, H], at least 0.

    Returns:
        [B, H, N]; each row sums to 1.

    Source: "Content-based addressing".
    """
    return torch.softmax(cosine_similarity(memory, keys) * strengths.unsqueeze(-1), dim=-1)


def write_weights(content: Tensor, allocation: Tensor, allocation_gates: Tensor, write_gates: Tensor) -> Tensor:
    """Where to write: wʷ = gʷ [gᵃ a + (1 − gᵃ) cʷ].

    Args:
        content: [B, K, N], cʷ.
        allocation: [B, K, N], a.
        allocation_gates: [B, K], in [0, 1].
        write_gates: [B, K], in [0, 1].

    Returns:
        [B, K, N]; each row sums to at most 1.

    Source: "Dynamic memory allocation", "Write weighting".
    """
    return write_gates.unsqueeze(-1) * torch.lerp(content, allocation, allocation_gates.unsqueeze(-1))


def update_memory(prev_memory: Tensor, write_weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor) -> Tensor:
    """Erase by all heads, then add by all heads: M' = M ∘ ∏_k (1 − wʷ_k eₖᵀ) + Σ_k wʷ_k vₖᵀ.

    Args:
        prev_memory: [B, N, W].
        write_weights: [B, K, N].
        erase_vectors: [B, K, W], in [0, 1].
        write_vectors: [B, K, W].

    Returns:
        [B, N, W].

    Source: "Reading and writing memory"; several heads: DeepMind's published code, access.py.
    """
    kept = _product(1 - write_weights.unsqueeze(-1) * erase_vectors.unsqueeze(-2))
    return prev_memory * kept + write_weights.mT @ write_vectors


def update_link(prev_link: Tensor, prev_precedence: Tensor, write_weights: Tensor) -> Tensor:
    """Which slot was written after which: L'[i,j] = (1 − w[i] − w[j]) L[i,j] + w[i] p[j], and L'[i,i] = 0.

    Args:
        prev_link: [B, K, N, N].
        prev_precedence: [B, K, N], of the step before.
        write_weights: [B, K, N], of this step.

    Returns:
        [B, K, N, N]; zero diagonal, rows and columns sum to at most 1.

    Source: "Temporal memory linkage".
    """
    rows, columns = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    link = torch.addcmul((1 - rows - columns) * prev_link, rows, prev_precedence.unsqueeze(-2))
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0):
        # The ONNX exporter does not follow in-place changes of a view, and `torch.func.linearize` takes an in-place
        # change as done once and for all (PyTorch 2.13).
        return link.masked_fill(torch.eye(link.shape[-1], dtype=torch.bool, device=link.device), 0)
    # In place, on a tensor that was created here: a mask would read and write all N² elements once more.
    link.diagonal(dim1=-2, dim2=-1).zero_()
    return link


def update_precedence(prev_precedence: Tensor, write_weights: Tensor) -> Tensor:
    """Which slot was written last: p' = (1 − Σ_i w[i]) p + w.

    Args:
        prev_precedence: [B, K, N].
        write_weights: [B, K, N], of this step.

    Returns:
        [B, K, N]; each row sums to at most 1.

    Source: "Temporal memory linkage".
    """
    return (1 - write_weights.sum(-1, keepdim=True)) * prev_precedence + write_weights


def forward_weights(link: Tensor, prev_read_weights: Tensor) -> Tensor:
    """One step on in the order of writing: f[i] = Σ_j L[i,j] w[j].

    Args:
        link: [B, K, N, N], of this step.
        prev_read_weights: [B, R, N], of the step before.

    Returns:
        [B, R, K, N].

    Source: "Temporal memory linkage".
    """
    return (prev_read_weights.unsqueeze(1) @ link.mT).transpose(1, 2)


def backward_weights(link: Tensor, prev_read_weights: Tensor) -> Tensor:
    """One step back in the order of writing: b[j] = Σ_i L[i,j] w[i].

    Args:
        link: [B, K, N, N], of this step.
        prev_read_weights: [B, R, N], of the step before.

    Returns:
        [B, R, K, N].

    Source: "Temporal memory linkage".
    """
    return (prev_read_weights.unsqueeze(1) @ link).transpose(1, 2)


def read_weights(content: Tensor, forward: Tensor, backward: Tensor, read_modes: Tensor) -> Tensor:
    """Where to read: wʳ = Σ_k π[k] b_k + Σ_k π[K+k] f_k + π[2K] cʳ.

    Args:
        content: [B, R, N], cʳ.
        forward: [B, R, K, N].
        backward: [B, R, K, N].
        read_modes: [B, R, 1+2K], rows sum to 1: backward of each write head, forward of each, content.

    Returns:
        [B, R, N]; each row sums to at most 1.

    Source: "Temporal memory linkage", "Read weighting".
    """
    ways = torch.cat([backward, forward, content.unsqueeze(-2)], dim=-2)  # [B, R, 1+2K, N]
    return (read_modes.unsqueeze(-2) @ ways).squeeze(-2)


def read_words(memory: Tensor, read_weights: Tensor) -> Tensor:
    """What is read: r = wʳ M.

    Args:
        memory: [B, N, W], after this step's write.
        read_weights: [B, R, N], of this step.

    Returns:
        [B, R, W].

    Source: "Reading and writing memory".
    """
    return read_weights @ memory


def _product(factors: Tensor) -> Tensor:
    """∏ over axis 1, factor by factor: a gradient that divides by a factor would not be finite where that is 0."""
    product = factors[:, 0]
    for head in range(1, factors.shape[1]):
        product = product * factors[:, head]
    return product
