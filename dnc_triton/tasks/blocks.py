"""Blocks on a board, to be moved until a goal is reached."""

from __future__ import annotations

import functools
import itertools
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.tasks.base import Batch, check_at_least
from dnc_triton.tasks.curriculum import Span, describe, integers, lesson_of, read_curriculum, with_earlier
from dnc_triton.tasks.planning import FAR, TRIES, Judged, PlanningTask, first_answer, log_sum

MOST_BOARDS = 1_000_000  # all their moves are computed in advance, in under a minute
RELATIONS = ("above", "below", "left of", "right of")  # in which two blocks touch
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Extended Data Table 6 of the paper: goals, blocks, constraints of a goal, search depth of each lesson.
MINI_SHRDLU = (
    "2/3/1/1, 2-3/3-4/1-2/1, 3/4/1-2/1-2, 3-4/4-5/2/1-2, 4/5/2/2, 4-5/5-6/2-3/2, 5/5-6/2-3/2-3, 5-6/6/3/2-3, "
    "6/6/3/3, 6-7/6/3-4/3-4, 7/6/3-4/3-4, 7-8/6/4/3-4, 8/6/4/4, 8-9/6/4-5/4, 9/6/4-5/4-5, 9-10/6/5/4-5, 10/6/5/5, "
    "10/6/5-6/5, 10/6/5-6/5-6, 10/6/6/5-6, 10/6/6/6, 10/6/6/6, 10/6/6/6-7, 10/6/6/6-7, 10/6/6/7, 10/6/1-6/1-7"
)


class Lesson(NamedTuple):
    """Ranges, both ends included, from which a puzzle is drawn; depth is how many moves away a goal is looked for."""

    goals: Span
    blocks: Span
    constraints: Span
    depth: Span


class World(NamedTuple):
    """Every arrangement of blocks on a board, for a range of their number. S states, M moves, C constraints.

    Attributes:
        boards: [S, size * size] int64: the block on each square, 0 for none; rows from the bottom up.
        num_blocks: [S].
        after: [S, M] int64: the state after a move; unchanged after the last move, which is to pass, and after one that
            cannot be made.
        possible: [S, M] bool: the move can be made.
        holds: [S, C] bool; the constraints in the order of `constraints`.
        constraints: (first, relation, second): block, index into RELATIONS, block.
        codes: [S] int64, boards as numbers, ascending.
    """

    boards: Tensor
    num_blocks: Tensor
    after: Tensor
    possible: Tensor
    holds: Tensor
    constraints: list[tuple[int, int, int]]
    codes: Tensor


def moves_of(size: int) -> list[tuple[int, int]]:
    """The moves of a board: the top block of one column onto another."""
    return list(itertools.permutations(range(size), 2))


@functools.lru_cache(maxsize=4)
def make_world(size: int, blocks: tuple[int, int]) -> World:
    """The world of a board of size × size squares with a number of blocks in a range."""
    columns = [
        split
        for count in range(blocks[0], blocks[1] + 1)
        for heights in itertools.product(range(size + 1), repeat=size)
        if sum(heights) == count
        for order in itertools.permutations(range(1, count + 1))
        for split in [_split(order, heights)]
    ]
    code = (blocks[1] + 1) ** torch.arange(size * size)
    boards = torch.tensor(
        [[col[row] if row < len(col) else 0 for row in range(size) for col in state] for state in columns]
    )
    codes, ascending = (boards * code).sum(1).sort()
    boards = boards[ascending]
    columns = [columns[index] for index in ascending.tolist()]
    index = {state: number for number, state in enumerate(columns)}
    after = torch.arange(len(columns)).unsqueeze(1).repeat(1, size * (size - 1) + 1)
    possible = torch.zeros(after.shape, dtype=torch.bool)
    possible[:, -1] = True
    for number, state in enumerate(columns):
        for move, (source, target) in enumerate(moves_of(size)):
            if state[source] and len(state[target]) < size:
                changed = list(state)
                changed[target] = (*state[target], state[source][-1])
                changed[source] = state[source][:-1]
                after[number, move] = index[tuple(changed)]
                possible[number, move] = True

    grid = F.pad(boards.unflatten(1, (size, size)), (0, 1, 0, 1))  # an empty row on top, an empty column at the right
    touching = {  # relation (above, left of) → first block, second block
        0: (grid[:, 1:, :-1], grid[:, :-1, :-1]),
        2: (grid[:, :-1, :-1], grid[:, :-1, 1:]),
    }
    constraints, holds = [], []
    for first, relation, second in itertools.product(range(1, blocks[1] + 1), range(4), range(1, blocks[1] + 1)):
        if first != second:
            a, b = (first, second) if relation % 2 == 0 else (second, first)
            here, there = touching[relation - relation % 2]
            constraints.append((first, relation, second))
            holds.append(((here == a) & (there == b)).flatten(1).any(1))
    return World(boards, (boards > 0).sum(1), after, possible, torch.stack(holds, 1), constraints, codes)


class _Puzzle(NamedTuple):
    """Where the moves have led.

    Attributes:
        moves: [B, S], how many from each state to the nearest one in which the goal holds; FAR where there is none.
        here: [B] state.
    """

    moves: Tensor
    here: Tensor


class BlockPuzzleTask(PlanningTask):
    """Move blocks on a board until the constraints of one of several goals hold (the paper's Mini-SHRDLU).

    A board has `board_size` columns that hold as many blocks each; a move puts the top block of a column onto another
    column. A goal is a letter with constraints: a block touches another from above, below, left, right. It is made from
    a board that is `depth` moves away from the first one: it may ask for what holds there and not yet on the first
    board, stated either way round.

    Input: at every step the board, one-hot for each square, rows from the bottom. The goals one after the other, a
    constraint per step: letter, first block, relation, second block, each one-hot. Then a step with the letter of one
    goal, all equally likely, and 1 on the last channel, which stays 1 while the network moves, one move per step; the
    board then shows the result of its moves. Target: as many moves as the lesson is deep; the last move of the list is
    to pass.

    Answers are right if the constraints hold after the last move. The loss of a move is −log of the total probability
    of the moves on a shortest way from the board reached or, once the constraints hold, of those that keep them. A move
    that cannot be made is wrong and changes nothing.

    Args:
        curriculum: the lessons, separated by commas: goals, blocks, constraints of a goal, depth, each a range.
        board_size: columns and rows of the board.
        num_letters: how many letters name goals.

    A tenth of the training batches is from earlier lessons.

    Source: Graves et al. 2016, Methods, "Mini-SHRDLU" and "Curriculum learning", Extended Data Table 6. There the
    network learns by reinforcement, from the number of constraints that hold; here, from the shortest ways themselves.
    """

    name: ClassVar[str] = "block_puzzle"
    summary: ClassVar[str] = "move blocks on a board until a goal is reached"
    arguments: ClassVar[dict[str, str]] = {
        "curriculum": "lessons separated by commas, each goals/blocks/constraints of a goal/depth, as 1-2/3/1/1",
        "board_size": "columns and rows of the board",
        "num_letters": "how many letters name goals",
    }

    def __init__(self, curriculum: str = MINI_SHRDLU, board_size: int = 3, num_letters: int = 26) -> None:
        check_at_least("board_size", board_size, 2)
        most = (len(LETTERS), board_size**2 - 1, 99, 99)
        lessons = read_curriculum(curriculum, "1-2/3/1/1", least=(1, 2, 1, 1), most=most)
        self.curriculum = [Lesson(*spans) for spans in lessons]
        goals = max(lesson.goals[1] for lesson in self.curriculum)
        if not goals <= num_letters <= len(LETTERS):
            raise ValueError(
                f"num_letters: expected at least {goals}, one for each goal, and at most {len(LETTERS)}, "
                f"got {num_letters}"
            )
        self.num_letters, self.board_size = num_letters, board_size
        self.least_blocks = min(lesson.blocks[0] for lesson in self.curriculum)
        self.num_blocks = max(lesson.blocks[1] for lesson in self.curriculum)
        boards = _count_boards(board_size, self.least_blocks, self.num_blocks)
        if boards > MOST_BOARDS:
            raise ValueError(
                f"board_size, curriculum: expected at most {MOST_BOARDS} boards, all of which are made, "
                f"got {board_size} columns, {self.num_blocks} blocks: "
                + (f"{boards} boards" if boards < 10**15 else "more than 10**15 boards")
            )
        self.vocabulary = [f"{a + 1}>{b + 1}" for a, b in moves_of(board_size)] + ["pass"]
        self.output_size = len(self.vocabulary)
        self.said_size = num_letters + 2 * self.num_blocks + len(RELATIONS)  # letter and constraint
        self.input_size = self.said_size + 1 + board_size**2 * self.num_blocks
        self.lessons = with_earlier(len(self.curriculum))
        names = ("goals", "blocks", "constraints each", "moves deep")
        self.evaluations = {
            f"lesson {size}: {describe(lesson, names)}": [size] for size, lesson in enumerate(self.curriculum, 1)
        }

    @property
    def world(self) -> World:
        """All possible boards, computed at the first use."""
        return make_world(self.board_size, (self.least_blocks, self.num_blocks))

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        lesson = lesson_of(self.curriculum, size)
        drawn: list[tuple[int, list[tuple[int, int]]]] = []  # with goals in the order in which they are stated
        for _ in range(TRIES):
            drawn += self._draw(batch_size, lesson, generator)
            if len(drawn) >= batch_size:
                break
        else:
            raise ValueError(f"curriculum: expected puzzles of this kind, got none for lesson {size}")
        starts, stated = zip(*drawn[:batch_size], strict=True)

        first = max(map(len, stated))  # step of the answer; shorter lists begin with steps of nothing
        steps = first + lesson.depth[1]
        ones: list[tuple[int, int, int]] = []  # (row, step, channel)
        for row, goals in enumerate(stated):
            for step, (letter, constraint) in enumerate(goals, first - len(goals)):
                ones += [(row, step, channel) for channel in self._channels(letter, constraint)]
            letters = sorted({letter for letter, _ in goals})  # each once, however many constraints it has
            ones.append((row, first, letters[int(torch.randint(len(letters), (1,), generator=generator))]))
        said = torch.zeros(batch_size, steps, self.said_size + 1)
        said[tuple(torch.tensor(ones).T)] = 1
        said[:, first:, -1] = 1
        here = torch.tensor(starts)
        boards = self._show_board(here).unsqueeze(1).repeat(1, steps, 1)
        targets = torch.zeros(batch_size, steps, 1, dtype=torch.int64)
        scored = (torch.arange(steps) >= first).expand(batch_size, -1)
        batch = Batch(torch.cat([said, boards], -1), targets, scored)
        # The target is one of the shortest ways, then to pass; the inputs show the boards on that way.
        puzzle = self.begin(batch)
        for step in range(first, steps):
            right = self._right_moves(puzzle)  # of several, the last in the list is the target
            targets[:, step, 0] = answer = self.output_size - 1 - right.flip(1).float().argmax(1)
            puzzle = puzzle._replace(here=self.world.after[puzzle.here, answer])
            if step + 1 < steps:
                batch.inputs[:, step + 1, self.said_size + 1 :] = self._show_board(puzzle.here)
        return batch

    def _draw(self, count: int, lesson: Lesson, generator: torch.Generator) -> list[tuple[int, list[tuple[int, int]]]]:
        """First boards with their goals, each (letter, constraint); fewer than `count` where no goal is that deep."""
        world = self.world
        blocks = integers(lesson.blocks, [count], generator).unsqueeze(1)
        start = (world.num_blocks == blocks).float().multinomial(1, generator=generator).squeeze(1)
        away = F.one_hot(start, len(world.boards)).bool()
        # On arrays: what follows is hundreds of small operations a batch, which take several times as long on tensors.
        distance = _moves_to(away, world, lesson.depth[1]).numpy()
        holds, held = world.holds.numpy(), world.holds.float()
        num_new = ((held.sum(1) - held[start] @ held.T) / 2).numpy()  # each is stated in two ways
        puzzles = []
        number = integers(lesson.goals, [count], generator).tolist()
        for row, here in enumerate(start.tolist()):
            letters = torch.randperm(self.num_letters, generator=generator)[: number[row]].tolist()
            goals: list[tuple[int, int]] = []
            for letter in letters:
                depth = int(integers(lesson.depth, [], generator))
                asked = int(integers(lesson.constraints, [], generator))
                boards = ((distance[row] == depth) & (num_new[row] >= asked)).nonzero()[0]
                if not len(boards):
                    break
                board = boards[int(torch.randint(len(boards), (1,), generator=generator))]
                facts = (holds[board] & ~holds[here]).nonzero()[0]
                facts = facts[torch.randperm(len(facts), generator=generator).numpy()]
                pairs: dict[frozenset[int], int] = {}  # two blocks touch in one way at most
                for fact in facts.tolist():
                    pairs.setdefault(frozenset(world.constraints[fact][::2]), fact)
                goals += [(letter, fact) for fact in list(pairs.values())[:asked]]
            else:
                puzzles.append((here, goals))
        return puzzles

    def _channels(self, letter: int, constraint: int) -> list[int]:
        first, relation, second = self.world.constraints[constraint]
        blocks = self.num_letters, self.num_letters + self.num_blocks + len(RELATIONS)
        return [letter, blocks[0] + first - 1, blocks[0] + self.num_blocks + relation, blocks[1] + second - 1]

    def _show_board(self, states: Tensor) -> Tensor:
        boards = self.world.boards.to(states.device)[states]
        return F.one_hot(boards, self.num_blocks + 1)[..., 1:].flatten(1).float()

    def _board(self, channels: Tensor) -> Tensor:
        squares = channels[..., self.said_size + 1 :].unflatten(-1, (-1, self.num_blocks))
        numbers = torch.arange(1, self.num_blocks + 1, device=channels.device)
        return (squares * numbers).sum(-1).long()

    def _said(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Letter [...] and constraint [...] of input steps; −1 where there is none."""
        sizes = [self.num_letters, self.num_blocks, len(RELATIONS), self.num_blocks]
        letter, first, relation, second = channels[..., : self.said_size].split(sizes, -1)
        numbers = first.argmax(-1), relation.argmax(-1), second.argmax(-1)
        # Constraints are counted as in make_world: second runs through all blocks but the first.
        others = numbers[2] - (numbers[2] > numbers[0]).long()
        constraint = (numbers[0] * len(RELATIONS) + numbers[1]) * (self.num_blocks - 1) + others
        return letter.argmax(-1).where(letter.any(-1), -1), constraint.where(first.any(-1), -1)

    def begin(self, batch: Batch) -> _Puzzle:
        world = World._make(part if isinstance(part, list) else part.to(batch.inputs.device) for part in self.world)
        first = first_answer(batch)
        letters, constraints = self._said(batch.inputs[:, : first + 1])
        asked = (letters == letters[:, -1:]) & (constraints >= 0)  # [B, first + 1]
        held = world.holds.T[constraints.clamp(min=0)]  # [B, first + 1, S]
        board = self._board(batch.inputs[:, first])
        goal = (held | ~asked.unsqueeze(2)).all(1) & (world.num_blocks == (board > 0).sum(1, keepdim=True))
        code = (self.num_blocks + 1) ** torch.arange(board.shape[1], device=board.device)
        here = torch.searchsorted(world.codes, (board * code).sum(1))
        return _Puzzle(_moves_to(goal, world, len(world.boards)), here)

    def _right_moves(self, puzzle: _Puzzle) -> Tensor:
        """[B, M] bool: the moves that are on a shortest way, or keep what holds."""
        world, here = self.world, puzzle.here
        after = puzzle.moves.gather(1, world.after.to(here.device)[here])
        now = puzzle.moves.gather(1, here.unsqueeze(1))
        return (after == (now - 1).clamp(min=0)) & world.possible.to(here.device)[here]

    def judge(self, situation: _Puzzle, outputs: Tensor) -> Judged:
        right = self._right_moves(situation)
        answer = outputs.argmax(1, keepdim=True)
        here = self.world.after.to(outputs.device)[situation.here].gather(1, answer).squeeze(1)
        said = F.pad(outputs.new_ones(len(here), 1), (self.said_size, 0))
        feedback = torch.cat([said, self._show_board(here).to(outputs.dtype)], 1)
        return Judged(
            log_sum(outputs.log_softmax(1), right),
            ~right.gather(1, answer).squeeze(1),
            feedback,
            situation._replace(here=here),
        )

    def right(self, outputs: Tensor, batch: Batch) -> Tensor:
        *_, (_, last) = self.judged(outputs, batch)
        puzzle: _Puzzle = last.situation
        return puzzle.moves.gather(1, puzzle.here.unsqueeze(1)).squeeze(1) == 0

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        letters, constraints = (part[0].tolist() for part in self._said(batch.inputs))
        boards = self._board(batch.inputs[0]).unflatten(-1, (self.board_size, -1))
        texts = []
        for letter, constraint, board in zip(letters, constraints, boards.tolist(), strict=True):
            text = "|".join(
                "".join(str(row[column]) for row in board if row[column]) for column in range(self.board_size)
            )
            if constraint >= 0:
                first, relation, second = self.world.constraints[constraint]
                text = f"{LETTERS[letter]}: {first} {RELATIONS[relation]} {second}"
            elif letter >= 0:
                text = f"{LETTERS[letter]}! {text}"
            texts.append(text)
        answers = [batch.targets[0, :, 0], outputs[0].argmax(-1)]
        target, output = [
            [
                self.vocabulary[move] if shown else ""
                for move, shown in zip(moves.tolist(), batch.scored[0], strict=True)
            ]
            for moves in answers
        ]
        return {"input": texts, "target": target, "output": output}


def _moves_to(goal: Tensor, world: World, most: int) -> Tensor:
    """How many moves [B, S] it is from each state to the nearest in goal [B, S] bool; FAR if more than `most`.

    A move can always be undone, so the same table serves both directions.
    """
    moves = torch.full(goal.shape, FAR, device=goal.device)
    level = goal
    for count in range(most + 1):
        moves[level] = count
        if count == most or not level.any():
            break
        level = level[:, world.after].any(2) & (moves == FAR)
    return moves


def _count_boards(size: int, least: int, most: int) -> int:
    """The number of boards in a world, or of column heights to go through, whichever is larger."""
    ways = [1] + [0] * most  # by number of blocks, to place them in the columns so far
    for _ in range(size):
        ways = [sum(ways[max(0, blocks - size) : blocks + 1]) for blocks in range(most + 1)]
    boards = sum(ways[blocks] * math.factorial(blocks) for blocks in range(least, most + 1))
    return max(boards, (size + 1) ** size)


def _split(order: tuple[int, ...], heights: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    ends = list(itertools.accumulate(heights))
    return tuple(order[end - height : end] for end, height in zip(ends, heights, strict=True))
