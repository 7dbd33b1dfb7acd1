"""Tasks that ask for a part of the input by its relation to another: the next item, a key's value, priorities."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dnc_triton.tasks.base import Batch, BitTask, Task, check_at_least, check_range


class AssociativeRecallTask(BitTask):
    """Show a list of items, then one of them again; the answer is the item that came after it.

    Input, num_bits + 2 channels: for each item a step with 1 on channel num_bits, then its `item_length` vectors of
    bits; a step with 1 on the last channel, the vectors of the item that is asked for, the same step again; zeros.
    Target: the vectors of the item after the one asked for, right after that step; before it, the output does not
    count. Any item but the last may be asked for. The items of a list are all different.

    A size is how many items are shown.

    Args:
        min_items, max_items: how many items a training sequence shows.
        item_length: vectors in an item.
        num_bits: bits in a vector.

    Source: Graves et al. 2014 (NTM), 4.3, with 2 to 6 items of 3 vectors of 6 bits.
    """

    name: ClassVar[str] = "associative_recall"
    summary: ClassVar[str] = "show a list of items, then one of them again; answer with the one after it"
    arguments: ClassVar[dict[str, str]] = {
        "min_items": "items in the shortest training sequence",
        "max_items": "items in the longest training sequence",
        "item_length": "vectors in an item",
        "num_bits": "bits in a vector",
    }

    def __init__(self, min_items: int = 2, max_items: int = 6, item_length: int = 3, num_bits: int = 6) -> None:
        check_at_least("min_items", min_items, 2)
        check_range("min_items", min_items, "max_items", max_items)
        check_at_least("item_length", item_length, 1)
        check_at_least("num_bits", num_bits, 1)
        _check_enough("max_items", max_items, num_bits * item_length)
        self.item_length, self.num_bits = item_length, num_bits
        self.input_size, self.output_size = num_bits + 2, num_bits
        # No lesson with only two items: there the second one is always the answer.
        self.lessons = [range(min_items, max_items + 1)]
        self.evaluations = {f"{min_items} to {max_items} items, as trained": self.lessons[-1]}
        if 2 * max_items <= 2 ** (num_bits * item_length):
            self.evaluations[f"{max_items + 1} to {2 * max_items} items"] = range(max_items + 1, 2 * max_items + 1)

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        check_at_least("size", size, 2)
        length, bits = self.item_length, self.num_bits
        items = _different_bits(batch_size, size, length * bits, generator).unflatten(-1, (length, bits))
        asked = torch.randint(size - 1, (batch_size,), generator=generator)
        rows, query = torch.arange(batch_size), size * (length + 1)
        steps = query + 2 * length + 2
        inputs = torch.zeros(batch_size, steps, self.input_size)
        shown = inputs[:, :query].unflatten(1, (size, length + 1))
        shown[:, :, 0, bits] = 1
        shown[:, :, 1:, :bits] = items
        inputs[:, [query, query + length + 1], bits + 1] = 1
        inputs[:, query + 1 : query + length + 1, :bits] = items[rows, asked]
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, -length:] = items[rows, asked + 1]
        return Batch(inputs, targets, (torch.arange(steps) >= steps - length).expand(batch_size, -1))


class KeyValueTask(BitTask):
    """Show pairs of a key and a value, then the keys in another order; the answer to each is its value.

    Input, 2 · num_bits + 1 channels: for each pair one step with the key's bits and the value's; a step with 1 on the
    last channel; for each key, in random order, a step with its bits alone. Target: at that step, its value. The keys
    of a sequence are all different.

    A size is how many pairs there are.

    Args:
        min_pairs, max_pairs: how many pairs a training sequence has.
        num_bits: bits in a key, and in a value.

    Source: the key-value retrieval of Csordás & Schmidhuber 2019, whose published code shows the pairs sorted by key
    and marks the end once more; here they come in random order, and the sequence ends with the last answer.
    """

    name: ClassVar[str] = "key_value"
    summary: ClassVar[str] = "show pairs of a key and a value, then the keys in another order; answer with the values"
    arguments: ClassVar[dict[str, str]] = {
        "min_pairs": "pairs in the shortest training sequence",
        "max_pairs": "pairs in the longest training sequence",
        "num_bits": "bits in a key, and in a value",
    }

    def __init__(self, min_pairs: int = 2, max_pairs: int = 16, num_bits: int = 8) -> None:
        check_range("min_pairs", min_pairs, "max_pairs", max_pairs)
        check_at_least("num_bits", num_bits, 1)
        _check_enough("max_pairs", max_pairs, num_bits)
        self.num_bits = num_bits
        self.input_size, self.output_size = 2 * num_bits + 1, num_bits
        self.lessons = [range(min_pairs, max_pairs + 1)]
        self.evaluations = {f"{min_pairs} to {max_pairs} pairs, as trained": self.lessons[-1]}
        if 2 * max_pairs <= 2**num_bits:
            self.evaluations[f"{max_pairs + 1} to {2 * max_pairs} pairs"] = range(max_pairs + 1, 2 * max_pairs + 1)

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        check_at_least("size", size, 1)
        keys = _different_bits(batch_size, size, self.num_bits, generator)
        values = torch.randint(2, keys.shape, generator=generator).float()
        order = torch.rand(batch_size, size, generator=generator).argsort(1)
        rows, steps = torch.arange(batch_size).unsqueeze(1), 2 * size + 1
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, :size] = torch.nn.functional.pad(torch.cat([keys, values], -1), (0, 1))
        inputs[:, size, -1] = 1
        inputs[:, size + 1 :, : self.num_bits] = keys[rows, order]
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, size + 1 :] = values[rows, order]
        return Batch(inputs, targets, (torch.arange(steps) > size).expand(batch_size, -1))


class PrioritySortTask(BitTask):
    """Show vectors with priorities; the answer is those with the highest priorities, the highest first.

    Input, num_bits + 2 channels: for each vector a step with its bits, and its priority on channel num_bits, drawn
    uniformly from [-1, 1); a step with 1 on the last channel; zeros. Target: the `num_highest` vectors with the highest
    priorities in descending order, or all if there are no more, right after that step; of equal priorities, the one
    shown first comes first. Before it, the output does not count.

    A size is how many vectors are shown.

    Args:
        num_vectors: how many are shown; fewer in the first lessons.
        num_highest: how many are asked for.
        num_bits: bits in a vector.

    Source: Graves et al. 2014 (NTM), 4.5, with the 16 highest of 20 vectors of 8 bits.
    """

    name: ClassVar[str] = "priority_sort"
    summary: ClassVar[str] = "show vectors with priorities; answer with those of the highest priorities, in order"
    arguments: ClassVar[dict[str, str]] = {
        "num_vectors": "vectors that are shown",
        "num_highest": "how many of them are asked for",
        "num_bits": "bits in a vector",
    }

    def __init__(self, num_vectors: int = 20, num_highest: int = 16, num_bits: int = 8) -> None:
        check_range("num_highest", num_highest, "num_vectors", num_vectors)
        check_at_least("num_bits", num_bits, 1)
        self.num_highest, self.num_bits = num_highest, num_bits
        self.input_size, self.output_size = num_bits + 2, num_bits
        self.lessons = [[size] for size in range(min(2, num_vectors), num_vectors + 1)]
        self.evaluations = {f"{num_highest} highest of {num_vectors}, as trained": [num_vectors]}

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        check_at_least("size", size, 1)
        bits = torch.randint(2, (batch_size, size, self.num_bits), generator=generator).float()
        priorities = 2 * torch.rand(batch_size, size, generator=generator) - 1
        order = priorities.argsort(stable=True, dim=1, descending=True)[:, : self.num_highest]
        steps = size + 1 + order.shape[1]
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, :size, : self.num_bits] = bits
        inputs[:, :size, self.num_bits] = priorities
        inputs[:, size, -1] = 1
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, size + 1 :] = bits[torch.arange(batch_size).unsqueeze(1), order]
        return Batch(inputs, targets, (torch.arange(steps) > size).expand(batch_size, -1))

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        shown = int(batch.inputs[0, :, -1].argmax())
        texts = super().symbols(outputs, batch)
        for step, priority in enumerate(batch.inputs[0, :shown, self.num_bits].tolist()):
            texts["input"][step] = f"{texts['input'][step][: self.num_bits]} {priority:+.2f}"
        return texts

    show = Task.show  # as text: a picture would not tell priorities apart


def _different_bits(batch_size: int, count: int, num_bits: int, generator: torch.Generator) -> Tensor:
    """[batch_size, count, num_bits] of 0 and 1: different vectors, every set in every order equally likely."""
    coded = min(num_bits, 62)  # what an int64 holds; further bits need not differ
    _check_enough("size", count, coded)
    # Floyd's algorithm draws a set without drawing twice. The set is uniform, its order is not.
    codes = torch.empty(batch_size, 0, dtype=torch.int64)
    for highest in range(2**coded - count, 2**coded):
        code = torch.randint(highest + 1, (batch_size, 1), generator=generator)
        taken = (codes == code).any(1, keepdim=True)
        codes = torch.cat([codes, torch.where(taken, highest, code)], 1)
    codes = codes.gather(1, torch.rand(batch_size, count, generator=generator).argsort(1))
    bits = codes.unsqueeze(-1) >> torch.arange(coded) & 1
    rest = torch.randint(2, (batch_size, count, num_bits - coded), generator=generator)
    return torch.cat([bits, rest], -1).float()


def _check_enough(name: str, count: int, num_bits: int) -> None:
    """Raise a ValueError unless there are `count` different words of `num_bits` bits."""
    if count > 2**num_bits:
        raise ValueError(f"{name}: expected at most {2**num_bits}, the different words of {num_bits} bits, got {count}")
