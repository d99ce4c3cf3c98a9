"""Pictures of a comparison, as PNG files."""

import itertools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TERMS = ("cross_entropy", "kd", "node", "relation", "teacher_graph")


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
    return [folder / name for name in pictures]


def _draw_accuracy(summary: dict) -> Figure:
    arms, baseline = summary["arms"], summary["baseline"]
    figure = Figure(figsize=(10, 0.4 * len(arms) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, arm in enumerate(arms.values()):
        _draw_values(left, row, arm["test_accuracy"])
        if "difference" in arm:
            _draw_values(right, row, arm["difference"])
    left.axvline(summary["teacher"]["test_accuracy"], color="0.5", linestyle=":", label="teacher")
    left.legend(frameon=False)
    left.set(xlabel="test accuracy after the last epoch, %", yticks=range(len(arms)), yticklabels=list(arms))
    left.set_ylim(len(arms) - 0.5, -0.5)
    right.axvline(0, color="0.5")
    right.set(xlabel=f"paired difference to {baseline}, points")
    figure.suptitle(f"{len(summary['seeds'])} seeds; bars are 95 % intervals of the mean")
    return figure


def _draw_values(axes, row: int, numbers: dict) -> None:
    axes.plot(numbers["values"], [row] * len(numbers["values"]), ".", color="0.7")
    axes.errorbar(numbers["mean"], row, xerr=numbers["half_width"] or 0, fmt="o", color="C0", capsize=4)


def _draw_losses(metrics: dict[str, list[list[dict]]]) -> Figure:
    terms = [t for t in TERMS if any(t in runs[0][0] for runs in metrics.values())]
    figure = Figure(figsize=(3.2 * len(terms), 3), layout="constrained")
    lines = {}
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms):
        for number, (method, runs) in enumerate(metrics.items()):
            if term in runs[0][0]:
                curves = torch.tensor([[record[term] for record in run] for run in runs])
                epochs = range(1, curves.shape[1] + 1)
                (lines[method],) = axes.plot(epochs, curves.mean(dim=0).numpy(), color=f"C{number}", marker=".")
        axes.set(title=term, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    figure.suptitle("Terms of the training objective, mean over seeds")
    return figure


def _draw_pair_weights(method: str, weights: dict) -> Figure:
    untrained, trained = torch.tensor(weights["untrained"]), torch.tensor(weights["trained"])
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    both = torch.stack([untrained, trained])
    low, high = both.min().item(), both.max().item()
    change = trained - untrained
    span = max(change.abs().max().item(), 1e-9)
    for axes, title, matrix, colors in (
        (panels[0], "before", untrained, {"cmap": "viridis", "vmin": low, "vmax": high}),
        (panels[1], "after", trained, {"cmap": "viridis", "vmin": low, "vmax": high}),
        (panels[2], "change", change, {"cmap": "RdBu", "vmin": -span, "vmax": span}),
    ):
        image = axes.imshow(matrix.numpy(), **colors)
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set(title=title, xlabel="teacher stage", ylabel="student stage")
        axes.set(xticks=range(matrix.shape[1]), yticks=range(matrix.shape[0]))
        for s, t in itertools.product(*map(range, matrix.shape)):
            text = f"{matrix[s, t]:{'+.1e' if title == 'change' else '.3f'}}"
            axes.text(t, s, text, ha="center", va="center", fontsize="small", bbox={"color": "white", "pad": 1})
    figure.suptitle(f"Pair weights of {method}, before and after meta-learning, on the same embeddings")
    return figure
