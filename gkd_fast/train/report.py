"""Tables on the terminal and pictures in the run's folder."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, with no display

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

TERMS = ("cross_entropy", "kd", "node", "relation", "teacher_graph")


def print_result(result: dict, console: Console) -> None:
    """The outcome of one training or evaluation."""
    line = f"{result['network']}: test {result['test_accuracy']:.2f} %, validation {result['validation_accuracy']:.2f} %"
    if "best" in result:
        best = result["best"]
        line += (
            f" after the last epoch (best epoch on validation {best['epoch'] + 1}: test {best['test_accuracy']:.2f} %); "
            f"{result['images_per_second']:.0f} images/s"
        )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if result.get("pair_weights"):
        change, ratio = result["pair_weights"], result["meta_step_over_train_step"]
        console.print(
            f"a meta-step takes {ratio:.1f} training steps; meta-learning changed the weights by "
            f"{change['mean_absolute_change']:.4f} in the mean and {change['largest_absolute_change']:.4f} at most, on the "
            f"embeddings of {change['images']} validation images",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_comparison(summary: dict, pictures: list[Path], console: Console) -> None:
    """All arms, their paired differences, costs, and what was shown."""
    console.print(_accuracy_table(summary))
    if "costs" in summary:
        console.print(_cost_table(summary))
    for sentence in summary["conclusions"]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print("pictures: " + ", ".join(map(str, pictures)), highlight=False, markup=False, soft_wrap=True)


def _accuracy_table(summary: dict) -> Table:
    baseline, seeds = summary["baseline"], summary["seeds"]
    table = Table(
        title=f"Test accuracy in percent, {len(seeds)} paired seeds; teacher {summary['teacher']['test_accuracy']:.2f}"
    )
    columns = (
        "method",
        "last epoch",
        f"paired difference to {baseline} (± std) [95 % interval]",
        "best epoch, chosen on validation",
        "step ms",
        "meta-step / step",
        "|Δw|",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, arm in summary["arms"].items():
        difference, weights, ratio = arm.get("difference"), arm["pair_weights"], arm["meta_step_over_train_step"]
        table.add_row(
            method,
            _spread(arm["test_accuracy"]),
            "" if difference is None else _interval(difference),
            _spread(arm["best_epoch_test_accuracy"]),
            f"{1000 * arm['train_step_seconds']:.1f}",
            "" if ratio is None else f"{ratio:.1f}",
            "" if weights is None else f"{weights['mean_absolute_change']:.4f}",
        )
    table.caption = "|Δw|: mean change of the pair weights by meta-learning, on fixed embeddings"
    return table


def _cost_table(summary: dict) -> Table:
    table = Table(title="A training step without and with the graph terms")
    for name in ("batch size", "method, backend", "ms (median)", "peak MiB"):
        table.add_column(name, justify="left" if name == "method, backend" else "right")
    last = None
    for row in summary["costs"]:
        if last not in (None, row["batch_size"]):
            table.add_section()
        last = row["batch_size"]
        table.add_row(str(last), row["case"], f"{1000 * row['seconds']:.1f}", f"{row['peak_bytes'] / 2**20:.1f}")
    table.caption = f"{summary['machine']}; student and teacher networks included"
    return table


def _spread(numbers: dict) -> str:
    return f"{numbers['mean']:.2f}" + ("" if numbers["std"] is None else f" ± {numbers['std']:.2f}")


def _interval(numbers: dict) -> str:
    if numbers["half_width"] is None:
        return f"{numbers['mean']:+.2f}"
    low, high = numbers["mean"] - numbers["half_width"], numbers["mean"] + numbers["half_width"]
    return f"{numbers['mean']:+.2f} ± {numbers['std']:.2f} [{low:+.2f}, {high:+.2f}]"


def draw(summary: dict, metrics: dict[str, list[list[dict]]], folder: Path) -> list[Path]:
    """Pictures of a comparison: accuracies, loss terms, and the pair weights where there are any.

    Args:
        summary: see compare.summarize.
        metrics: for each method the epoch records of each seed.
        folder: where to.
    """
    pictures = {"accuracy.png": _draw_accuracy(summary), "losses.png": _draw_losses(metrics)}
    learned = {name: arm["pair_weights"] for name, arm in summary["arms"].items() if arm["pair_weights"]}
    if learned:
        pictures["pair_weights.png"] = _draw_pair_weights(*next(iter(learned.items())))
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return [folder / name for name in pictures]


def _draw_accuracy(summary: dict):
    arms, baseline = summary["arms"], summary["baseline"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(arms) + 2.2), layout="constrained", sharey=True)
    for row, arm in enumerate(arms.values()):
        _draw_values(left, row, arm["test_accuracy"])
        if "difference" in arm:
            _draw_values(right, row, arm["difference"])
    left.axvline(summary["teacher"]["test_accuracy"], color="0.5", linestyle=":", label="teacher")
    left.legend(frameon=False)
    left.set(xlabel="test accuracy after the last epoch, %", yticks=range(len(arms)), yticklabels=list(arms))
    left.invert_yaxis()
    right.axvline(0, color="0.5")
    right.set(xlabel=f"paired difference to {baseline}, points")
    figure.suptitle(f"{len(summary['seeds'])} seeds; bars are 95 % intervals of the mean")
    return figure


def _draw_values(axes, row: int, numbers: dict) -> None:
    axes.plot(numbers["values"], [row] * len(numbers["values"]), ".", color="0.7")
    axes.errorbar(numbers["mean"], row, xerr=numbers["half_width"] or 0, fmt="o", color="C0", capsize=4)


def _draw_losses(metrics: dict[str, list[list[dict]]]):
    terms = [t for t in TERMS if any(t in runs[0][0] for runs in metrics.values())]
    figure, panels = plt.subplots(1, len(terms), figsize=(3.2 * len(terms), 3), layout="constrained", squeeze=False)
    for axes, term in zip(panels[0], terms):
        for number, (method, runs) in enumerate(metrics.items()):
            if term in runs[0][0]:
                curves = torch.tensor([[record[term] for record in run] for run in runs])
                axes.plot(range(1, curves.shape[1] + 1), curves.mean(dim=0), color=f"C{number}", label=method)
        axes.set(title=term, xlabel="epoch")
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle("Terms of the training objective, mean over seeds")
    return figure


def _draw_pair_weights(method: str, weights: dict):
    untrained, trained = torch.tensor(weights["untrained"]), torch.tensor(weights["trained"])
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    low, high = min(untrained.min(), trained.min()), max(untrained.max(), trained.max())
    change = trained - untrained
    span = max(change.abs().max().item(), 1e-9)
    for axes, title, matrix, colors in (
        (panels[0], "before", untrained, {"cmap": "viridis", "vmin": low, "vmax": high}),
        (panels[1], "after", trained, {"cmap": "viridis", "vmin": low, "vmax": high}),
        (panels[2], "change", change, {"cmap": "RdBu", "vmin": -span, "vmax": span}),
    ):
        image = axes.imshow(matrix, **colors)
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set(title=title, xlabel="teacher stage", ylabel="student stage")
        axes.set(xticks=range(matrix.shape[1]), yticks=range(matrix.shape[0]))
        for (s, t), value in ((i, matrix[i]) for i in _indices(matrix)):
            text = f"{value:+.4f}" if title == "change" else f"{value:.3f}"
            axes.text(t, s, text, ha="center", va="center", fontsize="small", bbox={"color": "white", "alpha": 0.6, "pad": 1})
    figure.suptitle(f"Pair weights of {method}, before and after meta-learning, on the same embeddings")
    return figure


def _indices(matrix: torch.Tensor):
    return [(s, t) for s in range(matrix.shape[0]) for t in range(matrix.shape[1])]
