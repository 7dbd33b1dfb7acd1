"""What learns in a run: a model with its optimizer and learning rate, on the devices that Fabric gives it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from dnc_triton.tasks import Batch, Task
from dnc_triton.training.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(device: str, precision: str) -> Fabric:
    """Fabric on a device of this machine, or on one for each process that torchrun started.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps"; with a number only without torchrun, which assigns numbers itself.
        precision: of `Settings`.

    Raises:
        ValueError: no such device.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind, _, number = device.partition(":")
    try:
        torch.empty(0, device=device)
        if number and world > 1:
            raise ValueError(f"torchrun gives each process a {kind} device of its own, name none")
        fabric = Fabric(
            accelerator=kind,
            devices=[int(number)] if number and kind != "cpu" else local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=precision,  # type: ignore[arg-type]
        )
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch's other sentences list its backends
        raise ValueError(f"--device: expected a device that this machine has, got {device!r}: {reason}") from error
    fabric.launch()
    return fabric


class _Solver(nn.Module):
    """All that a task does with a model, as one call for Fabric to wrap, however often the task calls the model."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        return self.task.run(self.model, batch)


class Learner:
    """A model, its optimizer and its learning rate's schedule.

    Args:
        task: the task to learn.
        model: the model, which is moved to the device.
        settings: of the run.
        fabric: device, precision and the other processes.
    """

    def __init__(self, task: Task, model: nn.Module, settings: Settings, fabric: Fabric) -> None:
        self.task, self.model, self.settings, self.fabric = task, model, settings, fabric
        options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.AdamW(model.parameters(), **options)
        else:
            self.optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9, **options)
        self.schedule = _schedule(self.optimizer, settings)
        self._solver, self._fabric_optimizer = fabric.setup(_Solver(task, model), self.optimizer)

    def backward(self, batch: Batch, units: Tensor, sequences: int) -> dict[str, Tensor]:
        """Leave the clipped gradient of the loss per scored unit in the parameters' `grad`, equal in every process.

        Args:
            batch: the sequences of this process.
            units, sequences: their numbers over all processes.

        Returns:
            this process's part of the loss, of the shares of units wrong and of sequences right, and of the gradient's
            norm before clipping; the parts add up.
        """
        outputs, loss = self._backward(batch, units)
        norm = self.fabric.clip_gradients(
            self._solver, self._fabric_optimizer, max_norm=self.settings.max_gradient_norm, error_if_nonfinite=False
        )
        assert norm is not None
        return {
            "loss": loss,
            f"{self.task.unit}_error": self.task.wrong(outputs, batch).sum() / units,
            "right": self.task.right(outputs, batch).sum() / sequences,
            "gradient_norm": norm / self.fabric.world_size,
        }

    def _backward(self, batch: Batch, units: Tensor) -> tuple[Tensor, Tensor]:
        self._solver.train()
        outputs = self._solver(batch)
        loss = self.task.loss(outputs, batch) / units
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over the processes, each of which has a part of the sum.
        self.fabric.backward(loss * self.fabric.world_size)
        return outputs.detach(), loss.detach()

    def update(self) -> None:
        """One step of the optimizer and of the learning rate, with the present gradient."""
        self._fabric_optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Tensor:
        """The outputs of the model in evaluation mode."""
        outputs: Tensor = self._solver.eval()(batch)
        return outputs

    def examine(self, batch: Batch, units: Tensor) -> dict[str, Tensor]:
        """All tensors of a step in the order in which they arise, with the gradient before clipping."""
        parameters = dict(self.model.named_parameters())
        tensors = {
            "inputs": batch.inputs,
            **{f"parameter {name}": value.detach() for name, value in parameters.items()},
        }
        outputs, loss = self._backward(batch, units)
        tensors |= {"outputs": outputs, "loss": loss}
        for name, value in reversed(parameters.items()):
            if value.grad is not None:
                tensors[f"gradient of {name}"] = value.grad
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, to be given to `load_state_dict`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is from a model with other parameters.
        """
        here = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        there = {name: list(value.shape) for name, value in state["model"].items()}
        for name in here | there:
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"checkpoint: expected {name} of shape {here.get(name)}, as the settings have it, "
                    f"got {there.get(name)}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler:
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, T_max=settings.steps - settings.warmup)
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if settings.warmup == 0:
        return main
    rise = LinearLR(optimizer, start_factor=1 / (settings.warmup + 1), total_iters=settings.warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[settings.warmup])
