"""The training loop.

Everything that a step does follows from the recipe and the step's number: the learning rate, the
order of the images, their augmentation, the share of zero group-sets. A checkpoint therefore holds
tensors and a step, and a resumed run repeats the uninterrupted one bit for bit (on the CPU, with
the same number of threads). Where ``torch.distributed`` is initialized, every process takes its
share of each batch (see :mod:`tvm_mars.qat.ranks`), and the first one writes the files.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from mars_runtime.errors import CapacityError, OptionError
from mars_runtime.program import write_atomically

from .calibration import calibrate
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Images, augment, batch_of
from .export import export
from .models import build_model
from .network import MarsNetwork
from .pruning import Pruner
from .quantization import prepare
from .ranks import Ranks, synchronize_norms
from .recipe import Recipe, Training, recipe_of

__all__ = ["Progress", "Trainer", "accuracy", "build_network", "learning_rate", "load_run"]

log = logging.getLogger("tvm_mars.qat")

LAST, FINAL, HISTORY, ONNX = "last.pt", "final.pt", "history.json", "net.onnx"
EVALUATION_BATCH = 500
Progress = Callable[[int, int, float, float], None]
"""Called after each step with step, steps, loss and seconds per step."""


def learning_rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0."""
    warm = training.warmup * steps_per_epoch
    total = training.epochs * steps_per_epoch
    if step < warm:
        return training.learning_rate * (step + 1) / (warm + 1)
    if training.schedule == "step":
        drops = step // (training.step_epochs * steps_per_epoch)
        return float(training.learning_rate * 0.1**drops)
    left = 1 - (step - warm) / max(total - warm, 1)
    if training.schedule == "linear":
        return training.learning_rate * left
    return training.learning_rate * (1 - math.cos(math.pi * left)) / 2


def _seed(recipe: Recipe, *numbers: int) -> int:
    """Mix numbers into a seed: streams of neighbouring steps must not resemble each other."""
    mixed = recipe.seed
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images that a network classifies rightly, in evaluation mode."""
    training = model.training
    model.eval()
    right = 0
    for chosen in torch.arange(len(images)).split(EVALUATION_BATCH):
        batch, labels = batch_of(images, chosen)
        right += int((model(batch).argmax(1) == labels).sum())
    model.train(training)
    return right / len(images)


def build_network(recipe: Recipe, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build the network of a recipe with random weights."""
    model = build_model(recipe.model, classes)
    if recipe.quantization is None:
        return model
    return prepare(model, recipe.quantization, shape)


def load_run(folder: str | Path) -> nn.Module:
    """Load what a finished run has trained (its moving average, if it kept one), for evaluation.

    Raises
    ------
    OptionError
        If the run has not come to its end.
    """
    path = Path(folder) / FINAL
    if not path.exists():
        raise OptionError("has not been trained to its end", where=str(folder), hint=f"no {path}")
    state = load_checkpoint(path)
    recipe = recipe_of(json.loads(state["recipe"]), str(path))
    model = build_network(recipe, state["classes"], tuple(state["shape"]))
    if recipe.pruning:
        Pruner(model, recipe.pruning)  # the shape of its masks
    model.load_state_dict(state["model"])
    return model.eval()


class Trainer:
    """One run of a recipe.

    Parameters
    ----------
    recipe : Recipe
    train, test : Images
    runs : path
        Folder of runs; this one keeps its checkpoint, final weights and history in
        ``runs/<recipe.name>``, and continues from there if they exist.
    device : str
        Where to compute, such as ``cpu`` or ``cuda``. cuDNN's TF32 is switched off.
    threads : int
        Threads of the CPU; None: as PyTorch chooses.
    progress : callable
        Told after each step.
    tensorboard : path
        Folder of a TensorBoard log (needs the ``tensorboard`` package).

    Examples
    --------
    ``Trainer(load_recipe("resnet20-dense"), *load_data("cifar10.npz"), "runs").run()``
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Images,
        test: Images,
        runs: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        progress: Progress | None = None,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.images, self.test = train.to(self.device), test.to(self.device)
        torch.backends.cudnn.allow_tf32 = False
        if threads:
            torch.set_num_threads(threads)
        self.runs, self.folder = Path(runs), Path(runs) / recipe.name
        self.progress, self.tensorboard = progress, tensorboard
        self.ranks = Ranks.current()
        if recipe.training.batch % self.ranks.count:
            raise OptionError(
                f"a batch of {recipe.training.batch} is not shared evenly by {self.ranks.count} "
                "processes",
                where=recipe.name,
            )
        self.steps_per_epoch = len(train) // recipe.training.batch
        if not self.steps_per_epoch:
            raise OptionError(
                f"{len(train)} images give no batch of {recipe.training.batch}", where=recipe.name
            )
        self.steps = recipe.training.epochs * self.steps_per_epoch
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        torch.manual_seed(_seed(recipe))
        self.model = self._build()
        self.pruner = Pruner(self.model, recipe.pruning) if recipe.pruning else None
        self.average = _Average(self.model, recipe.training.ema) if recipe.training.ema else None
        self.teacher = self._teacher()
        self.optimizer = _optimizer(self.model, recipe.training)

    def _build(self) -> nn.Module:
        recipe = self.recipe
        if recipe.init:
            model = load_run(self.runs / recipe.init)
            if recipe.quantization is not None and not isinstance(model, MarsNetwork):
                model = prepare(model, recipe.quantization, self.images.shape)
        else:
            model = build_network(recipe, self.images.classes, self.images.shape)
        if isinstance(model, MarsNetwork) and recipe.calibration:
            chosen = torch.arange(min(recipe.calibration, len(self.images)))
            pixels = batch_of(self.images, chosen)[0].cpu()
            calibrate(model, pixels, weight_scaling=recipe.weight_scaling)
        if self.ranks.count > 1:
            synchronize_norms(model)
        if recipe.training.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def _teacher(self) -> nn.Module | None:
        wanted = self.recipe.distillation
        if wanted is None:
            return None
        teacher = load_run(self.runs / wanted.teacher)
        teacher = teacher.to(self.device, memory_format=torch.channels_last)
        return teacher.requires_grad_(False)

    # -- state --

    def state(self) -> dict[str, Any]:
        """Everything that continuing needs."""
        return {
            "recipe": json.dumps(attrs.asdict(self.recipe)),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else {},
            "history": self.history,
            "losses": self.losses,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises
        ------
        OptionError
            If it comes from another recipe.
        """
        given, ours = json.loads(state["recipe"]), attrs.asdict(self.recipe)
        if given != json.loads(json.dumps(ours)):
            changed = ", ".join(key for key in ours if given.get(key) != ours[key])
            raise OptionError(
                f"the checkpoint comes from a recipe that differs in {changed}",
                where=str(self.folder),
                hint="name the changed recipe otherwise, or remove the run",
            )
        self.step, self.history, self.losses = state["step"], state["history"], state["losses"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load(state["average"])

    def save(self) -> None:
        """Write the checkpoint."""
        if self.ranks.first:
            save_checkpoint(self.folder / LAST, self.state())

    # -- running --

    def run(self, *, save_seconds: float = 300.0, stop_after: int | None = None) -> nn.Module:
        """Train to the end, or until SIGINT or SIGTERM, which leave a checkpoint.

        Parameters
        ----------
        save_seconds : float
            Time between checkpoints within an epoch; each epoch also ends with one.
        stop_after : int
            Stop at this step, with a checkpoint.

        Returns
        -------
        nn.Module
            The network, in evaluation mode (its moving average, if it kept one).
        """
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / LAST).exists():
            self.load_state(load_checkpoint(self.folder / LAST))
            log.info("%s: continuing at step %d of %d", self.recipe.name, self.step, self.steps)
        self.ranks.check_same(self.model.state_dict().items())
        end = min(self.steps, stop_after if stop_after is not None else self.steps)
        self.model.train()
        saved = time.monotonic()
        with _stopping() as stop, self._summary() as summary:
            while self.step < end and not self.ranks.any(bool(stop)):
                begun = time.monotonic()
                self.losses.append(self.train_step())
                now = time.monotonic()
                if self.progress:
                    self.progress(self.step, self.steps, self.losses[-1], now - begun)
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch(summary)
                elif now - saved < save_seconds:
                    continue
                self.save()
                saved = now
            self.save()
        model = self.evaluated()
        if self.finished and self.ranks.first:
            self._finish(model)
        self.ranks.wait()
        return model.eval()

    @property
    def finished(self) -> bool:
        """Whether all steps have been trained."""
        return self.step == self.steps

    def _finish(self, model: nn.Module) -> None:
        """Write the final weights, and the network as ONNX where it has integers."""
        state = {
            "recipe": json.dumps(attrs.asdict(self.recipe)),
            "classes": self.images.classes,
            "shape": self.images.shape,
            "history": self.history,
            "model": model.state_dict(),
        }
        save_checkpoint(self.folder / FINAL, state)
        if isinstance(model, MarsNetwork) and model.method == "mars":
            try:
                export(model.eval(), self.folder / ONNX)
            except CapacityError as error:
                log.warning("%s: not exported: %s", self.recipe.name, error)

    def train_step(self) -> float:
        """Train on the next batch and give its loss."""
        training, recipe = self.recipe.training, self.recipe
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0 or self._epoch_order is None:
            order = torch.Generator().manual_seed(_seed(recipe, epoch, 1))
            self._epoch_order = torch.randperm(len(self.images), generator=order)
        chosen = self._epoch_order[position * training.batch :][: training.batch]
        generator = torch.Generator().manual_seed(_seed(recipe, self.step, 2))
        torch.manual_seed(_seed(recipe, self.step, 3 + self.ranks.index))  # dropout
        batch, labels = batch_of(self.images, chosen)
        # Of the whole batch, so that no image's augmentation depends on the number of ranks.
        batch = self.ranks.part(augment(batch, recipe.augmentation, generator))
        labels = self.ranks.part(labels)
        if training.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step, self.steps_per_epoch)
        if isinstance(self.model, MarsNetwork):
            self.model.freeze_statistics(self.step >= training.freeze_statistics * self.steps)
        if self.pruner:
            self.pruner.before_step(self.step / self.steps)
        loss = self._loss(batch, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average(p.grad for p in self.model.parameters() if p.grad is not None)
        if training.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        self.optimizer.step()
        if self.pruner:
            self.pruner.after_step(self.optimizer.param_groups[0]["lr"])
        self.step += 1
        if self.average:
            self.average.update(self.model, self.step)
        return self.ranks.mean(loss)

    _epoch_order: Tensor | None = None

    def _loss(self, batch: Tensor, labels: Tensor) -> Tensor:
        training, distillation = self.recipe.training, self.recipe.distillation
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.amp == "bf16"):
            logits = self.model(batch)
            if self.teacher is not None:
                taught = self.teacher(batch)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        if distillation is not None:
            heat = distillation.temperature
            term = functional.kl_div(
                functional.log_softmax(logits / heat, 1),
                functional.log_softmax(taught.float() / heat, 1),
                log_target=True,
                reduction="batchmean",
            )
            loss = (1 - distillation.weight) * loss + distillation.weight * heat**2 * term
        if self.pruner:
            loss = loss + self.pruner.penalty()
        return loss

    def evaluated(self) -> nn.Module:
        """Give the network that is evaluated and exported."""
        if self.average is None:
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average.values)
        return model

    def _end_epoch(self, summary: Any) -> None:
        epoch = self.step // self.steps_per_epoch
        self.ranks.check_same(self.model.state_dict().items())
        entry: dict[str, Any] = {
            "epoch": epoch,
            "learning rate": self.optimizer.param_groups[0]["lr"],
            "loss": sum(self.losses) / len(self.losses),
        }
        due = self.finished or epoch % self.recipe.training.evaluate_every == 0
        if due and self.ranks.first:
            entry["test accuracy"] = accuracy(self.evaluated(), self.test)
        if self.pruner:
            entry["zero group-sets"] = self.pruner.share()
        self.history.append(entry)
        self.losses = []
        if not self.ranks.first:
            return
        text = json.dumps({"recipe": attrs.asdict(self.recipe), "epochs": self.history}, indent=2)
        write_atomically(self.folder / HISTORY, f"{text}\n".encode())
        log.info("%s: %s", self.recipe.name, json.dumps(entry))
        if summary is not None:
            for key, value in entry.items():
                summary.add_scalar(key, value, entry["epoch"])

    @contextlib.contextmanager
    def _summary(self) -> Iterator[Any]:
        if self.tensorboard is None or not self.ranks.first:
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.tensorboard)) as writer:
            yield writer


class _Average:
    """Exponential moving average of parameters and of moving averages; other state is copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {key: value.clone() for key, value in model.state_dict().items()}

    def load(self, values: dict[str, Tensor]) -> None:
        """Continue from given values."""
        for key, value in values.items():
            self.values[key].copy_(value)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step; early steps weigh more."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averaged = {key for key, _ in model.named_parameters()}
        for key, value in model.state_dict().items():
            if key in averaged or key.endswith(("running_mean", "running_var")):
                self.values[key].lerp_(value, share)
            else:
                self.values[key].copy_(value)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decaying, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, training.learning_rate, momentum=training.momentum, nesterov=training.momentum > 0
    )


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
