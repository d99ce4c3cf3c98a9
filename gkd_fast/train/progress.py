"""What is seen while a training runs: a bar on a terminal, a line per epoch, nothing where it would be in the way."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress of one training.

    Args:
        console: where to.
        brief: notes alone, neither a bar nor a line per epoch.
    """

    def __init__(self, console: Console, brief: bool = False):
        self.console = console
        self.brief = brief
        self.bar: Progress | None = None

    def note(self, line: str) -> None:
        """A line that the user should see."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def epochs(self, name: str, epochs: int, batches: int):
        """Shows a training of so many epochs and batches in each."""
        self._epochs, self._batches = epochs, batches
        if self.brief or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
        )
        with Progress(*columns, console=self.console) as self.bar:
            self._task = self.bar.add_task(name, total=epochs * batches, speed=0.0, terms="")
            yield
        self.bar = None

    def epoch(self, epoch: int, batch: int) -> None:
        """An epoch begins, or goes on, at this batch."""
        if self.bar is not None:
            self.bar.update(self._task, completed=epoch * self._batches + batch)

    def step(self, position, terms: dict[str, float]) -> None:
        """The last step's terms are known."""
        if self.bar is not None:
            self.bar.update(
                self._task,
                completed=position.epoch * self._batches + position.batch,
                speed=position.images / max(position.seconds, 1e-9),
                terms=_terms(terms),
            )

    def epoch_done(self, record: dict) -> None:
        """An epoch is over."""
        if self.brief:
            return
        named = ("cross_entropy", "kd", "node", "relation", "teacher_graph")
        self.note(
            f"epoch {record['epoch'] + 1}/{self._epochs}  {_terms({k: record[k] for k in named if k in record})}  "
            f"validation {record['validation_accuracy']:.2f} %"
        )


def _terms(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
