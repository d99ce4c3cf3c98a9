"""From options to what is trained: networks, criterion, meta-network, optimizers."""

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from gkd_fast import GraphDistiller, GraphKDLoss, PairWeightNetwork
from gkd_fast.train.config import Config, NetworkConfig, TrainError, TrainingConfig
from gkd_fast.train.data import Splits
from gkd_fast.train.engine import Distiller
from gkd_fast.train.graphs import check_capture
from gkd_fast.train.methods import METHODS, Relations, stream_seed
from gkd_fast.train.models import StagedNetwork, build_network, load_weights
from gkd_fast.train.own import imported


@contextlib.contextmanager
def random_stream(seed: int, purpose: str):
    """PyTorch's CPU generator draws from the run's stream for this purpose inside, and is as before after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, purpose))
        yield


def build_network_for(config: NetworkConfig, splits: Splits, seed: int, auxiliary: bool | None = None) -> StagedNetwork:
    """A network with the run's initial weights; ``auxiliary`` overrides the configuration's."""
    with random_stream(seed, "initialisation"):
        return build_network(
            config.name,
            splits.num_classes,
            splits.sample_shape,
            stages=config.stages,
            auxiliary=config.auxiliary if auxiliary is None else auxiliary,
            pretrained=config.pretrained,
        )


def load_network(config: NetworkConfig, splits: Splits, file: Path, note) -> StagedNetwork:
    """A network with trained weights.

    Args:
        config: what the weights belong to.
        splits: the data it classifies.
        file: the weights.
        note: called with a line when the weights have no auxiliary branches, so that the network goes without.
    """
    config = replace(config, pretrained=False)
    network = build_network_for(config, splits, seed=0)
    unmatched = load_weights(network, file)
    if network.auxiliary and set(unmatched) & network.state_dict().keys():
        note(f"{file} has no auxiliary branches: the network's pooled stages are its features")
        network = build_network_for(config, splits, seed=0, auxiliary=False)
        load_weights(network, file)
    return network


def weights_file(path: str | Path) -> Path:
    """The file of weights that a path names: itself, or the one in a run's folder."""
    path = Path(path)
    file = path / "weights.pt" if path.is_dir() else path
    if not file.is_file():
        raise TrainError(f"there are no weights in {path}: no such file{'' if file == path else f' as {file}'}")
    return file


def build_distiller(
    config: Config,
    splits: Splits,
    method_name: str,
    network: NetworkConfig,
    training: TrainingConfig,
    teacher: StagedNetwork | None,
    accelerator=None,
) -> Distiller:
    """What trains ``network`` with a method; equal seeds start equal networks and heads, whatever the method."""
    method = METHODS[method_name]
    if method.teacher and teacher is None:
        raise TrainError(f"method {method_name} needs a teacher: name its weights with --teacher")
    if config.cuda_graphs and accelerator is not None:
        check_capture(config, method_name, accelerator)
    student = build_network_for(network, splits, config.seed)
    if network.weights is not None:
        load_weights(student, weights_file(network.weights))
    criterion = pair_weights = None
    extra_losses = {}
    several = accelerator is not None and accelerator.num_processes > 1
    group = torch.distributed.group.WORLD if several else None
    if method.relations:
        if several and method.relations == "rkd":
            raise TrainError(f"method {method_name} runs in one process: its angles are those of one process's samples")
        weight = getattr(config.distillation.relation_weights, method.relations.replace("-", "_"))
        widths = student.feature_dims[-1], teacher.feature_dims[-1]
        with random_stream(config.seed, "relations"):
            extra_losses["relations"] = Relations(method.relations, weight, *widths, config.graph.backend, group)
    if method.graph:
        criterion = build_criterion(config, student, teacher, splits.num_classes, method.convolution, group)
    if method.meta:
        with random_stream(config.seed, "meta-network"):
            pair_weights = PairWeightNetwork(
                config.graph.embed_dim, len(student.feature_dims), len(teacher.feature_dims), config.meta.width
            )
    module = GraphDistiller(
        student,
        teacher if method.teacher else None,
        criterion=criterion,
        meta=config.meta if method.meta else None,
        pair_weights=pair_weights,
        kd_weight=config.distillation.kd_weight if method.kd else 0.0,
        temperature=config.distillation.temperature,
        label_smoothing=training.label_smoothing,
        extra_losses=extra_losses,
        micro_batch=config.micro_batch,
    )
    trained = [p for part in (student, criterion, module.extra_losses) if part is not None for p in part.parameters()]
    return Distiller(
        module,
        build_optimizer(training, trained),
        interval=config.meta.interval,
        permuted=method.weights == "permuted",
        seed=config.seed,
        accelerator=accelerator,
        cuda_graphs=config.cuda_graphs,
    )


def build_optimizer(training: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    options = {"lr": training.lr, "weight_decay": training.weight_decay}
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=training.momentum, nesterov=training.nesterov, **options)
    make = torch.optim.AdamW if training.optimizer == "adamw" else imported(training.optimizer)
    return make(parameters, **options)


def build_scheduler(training: TrainingConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Of the learning rate, stepped once an epoch."""
    schedules, warmup = torch.optim.lr_scheduler, training.warmup
    if training.schedule == "cosine":
        main: schedules.LRScheduler = schedules.CosineAnnealingLR(optimizer, training.epochs - warmup)
    else:
        main = schedules.MultiStepLR(optimizer, [epoch - warmup for epoch in training.milestones], training.gamma)
    if not warmup:
        return main
    rise = schedules.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return schedules.SequentialLR(optimizer, [rise, main], [warmup])


def build_criterion(
    config: Config,
    student: StagedNetwork,
    teacher: StagedNetwork,
    num_classes: int,
    convolution: bool = True,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> GraphKDLoss:
    graph = config.graph
    with random_stream(config.seed, "heads"):
        return GraphKDLoss(
            student.feature_dims,
            teacher.feature_dims,
            num_classes=num_classes,
            embed_dim=graph.embed_dim,
            layers=graph.layers,
            bandwidth=graph.bandwidth,
            neighbors=graph.neighbors,
            self_weight=graph.self_weight,
            normalization=graph.normalization,
            node_temperature=graph.node_temperature,
            relation_temperature=graph.relation_temperature,
            node_weight=graph.node_weight,
            relation_weight=graph.relation_weight,
            graph="batch" if convolution else "none",
            pairs=graph.pairs,
            backend=graph.backend,
            process_group=process_group,
            column_bank=graph.column_bank,
        )
