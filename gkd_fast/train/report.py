"""Results as lines and tables on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_result(result: dict, console: Console) -> None:
    """The outcome of one training or evaluation."""
    test, validation = result["test_accuracy"], result["validation_accuracy"]
    line = f"{result['network']}: test {test:.2f} %, validation {validation:.2f} %"
    if "best" in result:
        best = result["best"]
        line += (
            f" after the last epoch (best epoch on validation {best['epoch'] + 1}: test {best['test_accuracy']:.2f} "
            f"%); {result['images_per_second']:.0f} images/s"
        )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if result.get("pair_weights"):
        change, ratio = result["pair_weights"], result["meta_step_over_train_step"]
        console.print(
            f"a meta-step takes {ratio:.1f} training steps; meta-learning changed the weights by "
            f"{change['mean_absolute_change']:.4f} in the mean and {change['largest_absolute_change']:.4f} at most, on "
            f"the embeddings of {change['images']} validation images",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_comparison(summary: dict, pictures: list[Path], console: Console) -> None:
    """All arms, their paired differences, costs, and what was shown."""
    console.print(_accuracy_table(summary))
    console.print(_meta_table(summary))
    if "costs" in summary:
        console.print(_cost_table(summary))
    console.print(summary["conclusion"], highlight=False, markup=False, soft_wrap=True)
    console.print("pictures: " + ", ".join(map(str, pictures)), highlight=False, markup=False, soft_wrap=True)


def _accuracy_table(summary: dict) -> Table:
    baseline, seeds = summary["baseline"], summary["seeds"]
    table = Table(
        title=f"Test accuracy in percent, {len(seeds)} paired seeds; teacher {summary['teacher']['test_accuracy']:.2f}"
    )
    headings = ("method", "last epoch", f"− {baseline}", "95 % interval", "best epoch*")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, arm in summary["arms"].items():
        difference = arm.get("difference")
        table.add_row(
            method,
            _spread(arm["test_accuracy"]),
            "" if difference is None else _spread(difference, "+"),
            "" if difference is None else _interval(difference),
            _spread(arm["best_epoch_test_accuracy"]),
        )
    table.caption = f"− {baseline}: paired difference; ±: standard deviation over seeds\n*: chosen on validation images"
    return table


def _meta_table(summary: dict) -> Table:
    table = Table(title="Training steps and meta-steps")
    for heading in ("method", "step", "meta-step", "|Δw| mean", "|Δw| largest"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, arm in summary["arms"].items():
        weights, ratio = arm["pair_weights"], arm["meta_step_over_train_step"]
        table.add_row(
            method,
            f"{1000 * arm['train_step_seconds']:.1f} ms",
            "" if ratio is None else f"{ratio:.1f} steps",
            "" if weights is None else f"{weights['mean_absolute_change']:.1e}",
            "" if weights is None else f"{weights['largest_absolute_change']:.1e}",
        )
    table.caption = "|Δw|: change of the pair weights by meta-learning, on fixed embeddings"
    return table


def _cost_table(summary: dict) -> Table:
    table = Table(title="A training step without and with the graph terms, and a meta-step")
    for name in ("batch size", "method, backend", "ms (median)", "peak MiB", "meta-step", "graph terms, MiB"):
        table.add_column(name, justify="left" if name == "method, backend" else "right")
    last = None
    for row in summary["costs"]:
        if last not in (None, row["batch_size"]):
            table.add_section()
        last = row["batch_size"]
        step = [f"{1000 * row['seconds']:.1f}", f"{row['peak_bytes'] / 2**20:.1f}"]
        meta = ["", ""]
        if "meta_over_train" in row:
            meta = [f"{row['meta_over_train']:.1f} steps", f"{row['graph_peak_bytes'] / 2**20:.1f}"]
        table.add_row(str(last), row["case"], *step, *meta)
    table.caption = f"{summary['machine']}; both networks included, but in the last column: their features are there"
    return table


def _spread(numbers: dict, sign: str = "") -> str:
    return f"{numbers['mean']:{sign}.2f}" + ("" if numbers["std"] is None else f" ± {numbers['std']:.2f}")


def _interval(numbers: dict) -> str:
    if numbers["half_width"] is None:
        return ""
    low, high = numbers["mean"] - numbers["half_width"], numbers["mean"] + numbers["half_width"]
    return f"[{low:+.2f}, {high:+.2f}]"
