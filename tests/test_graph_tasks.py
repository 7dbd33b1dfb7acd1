"""Graphs: what is drawn and what is right, compared with networkx."""

from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from answering import Answering, random

from dnc_triton.tasks import Batch, GraphTraversalTask, ShortestPathTask
from dnc_triton.tasks.graphs import Lesson, draw_graphs
from dnc_triton.tasks.planning import first_answer
from dnc_triton.training.baseline import LSTMBaseline


def labels_of(channels: torch.Tensor, base: int, num_digits: int) -> list[tuple[int | None, ...]]:
    """The triples of input or one-hot output steps, read digit by digit."""
    steps = []
    for step in channels.tolist():
        labels: list[int | None] = []
        for label in range(3):
            number: int | None = 0
            for digit in range(num_digits):
                start = (label * num_digits + digit) * base
                on = [value for value in range(base) if step[start + value]]
                assert len(on) <= 1
                number = None if not on or number is None else number * base + on[0]
            labels.append(number)
        steps.append(tuple(labels))
    return steps


def graph_of(triples: list[tuple[int | None, ...]]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for source, edge, destination in triples:
        assert None not in (source, edge, destination)
        assert not graph.has_edge(source, destination)
        graph.add_edge(source, destination, label=edge)
    for node in graph:
        labels = [edge["label"] for _, _, edge in graph.out_edges(node, data=True)]
        assert len(set(labels)) == len(labels), "two edges out of a node have one label"
    return graph


def one_hot(targets: torch.Tensor, base: int) -> torch.Tensor:
    return F.one_hot(targets, base).flatten(-2).float()


def test_nodes_have_edges_to_their_nearest_neighbours() -> None:
    lesson = Lesson((3, 9), (1, 3), (1, 1))
    graphs = draw_graphs(200, lesson, 30, random(0))
    sizes, degrees = set(), set()
    for points, present, edges, nodes, labels in zip(*graphs, strict=True):
        count = int(present.sum())
        sizes.add(count)
        assert not edges[count:].any()
        assert not edges[:, count:].any()
        assert len(set(nodes[:count].tolist())) == count
        assert len(set(labels[edges].tolist())) <= count
        for node in range(count):
            neighbours = edges[node].nonzero().flatten().tolist()
            degrees.add(len(neighbours))
            others = sorted(
                (float((points[node] - points[other]).square().sum()), other) for other in range(count) if other != node
            )
            assert sorted(neighbours) == sorted(other for _, other in others[: len(neighbours)])
            assert len(set(labels[node, neighbours].tolist())) == len(neighbours)
    assert sizes == set(range(3, 10))
    assert degrees == {1, 2, 3}


def test_edges_are_described_in_random_order() -> None:
    task = ShortestPathTask("4/1/1", base=5, num_digits=1)
    inputs = task.sample(400, 1, random(0)).inputs[:, :4]
    positions = [min(range(4), key=labels_of(row, 5, 1).__getitem__) for row in inputs]
    assert all(60 < positions.count(position) < 140 for position in range(4))  # 100 expected, deviation 8.7


@pytest.mark.parametrize(("base", "num_digits"), [(12, 1), (4, 3), (10, 3)])
def test_a_traversal_is_a_walk_on_the_graph(base: int, num_digits: int) -> None:
    task = GraphTraversalTask("3-6/1-3/1-2, 5-9/2-4/2-5", base=base, num_digits=num_digits)
    assert task.lessons == [[1], [1, *[2] * 9]]
    batch = task.sample(40, 2, random(1))
    assert batch.lengths is not None
    walked = set()
    for row in range(40):
        length = int(batch.lengths[row])
        assert not batch.inputs[row, length:].any()
        inputs = labels_of(batch.inputs[row, :length], base, num_digits)
        transition, answer = batch.inputs[row, :length, -2:].T.bool()
        assert torch.equal(answer, batch.scored[row, :length])
        query, first = transition.nonzero().flatten().tolist()
        graph = graph_of(inputs[:query])
        assert 5 <= len(graph) <= 9
        assert answer.nonzero().flatten().tolist() == list(range(first, length))
        walked.add(length - first)
        assert first - query == length - first
        target = labels_of(one_hot(batch.targets[row, first:length], base), base, num_digits)
        here = target[0][0]
        for step, (source, edge, destination) in enumerate(target):
            assert source == here
            assert graph.edges[source, destination]["label"] == edge
            here = destination
            assert inputs[query + step] == (source if step == 0 else None, edge, None)
            assert inputs[first + step] == (None, None, None)
    assert walked == {2, 3, 4, 5}


def shortest_paths(task: ShortestPathTask, batch: Batch, row: int) -> tuple[nx.DiGraph, int, int, int]:
    """Graph, start, goal of a row, and the step at which its answer begins."""
    first = int(batch.scored[row].nonzero()[0])
    inputs = labels_of(batch.inputs[row], task.base, task.num_digits)
    query = first - task.planning_steps - 1
    graph = graph_of([triple for triple in inputs[:query] if triple != (None, None, None)])
    start, nothing, goal = inputs[query]
    assert nothing is None
    assert start is not None
    assert goal is not None
    assert inputs[query + 1 : first + 1] == [(None, None, None)] * (task.planning_steps + 1)
    return graph, start, goal, first


@pytest.mark.parametrize(("base", "num_digits"), [(20, 1), (2, 5), (10, 3)])
def test_targets_are_shortest_paths_by_networkx(base: int, num_digits: int) -> None:
    task = ShortestPathTask("5-9/1-3/1-3, 10-20/2-4/2-5", base=base, num_digits=num_digits, planning_steps=4)
    for size, (nodes, lengths) in {1: (range(5, 10), {1, 2, 3}), 2: (range(10, 21), {2, 3, 4, 5})}.items():
        batch = task.sample(40, size, random(size))
        seen = set()
        for row in range(40):
            graph, start, goal, first = shortest_paths(task, batch, row)
            assert len(graph) in nodes
            length = int(batch.scored[row].sum())
            seen.add(length)
            assert nx.shortest_path_length(graph, start, goal) == length
            path = labels_of(one_hot(batch.targets[row, first : first + length], base), base, num_digits)
            visited = [start]
            for source, edge, destination in path:
                assert source == visited[-1]
                assert graph.edges[source, destination]["label"] == edge
                visited.append(destination)
            assert visited in list(nx.all_shortest_paths(graph, start, goal))
        assert seen == lengths


def test_any_shortest_path_is_right_and_nothing_else() -> None:
    """Every walk of that length from the start is right if networkx has it among the shortest paths, else wrong."""
    task = ShortestPathTask("6-8/2-3/2-3", base=10, num_digits=1, planning_steps=1)
    batch = task.sample(20, 1, random(3))
    several = longer = 0
    for row in range(20):
        graph, start, goal, first = shortest_paths(task, batch, row)
        length = int(batch.scored[row].sum())
        one = batch.rows(slice(row, row + 1))
        best = list(nx.all_shortest_paths(graph, start, goal))
        several += len(best) > 1
        # All walks of that length, whether they arrive or not.
        walks = [[start]]
        for _ in range(length):
            walks = [[*walk, node] for walk in walks for node in graph[walk[-1]]]
        for walk in walks:
            outputs = torch.zeros(1, batch.inputs.shape[1], task.output_size)
            for step, (source, destination) in enumerate(nx.utils.pairwise(walk)):
                triple = torch.tensor([source, graph.edges[source, destination]["label"], destination])
                outputs[0, first + step] = 20 * F.one_hot(triple, 10).flatten()
            assert bool(task.right(outputs, one)) == (walk in best), (walk, best)
            assert bool(task.loss(outputs, one) < 1e-3) == (walk in best)
            longer += walk not in best
        assert task.right(20 * one_hot(one.targets, 10), one)
    assert several > 2
    assert longer > 60


@pytest.mark.parametrize("name", ["planning_steps", "one_way"])
def test_counts_of_a_shortest_path_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer, at least 0, got -1"):
        ShortestPathTask(**{name: -1})


def test_the_first_lessons_may_have_no_edges_both_ways() -> None:
    task = ShortestPathTask("5-8/2-3/2, 5-8/2-3/2", base=2, num_digits=3, planning_steps=1, one_way=1)
    both, edges = {1: 0, 2: 0}, {1: 0, 2: 0}
    for size in both:
        batch = task.sample(40, size, random(size))
        for row in range(40):
            graph, start, goal, _ = shortest_paths(task, batch, row)
            assert nx.shortest_path_length(graph, start, goal) == 2
            both[size] += sum(graph.has_edge(there, here) for here, there in graph.edges) // 2
            edges[size] += graph.number_of_edges()
    assert both[1] == 0
    assert both[2] > 40
    # Nothing else is left out: as many pairs of nodes have edges, up to chance.
    assert abs(edges[1] - (edges[2] - both[2])) < 80


def test_the_loss_counts_all_shortest_paths_together() -> None:
    """Of 10³ equally likely triples, as many are right as there are first edges of shortest paths by networkx."""
    task = ShortestPathTask("6-8/2-3/2-2", base=10, num_digits=1, planning_steps=1)
    batch = task.sample(30, 1, random(0))
    counts = []
    for row in range(30):
        graph, start, goal, _ = shortest_paths(task, batch, row)
        counts.append(len({path[1] for path in nx.all_shortest_paths(graph, start, goal)}))
    assert max(counts) > 1
    judged = task.judge(task.begin(batch), torch.zeros(30, 30, dtype=torch.float64))
    torch.testing.assert_close(judged.log_likelihood.exp(), torch.tensor(counts).double() / 1000)


def test_the_likeliest_edge_out_of_the_node_reached_is_the_move() -> None:
    """Whatever the output, every answer is an edge: the likeliest, by a sum over the digits that is written out."""
    task = ShortestPathTask("6-8/2-3/1-2", base=3, num_digits=2, planning_steps=1)
    batch = task.sample(30, 1, random(8))
    outputs = torch.randn(*batch.scored.shape, 18, dtype=torch.float64, generator=random(9))
    digits = outputs.unflatten(-1, (3, 2, 3)).log_softmax(-1)
    wrong, loss = 0, 0.0
    for row in range(30):
        graph, here, goal, first = shortest_paths(task, batch, row)
        one = batch.rows(slice(row, row + 1))
        shown = task.symbols(outputs[row : row + 1], one)["output"]
        missed = False
        for step in range(first, first + int(batch.scored[row].sum())):
            chances = {}
            for there in graph[here]:
                triple = (here, graph.edges[here, there]["label"], there)
                parts = [digits[row, step, i, j, label // 3 ** (1 - j) % 3] for i, label in enumerate(triple)
                         for j in range(2)]  # fmt: skip
                chances[there] = float(sum(parts).exp())
            there = max(chances, key=chances.__getitem__)
            assert shown[step] == f"{here}-{graph.edges[here, there]['label']}>{there}"
            away = {
                node: nx.shortest_path_length(graph, node, goal) for node in graph if nx.has_path(graph, node, goal)
            }
            # A way back to the goal counts where the walk has passed it already.
            onward = {node: 0 if node == goal else away.get(node, 99) for node in graph[here]}
            best = {node for node in onward if onward[node] == min(onward.values()) < 99}
            if best:
                loss -= math.log(sum(chances[node] for node in best))
            missed |= there not in best
            here = there
        assert bool(task.right(outputs[row : row + 1], one)) == (not missed)
        wrong += missed
    assert 5 < wrong < 30
    torch.testing.assert_close(float(task.loss(outputs, batch)), loss)


def test_the_network_sees_where_its_own_moves_led() -> None:
    task = ShortestPathTask("6-8/2-3/2-3", base=10, num_digits=1, planning_steps=2)
    batch = task.sample(30, 1, random(5))
    generator = random(6)
    answers = torch.randn(*batch.scored.shape, 30, generator=generator)
    wandered = 0
    for row in range(30):
        graph, start, _, first = shortest_paths(task, batch, row)
        one = batch.rows(slice(row, row + 1))
        # A walk of its own choosing: the first edge of each node, by label.
        here, own = start, []
        for step in range(int(batch.scored[row].sum())):
            destination = min(graph[here], key=lambda node: graph.edges[here, node]["label"])
            triple = (here, graph.edges[here, destination]["label"], destination)
            own.append(triple)
            answers[row, first + step] = 20 * F.one_hot(torch.tensor(triple), 10).flatten()
            here = destination
        model = Answering(answers[row : row + 1])
        outputs = task.run(model, one)
        assert torch.equal(outputs, answers[row : row + 1])
        shown = labels_of(model.shown[0, first:], 10, 1)
        assert shown[: len(own)] == [(None, None, None), *own[:-1]]
        assert model.shown[0, first:, -1].all()
        wandered += not bool(task.right(outputs, one))
    assert wandered > 5
    # Its gradients are finite.
    noise = torch.randn(*batch.scored.shape, 30, generator=generator, requires_grad=True)
    outputs = task.run(Answering(noise), batch)
    task.loss(outputs, batch).backward()
    assert noise.grad is not None
    assert noise.grad.isfinite().all()
    assert not noise.grad[~batch.scored].any()


def test_under_autocast_the_network_sees_the_moves_that_are_judged() -> None:
    """Sums that are rounded to bfloat16 would take another edge for the likeliest here and there."""
    task = ShortestPathTask("8/2-3/2-3", base=2, num_digits=5, planning_steps=1)
    batch = task.sample(100, 1, random(5))
    model = Answering(torch.randn(*batch.scored.shape, 30, generator=random(6)).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = task.run(model, batch)
    situation = task.begin(batch)
    for step in range(first_answer(batch), outputs.shape[1] - 1):
        judged = task.judge(situation, outputs[:, step].float())
        assert torch.equal(model.shown[:, step + 1], judged.feedback)
        situation = judged.situation


def test_padding_of_the_description_reaches_no_network() -> None:
    """A row answers the same alone and beside larger graphs."""
    task = ShortestPathTask("3-9/1-3/1-2", base=10, num_digits=1, planning_steps=1)
    torch.manual_seed(0)
    model = LSTMBaseline(task.input_size, 16, task.output_size)
    batch = task.sample(6, 1, random(2))
    together = task.run(model, batch)
    for row in range(6):
        one = batch.rows(slice(row, row + 1))
        query = int(one.scored[0].nonzero()[0]) - 2
        count = int(one.inputs[0, :query].any(-1).sum())
        alone = one._replace(
            **{
                name: torch.cat([getattr(one, name)[:, :count], getattr(one, name)[:, query:]], 1)
                for name in ("inputs", "targets", "scored")
            }
        )
        outputs = task.run(model, alone)
        torch.testing.assert_close(outputs[alone.scored], together[row : row + 1][one.scored])


@pytest.mark.parametrize("task_type", [GraphTraversalTask, ShortestPathTask])
def test_the_papers_curriculum_can_be_drawn(task_type: type) -> None:
    task = task_type()
    assert task.input_size == 92
    assert task.output_size == 90
    assert len(task.lessons) == {GraphTraversalTask: 14, ShortestPathTask: 15}[task_type]
    for size in range(1, len(task.lessons) + 1):
        assert task.sample(2, size, random(size)).scored.any(1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"curriculum": "3-5/1-2"}, ["curriculum", "3-5/1-2/1-3", "'3-5/1-2'"]),
        ({"curriculum": "3-5/1-2/x"}, ["curriculum", "'3-5/1-2/x'"]),
        ({"curriculum": "5-3/1-2/1"}, ["curriculum", "'5-3/1-2/1'"]),
        ({"curriculum": "3-5/1/1, 3-5/5-9/1"}, ["fewer edges out of a node than there are nodes, got 5 and 5"]),
        ({"curriculum": "1/1/1"}, ["curriculum", "within 2-1000/", "'1/1/1'"]),
        ({"base": 1}, ["base", "at least 2", "got 1"]),
        ({"num_digits": 0}, ["num_digits", "at least 1", "got 0"]),
        ({"base": 3, "num_digits": 1}, ["base, num_digits", "3 labels"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("task_type", [GraphTraversalTask, ShortestPathTask])
def test_bad_arguments_of_the_graph_tasks(task_type: type, arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        task_type(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_labels_too_many_to_draw_are_refused() -> None:
    """Each graph permutes them all."""
    GraphTraversalTask(base=10, num_digits=6)
    with pytest.raises(ValueError, match=r"base, num_digits: expected at most 1000000 labels.*, got 10, 20"):
        GraphTraversalTask(base=10, num_digits=20)


def test_paths_that_no_graph_has_are_refused() -> None:
    task = ShortestPathTask("3/2/4")  # three nodes, all joined
    with pytest.raises(ValueError, match="expected graphs in which there are such paths, got none for lesson 1"):
        task.sample(1, 1, random(0))
