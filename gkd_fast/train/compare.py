"""Several methods on paired seeds: the same initial student, data order and augmentation in every arm."""

import math
import multiprocessing
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from gkd_fast.train import pictures, report
from gkd_fast.train.config import Config, NetworkConfig, TrainError
from gkd_fast.train.cost import measure_costs
from gkd_fast.train.evaluation import evaluate_weights
from gkd_fast.train.files import write_json
from gkd_fast.train.metrics import read_metrics
from gkd_fast.train.progress import Display
from gkd_fast.train.run import train

CONFIDENCE = 0.95


def compare_methods(config: Config, console: Console) -> dict:
    """Trains every method on every seed, with one teacher for all, and writes and prints the report.

    Args:
        config: all options; those of ``compare`` say what to run.
        console: where progress and tables are shown.

    Returns:
        The summary, as in summary.json.

    Raises:
        TrainError, DataError, ValueError: something the user can put right.
    """
    folder = Path(config.output)
    if config.compare.workers > 1 and config.device != "cpu" and torch.cuda.is_available():
        raise TrainError("compare.workers above 1 is for CPUs: choose --compare.workers 1 or --device cpu")
    arms = arms_of(config)
    if all(options.method == "ce" for options in arms.values()):
        raise TrainError("compare.methods needs a method that has a teacher beside ce")
    teacher = _teacher(config, folder / "teacher", console)
    jobs = {
        (arm, seed): replace(
            options,
            seed=seed,
            teacher=teacher["weights"],
            student_network=_of_seed(options.student_network, seed),
            output=str(folder / arm / f"seed-{seed}"),
            threads=1 if config.compare.workers > 1 else config.threads,
        )
        for seed in range(config.seed, config.seed + config.compare.seeds)
        for arm, options in arms.items()
    }
    results = _run(jobs, config.compare.workers, console)
    summary = summarize(config, teacher, results)
    main = PartialState().is_main_process
    if config.compare.cost_batch_sizes and main:
        console.print("measuring time and memory of a step")
        summary["costs"] = measure_costs(replace(config, student_network=_of_seed(config.student_network, config.seed)))
    if main:
        write_json(folder / "summary.json", summary)
        metrics = {
            arm: [read_metrics(Path(jobs[arm, seed].output)) for seed in summary["seeds"]] for arm in summary["arms"]
        }
        report.print_comparison(summary, pictures.draw(summary, metrics, folder), console)
    return summary


def _of_seed(network: NetworkConfig, seed: int) -> NetworkConfig:
    """The network, which starts from the seed's own weights."""
    return (
        network if network.weights is None else replace(network, weights=network.weights.replace("{seed}", str(seed)))
    )


def arms_of(config: Config) -> dict[str, Config]:
    """Every arm's options: those of ``compare.methods``, then of ``compare.variants``.

    Raises:
        TrainError: a variant sets what is no option, or to what it cannot be.
    """
    arms = {method: replace(config, method=method) for method in config.compare.methods}
    for name, changes in config.compare.variants.items():
        try:
            arms[name] = changed(config, changes)
        except (ArgumentError, ValueError) as error:
            raise TrainError(f"compare.variants: {name}: {error}") from error
    return arms


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The options with other values, which dotted names name and which are checked as the command line's are."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    options = parser.parse_object(changes, namespace=parser.parse_object(asdict(config)))
    return Config(**parser.instantiate(options))


def summarize(config: Config, teacher: dict, results: dict[tuple[str, int], dict]) -> dict:
    """Means, paired differences with intervals, costs and what was shown.

    Args:
        config: all options.
        teacher: its accuracies.
        results: of every (arm, seed).
    """
    methods = list(arms_of(config))
    seeds = sorted({seed for _, seed in results})
    by_method = {method: [results[method, seed] for seed in seeds] for method in methods}
    baseline = "kd" if "kd" in methods else methods[0]
    arms = {}
    for method, runs in by_method.items():
        accuracies = [run["test_accuracy"] for run in runs]
        arms[method] = {
            "test_accuracy": describe(accuracies),
            "best_epoch_test_accuracy": describe([run["best"]["test_accuracy"] for run in runs]),
            "validation_accuracy": describe([run["validation_accuracy"] for run in runs]),
            "train_step_seconds": statistics.median(run["train_step_seconds"] for run in runs),
            "meta_step_over_train_step": _median(run["meta_step_over_train_step"] for run in runs),
            "pair_weights": _mean_pair_weights([run["pair_weights"] for run in runs]),
        }
        if method != baseline:
            for difference, accuracy in (
                ("difference", "test_accuracy"),
                ("validation_difference", "validation_accuracy"),
            ):
                pairs = zip(runs, by_method[baseline])
                arms[method][difference] = describe([run[accuracy] - other[accuracy] for run, other in pairs])
    summary = {
        "seeds": seeds,
        "baseline": baseline,
        "teacher": teacher,
        "arms": arms,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}",
        "options": asdict(config),
    }
    summary["conclusion"] = conclude(summary)
    return summary


def describe(values: list[float]) -> dict:
    """Mean, standard deviation and the half-width of Student's 95 % interval of the mean; None for a single value."""
    spread = half_width = None
    if len(values) > 1:
        spread = statistics.stdev(values)
        half_width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "std": spread, "half_width": half_width, "values": values}


def conclude(summary: dict) -> str:
    """What the paired differences show, in one sentence; "inconclusive" where an interval holds 0."""
    arms, baseline = summary["arms"], summary["baseline"]
    found = []
    if "ce" in arms:
        margin = summary["teacher"]["test_accuracy"] - arms["ce"]["test_accuracy"]["mean"]
        found.append(f"teacher − ce = {margin:+.2f} points")
    for method, arm in arms.items():
        if method == baseline:
            continue
        # Without a teacher, ce is what the baseline is held against.
        sign, better, worse = (-1, baseline, method) if method == "ce" else (1, method, baseline)
        mean, half_width = sign * arm["difference"]["mean"], arm["difference"]["half_width"]
        named = f"{better} − {worse} = {mean:+.2f}"
        if half_width is None:
            found.append(f"{named} points on a single seed, from which nothing can be concluded")
        elif abs(mean) <= half_width:
            found.append(f"{named} ± {half_width:.2f} points, inconclusive since the interval holds 0")
        else:
            found.append(f"{named} ± {half_width:.2f} points, so {better} is {'better' if mean > 0 else 'worse'} here")
    return f"Over {len(summary['seeds'])} paired seeds (± 95 % intervals): " + "; ".join(found) + "."


def _teacher(config: Config, folder: Path, console: Console) -> dict:
    """The teacher's weights and accuracies: the given one's, or those of one trained now."""
    display = Display(console)
    if config.teacher is not None:
        result = evaluate_weights(
            replace(config, student_network=config.teacher_network), Path(config.teacher), display
        )
        return result | {"weights": config.teacher}
    result = train(replace(config, output=str(folder)), "teacher", display)
    console.print(f"teacher {result['network']}: test {result['test_accuracy']:.2f} %", highlight=False)
    return {k: result[k] for k in ("network", "validation_accuracy", "test_accuracy")} | {"weights": str(folder)}


def _run(jobs: dict[tuple[str, int], Config], workers: int, console: Console) -> dict[tuple[str, int], dict]:
    """The results of all jobs, each shown when it is there."""
    results = {}
    for (arm, seed), result in _finished(jobs, workers):
        results[arm, seed] = result
        console.print(
            f"[{len(results)}/{len(jobs)}] {arm} seed {seed}: test {result['test_accuracy']:.2f} %",
            markup=False,
            highlight=False,
        )
    return results


def _finished(jobs: dict[tuple[str, int], Config], workers: int):
    if workers == 1:
        for key, config in jobs.items():
            yield key, _job(config)
        return
    others = set(multiprocessing.active_children())
    # Fresh processes: a copy of this one could inherit locked threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_job, config): key for key, config in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # A training that is asked to end saves first.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _job(config: Config) -> dict:
    return train(config, "student", Display(Console(), brief=True))


def _median(values) -> float | None:
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def _mean_pair_weights(changes: list[dict | None]) -> dict | None:
    """Over the seeds: mean weights [S, T] before and after, mean and largest change."""
    if None in changes:
        return None
    return {
        "untrained": torch.tensor([c["untrained"] for c in changes]).mean(dim=0).tolist(),
        "trained": torch.tensor([c["trained"] for c in changes]).mean(dim=0).tolist(),
        "mean_absolute_change": statistics.fmean(c["mean_absolute_change"] for c in changes),
        "largest_absolute_change": max(c["largest_absolute_change"] for c in changes),
    }
