"""A training from start to end: epochs, evaluation, checkpoints, metrics; stopped and resumed at any batch."""

import contextlib
import copy
import signal
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from gkd_fast.train import checkpoint
from gkd_fast.train.build import build_distiller, build_scheduler, load_network, weights_file
from gkd_fast.train.config import Config, TrainError, TrainingConfig, relevant_options
from gkd_fast.train.data import Images, Splits, epoch_order, load_splits
from gkd_fast.train.devices import Clock, make_accelerator
from gkd_fast.train.engine import Distiller
from gkd_fast.train.evaluation import accuracy, evaluation_batch_size, load_batches
from gkd_fast.train.files import BEST_WEIGHTS_FILE, CONFIG_FILE, RESULT_FILE, write_json, write_weights
from gkd_fast.train.methods import held_out, stream_seed
from gkd_fast.train.metrics import MetricsLog
from gkd_fast.train.progress import Display

# Losses are read back, which waits for the device, once in so many steps.
STEPS_BETWEEN_CHECKS = 10
# Images whose embeddings show what meta-learning did to the pair weights.
WEIGHT_IMAGES = 256


def _mixup(alpha: float, num_classes: int):
    """Mixes a batch's images, and its labels to probabilities (Zhang et al., 2018); at α = 0 leaves both alone."""
    if not alpha:
        return lambda images, labels: (images, labels)
    from torchvision.transforms import v2  # takes a second to import

    return v2.MixUp(alpha=alpha, num_classes=num_classes)


class Interrupted(Exception):
    """The user stopped the training; a checkpoint holds it."""


@dataclass
class Position:
    """Where a training is, and what it has gathered on the way: all that a resumed one needs beside the networks."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    term_sums: dict[str, float] = field(default_factory=dict)
    term_steps: int = 0
    gradient_shares: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float | list[float]] = field(default_factory=dict)
    train_step_seconds: list[float] = field(default_factory=list)
    meta_step_seconds: list[float] = field(default_factory=list)
    best: dict[str, float] | None = None


def train(config: Config, role: str, display: Display) -> dict:
    """Trains a teacher or a student and writes everything to ``config.output``.

    Args:
        config: all options.
        role: "teacher" (its network, by cross-entropy) or "student" (by ``config.method``).
        display: where progress is shown.

    Returns:
        The result, as in result.json.

    Raises:
        TrainError, DataError, ValueError: something the user can put right.
        Interrupted: the user stopped it.
    """
    accelerator = make_accelerator(config)
    splits = load_splits(config.data, config.seed)
    method, network, training, teacher = "ce", config.teacher_network, config.teacher_training, None
    if role == "student":
        method, network, training = config.method, config.student_network, config.student_training
        if config.teacher is not None:
            teacher = load_network(config.teacher_network, splits, weights_file(config.teacher), display.note)
    distiller = build_distiller(config, splits, method, network, training, teacher, accelerator)
    run = Run(config, role, training, splits, distiller, accelerator, display)
    return run.fit(method, network.name)


class Run:
    """One training in one folder."""

    def __init__(
        self,
        config: Config,
        role: str,
        training: TrainingConfig,
        splits: Splits,
        distiller: Distiller,
        accelerator: Accelerator,
        display: Display,
    ):
        self.config = config
        self.training = training
        self.splits = splits
        self.distiller = distiller
        self.accelerator = accelerator
        self.display = display
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.options = relevant_options(config, role)
        self.position = Position()
        self.untrained_weights = copy.deepcopy(distiller.pair_weights)
        inner_optimizer = getattr(distiller.optimizer, "optimizer", distiller.optimizer)
        self.scheduler = build_scheduler(training, inner_optimizer)
        self.mix = _mixup(training.mixup, splits.num_classes)
        self.stop_asked = False
        self._pending: list[dict[str, Tensor]] = []

    def fit(self, method: str, network: str) -> dict:
        """Trains to the last epoch, from the start or from the last checkpoint, and writes the result."""
        if not self._epoch_batches(0):
            size = self.training.batch_size
            raise TrainError(f"an epoch has no batch: {len(self.splits.train)} images, batch size {size}")
        beside = len(self.splits.train) - len(self._global_batches(0)[0])
        needed = 2 * self.accelerator.num_processes
        if self.distiller.pair_weights is not None and self.config.meta.outer_batch == "held-out" and beside < needed:
            raise TrainError(f"outer_batch held-out needs {needed} training images beside a batch, there are {beside}")
        self._open()
        self.network = network
        epochs = self.training.epochs
        shown = self.display.epochs(self.folder.name, epochs, len(self._epoch_batches(0)))
        with contextlib.closing(self.metrics), self._stoppable(), shown:
            while self.position.epoch < epochs:
                self._run_epoch()
        result = {
            "role": self.options["role"],
            "method": method,
            "network": network,
            "seed": self.config.seed,
            **self._accuracies(),
            "best": self.position.best,
            **self._costs(),
            "pair_weights": self._pair_weight_change(),
        }
        if self.accelerator.is_main_process:
            write_weights(self.distiller.student, self.folder / "weights.pt", network)
            write_json(self.folder / RESULT_FILE, result)
        self.accelerator.wait_for_everyone()
        return result

    def _open(self) -> None:
        """Starts afresh, or restores the last checkpoint and forgets what was logged after it."""
        if not self.config.resume and (checkpoint.exists(self.checkpoints) or (self.folder / RESULT_FILE).exists()):
            raise TrainError(f"{self.folder} already holds a run: go on with --resume, or choose another --output")
        set_seed(stream_seed(self.config.seed, "training", self.accelerator.process_index) % 2**32)
        state = checkpoint.load_newest(self.accelerator, self.checkpoints, self.options, self.display.note)
        if state is not None:
            self._restore(state)
            self.display.note(f"{self.folder}: going on at epoch {self.position.epoch}, batch {self.position.batch}")
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG_FILE).write_text(yaml.safe_dump(asdict(self.config), sort_keys=False))
        self.metrics = MetricsLog(self.folder, self.position.epoch, self.accelerator, asdict(self.config))

    def _run_epoch(self) -> None:
        position = self.position
        self.splits.train.set_epoch(position.epoch)
        batches = self._epoch_batches(position.epoch)
        self.display.epoch(position.epoch, position.batch)
        started = time.perf_counter()
        for images, labels in self._load(self.splits.train, batches[position.batch :]):
            if position.batch == 0 and self._diagnosing():
                # Of a whole batch: the last of an epoch may be short.
                position.gradient_shares = self.distiller.gradient_shares(images, labels)
                position.diagnostics = self.distiller.diagnostics(images)
            self._step(images, labels)
            position.batch += 1
            position.step += 1
            position.images += len(images) * self.accelerator.num_processes
            position.seconds, started = position.seconds + time.perf_counter() - started, time.perf_counter()
            checking = position.step % STEPS_BETWEEN_CHECKS == 0
            if checking:
                self._check_terms()
            if position.batch < len(batches):
                if position.step % self.config.save_every == 0:
                    self._save()
                if checking or self.accelerator.num_processes == 1:
                    self._stop_if_asked()
        self._check_terms()
        self._finish_epoch()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """A training step and, where it is due, a meta-step; both timed now and then."""
        batch = self.position.batch
        timed = batch % self.config.meta.interval == 0
        clock = Clock(self.accelerator.device, timed)
        images, labels = self.mix(images, labels)
        self._pending.append(self.distiller.train_step(images, labels))
        clock.lap(self.position.train_step_seconds)
        if self.distiller.meta_due(batch):
            self.distiller.meta_step(images, labels, self._outer_batch())
            clock.lap(self.position.meta_step_seconds)

    def _outer_batch(self) -> tuple[Tensor, Tensor] | None:
        """The images and labels of the meta-step's outer loss; None: those of the current batch."""
        if self.config.meta.outer_batch == "current":
            return None
        position = self.position
        current = self._global_batches(position.epoch)[position.batch]
        chosen = held_out(len(self.splits.train), current, stream_seed(self.config.seed, "held-out", position.step))
        return next(iter(load_batches(self.splits.train, [self._share(chosen)], 0, self.accelerator.device)))

    def _finish_epoch(self) -> None:
        position = self.position
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        record = {
            "epoch": position.epoch,
            "learning_rate": learning_rate,
            **{name: total / position.term_steps for name, total in position.term_sums.items()},
            "validation_accuracy": self._accuracy(self.splits.validation),
        }
        if position.best is None or record["validation_accuracy"] > position.best["validation_accuracy"]:
            position.best = {
                "epoch": position.epoch,
                "validation_accuracy": record["validation_accuracy"],
                "test_accuracy": self._accuracy(self.splits.test),
            }
            if self.accelerator.is_main_process:
                write_weights(self.distiller.student, self.folder / BEST_WEIGHTS_FILE, self.network)
        if self._diagnosing():
            record["gradient_shares"] = position.gradient_shares
            record["diagnostics"] = position.diagnostics
        self.metrics.write(record)
        self.display.epoch_done(record)
        position.epoch, position.batch, position.term_sums, position.term_steps = position.epoch + 1, 0, {}, 0
        self._save()

    def _diagnosing(self) -> bool:
        """Whether this epoch has a look at the graphs."""
        return self.distiller.criterion is not None and self.position.epoch % self.config.diagnostics_every == 0

    def _check_terms(self) -> None:
        """Adds the terms of the last steps to the epoch's sums, and stops the training where one is not finite."""
        if not self._pending:
            return
        names = list(self._pending[0])
        values = torch.stack([torch.stack([terms[name] for name in names]) for terms in self._pending]).double().cpu()
        self._pending = []
        for name, column in zip(names, values.unbind(1)):
            if not column.isfinite().all():
                raise TrainError(
                    f"the {name} term is {column[~column.isfinite()][0].item()} in epoch {self.position.epoch}, around "
                    f"step {self.position.step}: a smaller learning rate may help; the checkpoints are from before"
                )
            # One by one: the sum's rounding must not depend on where a checkpoint cut the epoch.
            for value in column.tolist():
                self.position.term_sums[name] = self.position.term_sums.get(name, 0.0) + value
        self.position.term_steps += len(values)
        self.display.step(self.position, dict(zip(names, values[-1].tolist())))

    def _stop_if_asked(self) -> None:
        asked = torch.tensor(float(self.stop_asked), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item() > 0:
            self._save()
            raise Interrupted(str(self.folder))

    def _save(self) -> None:
        self._check_terms()
        distiller = self.distiller
        state = {
            "position": asdict(self.position),
            "scheduler": self.scheduler.state_dict(),
            "meta_optimizer": distiller.meta_optimizer and distiller.meta_optimizer.state_dict(),
        }
        checkpoint.save(self.accelerator, self.checkpoints, self.position.step, state, self.options)

    def _restore(self, state: dict) -> None:
        self.position = Position(**state["position"])
        self.distiller.step = self.position.step
        self.scheduler.load_state_dict(state["scheduler"])
        if self.distiller.meta_optimizer is not None:
            self.distiller.meta_optimizer.load_state_dict(state["meta_optimizer"])

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """This process's share of every batch of an epoch."""
        return [self._share(batch) for batch in self._global_batches(epoch)]

    def _global_batches(self, epoch: int) -> list[list[int]]:
        """Every batch of an epoch of which each process has at least two images."""
        size, processes = self.training.batch_size, self.accelerator.num_processes
        order = epoch_order(len(self.splits.train), self.config.seed, epoch)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        kept = [b for b in batches if len(b) >= 2 * processes and (len(b) == size or not self.training.drop_last)]
        return [batch[: len(batch) // processes * processes] for batch in kept][: self.config.limit_batches]

    def _share(self, batch: list[int]) -> list[int]:
        """This process's images of a batch; equal numbers, so that means over processes are those over images."""
        processes = self.accelerator.num_processes
        return batch[: len(batch) // processes * processes][self.accelerator.process_index :: processes]

    def _load(self, images: Images, batches: list[list[int]]):
        return load_batches(images, batches, self.config.data.workers, self.accelerator.device)

    def _accuracy(self, images: Images) -> float:
        student, workers = self.distiller.student, self.config.data.workers
        return accuracy(student, images, evaluation_batch_size(self.config, self.training), self.accelerator, workers)

    def _accuracies(self) -> dict[str, float]:
        return {
            "test_accuracy": self._accuracy(self.splits.test),
            "validation_accuracy": self._accuracy(self.splits.validation),
        }

    def _costs(self) -> dict:
        position = self.position
        train, meta = (
            statistics.median(seconds) if seconds else None
            for seconds in (position.train_step_seconds, position.meta_step_seconds)
        )
        return {
            "images_per_second": position.images / position.seconds,
            "train_step_seconds": train,
            "meta_step_seconds": meta,
            "meta_step_over_train_step": meta and meta / train,
        }

    @torch.no_grad()
    def _pair_weight_change(self) -> dict | None:
        """What meta-learning did to the weights, on one fixed set of embeddings: the trained student's, of validation
        images. The embeddings' own change over the training does not enter."""
        distiller = self.distiller
        if distiller.pair_weights is None:
            return None
        distiller.module.eval()
        count = min(WEIGHT_IMAGES, len(self.splits.validation))
        x, _ = next(iter(self._load(self.splits.validation, [self._share(list(range(count)))])))
        outputs = distiller.module.student_outputs(x), distiller.module.teacher_outputs(x)
        embeddings = distiller.criterion.embed(*(side.features for side in outputs))
        trained = distiller.pair_weights(*embeddings)
        untrained = self.untrained_weights.to(trained.device)(*embeddings)
        trained, untrained = self.accelerator.gather((trained, untrained))
        change = (trained - untrained).abs()
        return {
            "images": len(trained),
            "untrained": untrained.mean(dim=0).tolist(),
            "trained": trained.mean(dim=0).tolist(),
            "mean_absolute_change": change.mean().item(),
            "largest_absolute_change": change.max().item(),
        }

    @contextlib.contextmanager
    def _stoppable(self):
        """Ctrl-C asks for a stop after the current step; a second one stops at once."""

        def ask(number, frame):
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
