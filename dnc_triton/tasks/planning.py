"""Tasks in which the network acts, sees the result, and acts again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dnc_triton.tasks.base import Batch, Task

TRIES = 100  # rounds in which problems of a lesson are drawn before giving up
FAR = 2**31  # stands for the moves to a goal that cannot be reached


class Judged(NamedTuple):
    """The result of one answer, in every row.

    Attributes:
        log_likelihood: [B], of answering with any of the moves that are right here; 0 where there is none.
        wrong: [B] bool: the answer is none of them.
        feedback: [B, input_size], the next step's input.
        situation: after it.
    """

    log_likelihood: Tensor
    wrong: Tensor
    feedback: Tensor
    situation: Any


class PlanningTask(Task):
    """A task answered by moves: right is every move on a shortest way from where the earlier moves led.

    The loss of a move is −log of the total probability of all moves that are right there, so a network may decide for
    one of several shortest ways at no cost. The steps run one after the other because each one's input shows what the
    previous answer did, the network's own in training as in evaluation; this is DAGGER with β = 0, where the expert
    answers for the states that the network itself reaches.

    The answer begins at the same step in every row, the first that is scored. From there on the inputs of a batch show
    the target's moves; `run` replaces them by the network's own.
    """

    unit: ClassVar[str] = "move"

    @abstractmethod
    def begin(self, batch: Batch) -> Any:
        """The situation before the first move."""

    @abstractmethod
    def judge(self, situation: Any, outputs: Tensor) -> Judged:
        """What outputs [B, output_size] do in a situation."""

    def read(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Any]:
        """Outputs and state of a model after all the inputs up to the first answer's."""
        outputs, state = model(inputs)
        return outputs, state

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        first, steps = first_answer(batch), batch.inputs.shape[1]
        outputs, state = self.read(model, batch.inputs[:, : first + 1])
        answers = [outputs]
        situation = self.begin(batch)
        for _ in range(first + 1, steps):
            answer = answers[-1][:, -1].detach()
            # Judged as the loss will judge it: under autocast the likeliest move might be a different one.
            with torch.autocast(answer.device.type, enabled=False):
                judged = self.judge(situation, answer.to(torch.promote_types(answer.dtype, torch.float32)))
            situation = judged.situation
            outputs, state = model(judged.feedback.to(batch.inputs.dtype).unsqueeze(1), state)
            answers.append(outputs)
        return torch.cat(answers, 1)

    def judged(self, outputs: Tensor, batch: Batch) -> Iterator[tuple[int, Judged]]:
        """The result of each answer, with its step."""
        situation = self.begin(batch)
        for step in range(first_answer(batch), batch.inputs.shape[1]):
            judged = self.judge(situation, outputs[:, step])
            situation = judged.situation
            yield step, judged

    def _judge_all(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-likelihood and wrong of every step, [B, T]; 0 and False where nothing is scored."""
        log_likelihood = outputs.new_zeros(batch.scored.shape)
        wrong = torch.zeros_like(batch.scored)
        for step, judged in self.judged(outputs, batch):
            log_likelihood[:, step] = torch.where(batch.scored[:, step], judged.log_likelihood, 0)
            wrong[:, step] = judged.wrong & batch.scored[:, step]
        return log_likelihood, wrong

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return -self._judge_all(outputs, batch)[0].sum()

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._judge_all(outputs, batch)[1].unsqueeze(-1)

    def units(self, batch: Batch) -> Tensor:
        return batch.scored.sum()


def first_answer(batch: Batch) -> int:
    """The step of the first answer."""
    return int(batch.scored.any(0).nonzero()[0])


def log_sum(values: Tensor, chosen: Tensor) -> Tensor:
    """log Σ exp of the chosen values [B, E]; 0, without a gradient, in rows where none is chosen."""
    some = chosen.any(1)
    kept = torch.where(chosen | ~some.unsqueeze(1), values, -torch.inf)
    return torch.where(some, kept.logsumexp(1), 0)
