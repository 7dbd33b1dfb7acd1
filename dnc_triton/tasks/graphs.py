"""Tasks on random graphs: follow a route, or find a shortest path."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnc_triton.tasks.base import Batch, SymbolTask, check_at_least
from dnc_triton.tasks.curriculum import Span, describe, integers, lesson_of, read_curriculum, with_earlier
from dnc_triton.tasks.planning import FAR, TRIES, Judged, PlanningTask, first_answer, log_sum

MOST_LABELS = 10**6

# Extended Data Tables 3 and 5 of the paper: nodes, out-degree, path length of each lesson.
TRAVERSAL = (
    "3-10/2-4/1-1, 3-10/2-4/1-2, 5-10/2-4/1-3, 5-10/2-4/1-4, 10-15/2-4/1-4, 10-15/2-4/1-5, 10-20/2-4/1-5, "
    "10-20/2-4/1-6, 10-30/2-4/1-6, 10-30/2-4/1-7, 10-30/2-4/1-8, 10-30/2-4/1-9, 10-40/2-6/1-10, 10-40/2-6/1-20"
)
SHORTEST_PATH = (
    "5-10/1-2/2-2, 5-20/1-2/2-2, 10-20/1-2/2-2, 10-20/1-2/2-3, 10-20/1-3/2-3, 10-20/2-3/2-3, 10-20/2-3/2-4, "
    "10-20/2-4/2-4, 10-25/2-4/2-4, 10-25/2-4/2-5, 10-25/2-4/2-5, 15-25/2-4/2-5, 15-25/2-5/2-5, 20-25/2-5/2-5, "
    "20-25/2-6/2-5"
)


class Lesson(NamedTuple):
    """Ranges, both ends included, from which a graph and its path are drawn."""

    nodes: Span
    degree: Span
    length: Span


class Graphs(NamedTuple):
    """Random directed graphs. N is the number of nodes of the largest.

    Attributes:
        points: [B, N, 2], the nodes' places in the unit square.
        present: [B, N] bool: the nodes that a graph has; they come first.
        edges: [B, N, N] bool: from the first node to the second.
        node_labels: [B, N] int64, unique in a graph.
        edge_labels: [B, N, N] int64, unique among the edges out of a node; meaningless where there is no edge.
    """

    points: Tensor
    present: Tensor
    edges: Tensor
    node_labels: Tensor
    edge_labels: Tensor


def draw_graphs(count: int, lesson: Lesson, num_labels: int, generator: torch.Generator) -> Graphs:
    """Graphs whose nodes are points of the unit square, each with edges to its K nearest neighbours.

    K is drawn for each node; a graph of n nodes takes the labels of its edges from n numbers drawn for it.

    Source: Graves et al. 2016, Methods, "Random graph generation".
    """
    most = lesson.nodes[1]
    sizes = integers(lesson.nodes, (count, 1), generator)
    present = torch.arange(most) < sizes
    points = torch.rand(count, most, 2, generator=generator)
    distances = torch.cdist(points, points)
    distances[~(present.unsqueeze(1) & ~torch.eye(most, dtype=torch.bool)).expand_as(distances)] = torch.inf
    nearness = distances.argsort(-1).argsort(-1)  # each node's rank among the others, by distance
    degrees = integers(lesson.degree, (count, most, 1), generator)
    edges = (nearness < degrees) & distances.isfinite() & present.unsqueeze(2)
    labels = [torch.rand(count, num_labels, generator=generator).argsort(1)[:, :most] for _ in range(2)]
    # The edge to the k-th neighbour has the k-th of the graph's numbers in an order drawn for each node.
    order = torch.rand(count, most, most, generator=generator)
    order = order.masked_fill(~present.unsqueeze(1), torch.inf).argsort(2).gather(2, nearness)
    edge_labels = labels[1].unsqueeze(1).expand_as(order).gather(2, order)
    return Graphs(points, present, edges, labels[0], edge_labels)


class GraphTask(SymbolTask):
    """What the tasks on graphs share: labels, their encoding, the curriculum.

    A label is a number below base ** num_digits, given as `num_digits` digits, each one-hot in `base` channels; a label
    that is missing is all zeros. A triple is three labels: source, edge, destination. An input step is a triple and two
    more channels: 1 at the first step of a new phase; 1 at every step that asks for an answer. An output step has
    logits for each digit of a triple.

    Source: Graves et al. 2016, Methods, "Graph task descriptions".
    """

    arguments: ClassVar[dict[str, str]] = {
        "curriculum": "lessons separated by commas, each nodes/out-degree/path length, as 3-5/1-2/1-3",
        "base": "values of a digit of a label",
        "num_digits": "digits of a label",
    }

    def __init__(self, curriculum: str, base: int, num_digits: int) -> None:
        check_at_least("base", base, 2)
        check_at_least("num_digits", num_digits, 1)
        lessons = read_curriculum(curriculum, "3-5/1-2/1-3", least=(2, 1, 1), most=(1000, 1000, 1000))
        self.curriculum = [Lesson(*spans) for spans in lessons]
        for nodes, degree, _ in self.curriculum:
            if degree[0] >= nodes[1]:
                raise ValueError(
                    f"curriculum: expected fewer edges out of a node than there are nodes, "
                    f"got {degree[0]} and {nodes[1]}"
                )
        self.base, self.num_digits, self.num_labels = base, num_digits, base**num_digits
        most = max(lesson.nodes[1] for lesson in self.curriculum)
        if self.num_labels < most:
            raise ValueError(
                f"base, num_digits: expected a label for each of up to {most} nodes, got {base}, {num_digits}: "
                f"{self.num_labels} labels"
            )
        if self.num_labels > MOST_LABELS:
            raise ValueError(
                f"base, num_digits: expected at most {MOST_LABELS} labels, of which each graph draws its own, "
                f"got {base}, {num_digits}"
            )
        self.vocabulary = [str(digit) for digit in range(base)]
        self.output_size = 3 * num_digits * base
        self.input_size = self.output_size + 2
        names = ("nodes", "edges out of each", "steps")
        self.evaluations = {
            f"lesson {size}: {describe(lesson, names)}": [size] for size, lesson in enumerate(self.curriculum, 1)
        }

    def _encode(self, labels: Tensor) -> Tensor:
        """Labels [..., 3], −1 for none, as channels [..., output_size]."""
        powers = self.base ** torch.arange(self.num_digits - 1, -1, -1)
        digits = labels.clamp(min=0).unsqueeze(-1) // powers % self.base
        return (F.one_hot(digits, self.base) * (labels >= 0)[..., None, None]).flatten(-3).float()

    def _decode(self, channels: Tensor) -> Tensor:
        """Channels [..., output_size or more] as labels [..., 3], −1 for none."""
        digits = channels[..., : self.output_size].unflatten(-1, (3, self.num_digits, self.base))
        return self._labels(digits.argmax(-1)).where(digits.flatten(-2).any(-1), -1)

    def _labels(self, digits: Tensor) -> Tensor:
        """Digits [..., num_digits] as labels [...]."""
        powers = self.base ** torch.arange(self.num_digits - 1, -1, -1, device=digits.device)
        return (digits * powers).sum(-1)

    def _digits(self, channels: Tensor) -> Tensor:
        """The most likely digits of logits, or those of one-hot channels [..., 3 num_digits]."""
        return channels[..., : self.output_size].unflatten(-1, (-1, self.base)).argmax(-1)

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        def text(labels: Tensor) -> list[str]:
            steps = [["_" if label < 0 else str(label) for label in step] for step in labels.tolist()]
            return ["" if step == ["_"] * 3 else "{}-{}>{}".format(*step) for step in steps]

        scored = batch.scored[0].unsqueeze(-1)
        answers = [digits.unflatten(-1, (3, -1)) for digits in (batch.targets[0], self._digits(outputs[0]))]
        target, output = [text(self._labels(digits).where(scored, -1)) for digits in answers]
        return {"input": text(self._decode(batch.inputs[0])), "target": target, "output": output}


class GraphTraversalTask(GraphTask):
    """Follow a route through a random graph.

    Input: the triples of a graph in random order; then the route, a random walk: (source, edge, none) for its first
    step, (none, edge, none) for each of the others. Target: the complete triples along the route, one step each.

    Args:
        curriculum: the lessons, separated by commas: nodes, out-degree and length of the route, each a range.
        base, num_digits: of the labels. With 10 and 3, as in the paper, they are 0 to 999.

    A tenth of the training batches is from earlier lessons.

    Source: Graves et al. 2016, Methods, "Traversal" and "Curriculum learning", Extended Data Table 3. There the network
    ends its answer itself, with a pattern of its own; here the channel that asks for an answer ends with the last step.
    """

    name: ClassVar[str] = "graph_traversal"
    summary: ClassVar[str] = "follow a route of edge labels through a random graph"

    def __init__(self, curriculum: str = TRAVERSAL, base: int = 10, num_digits: int = 3) -> None:
        super().__init__(curriculum, base, num_digits)
        self.lessons = with_earlier(len(self.curriculum))

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        lesson = lesson_of(self.curriculum, size)
        graphs = draw_graphs(batch_size, lesson, self.num_labels, generator)
        rows = torch.arange(batch_size)
        here = graphs.present.float().multinomial(1, generator=generator).squeeze(1)
        walk = []
        for _ in range(lesson.length[1]):
            there = graphs.edges[rows, here].float().multinomial(1, generator=generator).squeeze(1)
            walk.append(_triples(graphs, rows, here, there))
            here = there
        route = torch.stack(walk, 1)
        query = route.clone()
        query[:, :, 2] = -1
        query[:, 1:, 0] = -1

        triples, counts = _description(graphs, generator)
        lengths = integers(lesson.length, (batch_size,), generator)
        steps = int((counts + 2 * lengths).max())
        labels = torch.full((batch_size, steps, 3), -1)
        flags = torch.zeros(batch_size, steps, 2)
        targets = torch.zeros(batch_size, steps, 3 * self.num_digits, dtype=torch.int64)
        scored = torch.zeros(batch_size, steps, dtype=torch.bool)
        for row, (count, length) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
            answer = count + length
            labels[row, :count] = triples[row, :count]
            labels[row, count:answer] = query[row, :length]
            flags[row, [count, answer], 0] = 1
            flags[row, answer : answer + length, 1] = 1
            targets[row, answer : answer + length] = self._digits(self._encode(route[row, :length]))
            scored[row, answer : answer + length] = True
        return Batch(torch.cat([self._encode(labels), flags], -1), targets, scored, counts + 2 * lengths)


class _Walk(NamedTuple):
    """Where the answer has led so far. E is the number of triples of the largest graph.

    Attributes:
        triples: [B, E, output_size], the graph as it was described.
        source: [B, E] label.
        destination: [B, E] label.
        moves: [B, E], the number of moves from an edge's source along it to the goal; FAR if the goal is out of reach.
        here: [B] label of the node reached.
    """

    triples: Tensor
    source: Tensor
    destination: Tensor
    moves: Tensor
    here: Tensor


class ShortestPathTask(PlanningTask, GraphTask):
    """Find a shortest path between two nodes of a random graph.

    Input: the triples of a graph in random order; (start, none, goal); `planning_steps` steps of nothing; then the
    answer, whose first input has no triple and each later one the triple of the move before. Target: the triples of a
    path, one step each; any shortest path counts.

    The move is the likeliest of the edges out of the node reached; an edge's probability is that of all its digits
    together. The node reached is where the network's own moves led, in training as in evaluation. At each step the loss
    is −log of the total probability, among all triples, of the edges that lead on along a shortest path: a network that
    only has to rank these above the other edges learns to guess, and never looks the edges up.

    Args:
        curriculum: the lessons, separated by commas: nodes, out-degree and length of the shortest path, each a range.
        base, num_digits: of the labels. With 10 and 3, as in the paper, they are 0 to 999.
        planning_steps: between query and answer.
        one_way: in this many of the first lessons, only one of two edges between the same nodes is kept. Nearest
            neighbours are mostly mutual: from the paper's graphs alone a network learns to look up the edges out of the
            goal, which is often enough, and never those into it.

    Source: Graves et al. 2016, Methods, "Shortest path" and "Structured prediction", Extended Data Table 5. There the
    loss, too, compares only the edges out of the node reached.
    """

    name: ClassVar[str] = "shortest_path"
    summary: ClassVar[str] = "find a shortest path between two nodes of a random graph"
    arguments: ClassVar[dict[str, str]] = {
        **GraphTask.arguments,
        "planning_steps": "steps between query and answer",
        "one_way": "in this many of the first lessons, no two nodes have edges both ways",
    }

    def __init__(
        self,
        curriculum: str = SHORTEST_PATH,
        base: int = 10,
        num_digits: int = 3,
        planning_steps: int = 10,
        one_way: int = 0,
    ) -> None:
        super().__init__(curriculum, base, num_digits)
        check_at_least("planning_steps", planning_steps, 0)
        check_at_least("one_way", one_way, 0)
        self.planning_steps, self.one_way = planning_steps, one_way
        self.lessons = [[size] for size in range(1, len(self.curriculum) + 1)]

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        graphs, start, goal, lengths = self._draw(batch_size, size, generator)
        rows = torch.arange(batch_size)
        triples, counts = _description(graphs, generator)
        query = torch.stack([start, torch.full_like(start, -1), goal], 1)
        query[:, ::2] = graphs.node_labels.gather(1, query[:, ::2])

        described = int(counts.max())
        first = described + 1 + self.planning_steps  # step of the answer
        steps = first + int(lengths.max())
        labels = torch.full((batch_size, steps, 3), -1)
        labels[:, :described] = triples
        labels[:, described] = query
        flags = torch.zeros(batch_size, steps, 2)
        flags[:, [described, first], 0] = 1
        if self.planning_steps:
            flags[:, described + 1, 0] = 1
        scored = (torch.arange(steps) >= first) & (torch.arange(steps) < first + lengths.unsqueeze(1))
        flags[:, first:, 1] = 1
        targets = torch.zeros(batch_size, steps, 3 * self.num_digits, dtype=torch.int64)
        batch = Batch(torch.cat([self._encode(labels), flags], -1), targets, scored)
        # The target is one of the shortest paths: of several right edges, it takes the one described first.
        walk = self.begin(batch)
        for step in range(first, steps):
            edge = _right_edges(walk).float().argmax(1)
            answer = walk.triples[rows, edge]
            targets[:, step] = self._digits(answer).where(scored[:, step, None], 0)
            if step + 1 < steps:
                batch.inputs[:, step + 1, : self.output_size] = answer
            walk = walk._replace(here=walk.destination[rows, edge])
        return batch

    def _draw(self, batch_size: int, size: int, generator: torch.Generator) -> tuple[Graphs, Tensor, Tensor, Tensor]:
        """Graphs, and in each a start and a goal [B] with the length [B] of the shortest path between them."""
        lesson = lesson_of(self.curriculum, size)
        lengths = integers(lesson.length, (batch_size,), generator)
        found: Graphs | None = None
        missing = torch.ones(batch_size, dtype=torch.bool)
        start, goal = torch.zeros_like(lengths), torch.zeros_like(lengths)
        for _ in range(TRIES):
            drawn = draw_graphs(batch_size, lesson, self.num_labels, generator)
            if size <= self.one_way:
                _leave_one_way(drawn.edges, generator)
            pairs = _hops(drawn.edges, lesson.length[1]) == lengths[:, None, None]
            new = missing & pairs.flatten(1).any(1)
            if new.any():
                pair = pairs[new].flatten(1).float().multinomial(1, generator=generator).squeeze(1)
                start[new], goal[new] = pair // pairs.shape[-1], pair % pairs.shape[-1]
            if found is None:
                found = drawn
            else:
                for old, fresh in zip(found, drawn, strict=True):
                    old[new] = fresh[new]
            missing &= ~new
            if not missing.any():
                return found, start, goal, lengths
        raise ValueError(f"curriculum: expected graphs in which there are such paths, got none for lesson {size}")

    def begin(self, batch: Batch) -> _Walk:
        query = first_answer(batch) - self.planning_steps - 1
        triples = batch.inputs[:, :query, : self.output_size]
        source, _, destination = self._decode(triples).unbind(-1)
        start, _, goal = self._decode(batch.inputs[:, query]).unbind(-1)
        real = source >= 0
        after = ((destination.unsqueeze(2) == source.unsqueeze(1)) & real.unsqueeze(1)).float()  # [B, E, the next edge]
        moves = torch.full_like(source, FAR)
        level = (destination == goal.unsqueeze(1)) & real
        for count in range(1, query + 1):
            moves[level] = count
            level = (after @ level.float().unsqueeze(2)).squeeze(2).bool() & (moves == FAR) & real
            if not level.any():
                break
        return _Walk(triples, source, destination, moves, start)

    def judge(self, situation: _Walk, outputs: Tensor) -> Judged:
        walk = situation
        logits = outputs.unflatten(-1, (-1, self.base)).log_softmax(-1).flatten(1)
        scores = (walk.triples.to(logits.dtype) @ logits.unsqueeze(2)).squeeze(2)
        leaving, right = walk.source == walk.here.unsqueeze(1), _right_edges(walk)
        taken = scores.masked_fill(~leaving, -torch.inf).argmax(1)
        rows = torch.arange(len(taken), device=taken.device)
        move = walk.triples[rows, taken]
        feedback = torch.cat([move, torch.zeros_like(move[:, :1]), torch.ones_like(move[:, :1])], 1)
        moved = walk._replace(here=walk.destination[rows, taken])
        return Judged(log_sum(scores, right), ~right[rows, taken], feedback, moved)

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        moves = torch.zeros_like(outputs)
        for step, judged in self.judged(outputs, batch):
            moves[:, step] = judged.feedback[:, : self.output_size]
        return super().symbols(moves, batch)

    def read(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, object]:
        # Graphs of a batch differ in their number of edges: the padding of the description is skipped.
        described = inputs.shape[1] - 2 - self.planning_steps
        counts = inputs[:, :described].any(-1).sum(1)
        before, state = model(inputs[:, :described], lengths=counts)
        outputs, state = model(inputs[:, described:], state)
        return torch.cat([before, outputs], 1), state


def _right_edges(walk: _Walk) -> Tensor:
    """[B, E] bool: the edges out of the node reached that are on a shortest path to the goal."""
    moves = walk.moves.where(walk.source == walk.here.unsqueeze(1), FAR)
    return (moves == moves.amin(1, keepdim=True)) & (moves < FAR)


def _leave_one_way(edges: Tensor, generator: torch.Generator) -> None:
    """Of two opposite edges in edges [B, N, N], keep one, in place."""
    one = torch.rand(edges.shape, generator=generator) < 0.5
    above = torch.ones(edges.shape[1:], dtype=torch.bool).triu(1)
    one = (one & above) | (~one & above).transpose(1, 2)
    edges &= one | ~edges.transpose(1, 2)


def _hops(edges: Tensor, most: int) -> Tensor:
    """Lengths [B, N, N] of the shortest paths of up to `most` edges; −1 where there is none, 0 to a node itself."""
    hops = torch.full(edges.shape, -1)
    reached = torch.eye(edges.shape[-1], dtype=torch.bool).expand_as(edges)
    hops[reached] = 0
    for length in range(1, most + 1):
        reached = (reached.float() @ edges.float()).bool() & (hops < 0)
        hops[reached] = length
    return hops


def _description(graphs: Graphs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The triples [B, E, 3] of graphs in random order, padded with −1, and how many [B] each has."""
    edges = graphs.edges.flatten(1)
    counts = edges.sum(1)
    order = torch.rand(edges.shape, generator=generator).masked_fill(~edges, torch.inf)
    picked = order.argsort(1)[:, : int(counts.max())]
    rows = torch.arange(len(edges)).unsqueeze(1)
    nodes = graphs.edges.shape[-1]
    triples = _triples(graphs, rows, picked // nodes, picked % nodes)
    return triples.where((torch.arange(picked.shape[1]) < counts.unsqueeze(1)).unsqueeze(-1), -1), counts


def _triples(graphs: Graphs, rows: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    labels = graphs.node_labels
    edge = graphs.edge_labels[rows, source, destination]
    return torch.stack([labels[rows, source], edge, labels[rows, destination]], -1)
