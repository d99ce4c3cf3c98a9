"""What a run can be told; by default the published recipe's networks and constants, on the digits. Every field is an
option of the command line."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.utils import LoggerType

from gkd_fast._arguments import check_graph
from gkd_fast.distiller import MetaSettings
from gkd_fast.train.data import DataConfig

RELATION_NAMES = ("sp", "cc", "pkt", "rkd", "info-nce")
METHOD_NAMES = (
    "ce", "kd", "gkd", "gkd-constant", "gkd-permuted", "gkd-nograph", "gkd-nokd", *RELATION_NAMES,
    *(f"kd+{name}" for name in RELATION_NAMES),
)  # fmt: skip
TRACKER_NAMES = tuple(tracker.value for tracker in LoggerType)


class TrainError(Exception):
    """Something the user can put right; the message says in one line what."""


@dataclass
class NetworkConfig:
    """A network and the stages whose features are distilled.

    Args:
        name: wrn_DEPTH_WIDTH, resnetDEPTH, small_WIDTH (for small images), timm/MODEL, torchvision/CLASSIFIER, or
            one's own: MODULE:FUNCTION, which is called with num_classes.
        stages: module names of the stages, for networks of other libraries and one's own.
        pretrained: start from the library's weights; for timm/ and torchvision/.
        auxiliary: a branch with a classifier of its own at every stage but the last.
        weights: file to start from: weights of a run, or a plain state_dict (maybe under "model" or "net"). In the name
            of those that compare's students start from {seed} stands for the seed.
    """

    name: str = "wrn_16_2"
    stages: list[str] | None = None
    auxiliary: bool = True
    weights: str | None = None
    pretrained: bool = False


@dataclass
class TrainingConfig:
    """Length, optimizer and schedule of a training.

    Args:
        epochs: how often each image is seen.
        batch_size: images per step, over all processes, and so the size of the graphs.
        drop_last: leave out the last batch of an epoch where it is short.
        optimizer: sgd, adamw, or one's own: MODULE:CLASS, which is called with parameters, lr and weight_decay.
        lr: learning rate at the start, after the warm-up.
        schedule: steps (see milestones), or cosine: to 0 at the end.
        warmup: epochs over which the learning rate rises to lr.
        milestones: epochs at which the learning rate is multiplied by gamma.
        gamma: see milestones.
        momentum: of SGD.
        nesterov: Nesterov momentum.
        weight_decay: of the optimizer.
        label_smoothing: of the cross-entropy, from 0 to 1.
        mixup: α of the Beta distribution after which pairs of images are mixed; 0 mixes none.
    """

    epochs: int = 240
    batch_size: int = 64
    drop_last: bool = False
    optimizer: Literal["sgd", "adamw"] | str = "sgd"
    lr: float = 0.05
    schedule: Literal["steps", "cosine"] = "steps"
    warmup: int = 0
    milestones: list[int] = field(default_factory=lambda: [150, 180, 210])
    gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw") and ":" not in self.optimizer:
            raise ValueError(f"optimizer must be sgd, adamw or MODULE:CLASS, got {self.optimizer!r}")
        _at_least(self, 1, "epochs", "batch_size")
        _at_least(self, 0, "lr", "gamma", "momentum", "weight_decay", "warmup", "label_smoothing", "mixup")
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {self.label_smoothing}")
        if self.schedule == "cosine" and self.warmup >= self.epochs:
            raise ValueError(f"warmup must be below epochs ({self.epochs}), got {self.warmup}")


@dataclass
class RelationWeights:
    """Factors of the losses over relations, alone and beside kd.

    Args:
        sp: of similarity_preserving with norm 2; the paper's.
        cc: of correlation_congruence with its Gaussian kernel.
        pkt: of pkt; what is usual.
        rkd: of 25 rkd_distance + 50 rkd_angle, which are the paper's.
        info_nce: of info_nce in both directions.
    """

    sp: float = 3000.0
    cc: float = 100.0
    pkt: float = 30000.0
    rkd: float = 1.0
    info_nce: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, 0, *(f.name for f in dataclasses.fields(self)))


@dataclass
class DistillationConfig:
    """What is distilled beside the graph terms.

    Args:
        temperature: of the softened class probabilities.
        kd_weight: factor of the logits' divergence; temperature² keeps its gradient's size.
        relation_weights: factors of the losses over relations.
    """

    temperature: float = 3.0
    kd_weight: float = 9.0
    relation_weights: RelationWeights = field(default_factory=RelationWeights)

    def __post_init__(self) -> None:
        _above(self, 0, "temperature")
        _at_least(self, 0, "kd_weight")


@dataclass
class GraphConfig:
    """The graph terms, as in gkd_fast.GraphKDLoss.

    Args:
        embed_dim: width of the graph embeddings.
        layers: graph convolutions per stage.
        bandwidth: of the adjacency: a positive number, or auto.
        neighbors: with bandwidth auto, how many others a sample listens to, null, or auto: 8.
        self_weight: the own message's weight beside the others', from 0 to 1, null, or auto: 0.8 with bandwidth auto,
            else null.
        normalization: of the adjacency: symmetric or row.
        node_temperature: of the node loss.
        relation_temperature: of the relation loss.
        node_weight: factor of the node loss.
        relation_weight: factor of the relation loss.
        pairs: all, matched, or a list of [student stage, teacher stage].
        backend: auto, reference, cpp or triton.
        column_bank: past embeddings that are further columns of the node and relation losses.
    """

    embed_dim: int = 128
    layers: int = 1
    bandwidth: float | str = "auto"
    neighbors: float | str | None = "auto"
    self_weight: float | str | None = "auto"
    normalization: Literal["symmetric", "row"] = "symmetric"
    node_temperature: float = 0.1
    relation_temperature: float = 0.1
    node_weight: float = 1.0
    relation_weight: float = 1.0
    pairs: str | list[list[int]] = "all"
    backend: Literal["auto", "reference", "cpp", "triton"] = "auto"
    column_bank: int = 0


@dataclass
class MetaConfig(MetaSettings):
    """The meta-network that weighs stage pairs, and its optimisation, as in gkd_fast.GraphDistiller.

    Args:
        interval: a meta-step follows each training step whose batch index within the epoch is a multiple of it.
        outer_batch: whose outer loss: that of the current batch, or of a held-out one: as many training images of
            which none is in the current batch.
    """

    interval: int = 50
    outer_batch: Literal["current", "held-out"] = "current"

    def __post_init__(self) -> None:
        _at_least(self, 1, "width", "interval", "graph_steps")
        _at_least(self, 0, "label_steps", "inner_lr", "inner_momentum", "inner_weight_decay")
        _at_least(self, 0, "lr", "momentum", "weight_decay")


@dataclass
class CompareConfig:
    """What compare runs and measures.

    Args:
        methods: the arms: ce, kd, gkd and the controls gkd-constant, gkd-permuted, gkd-nograph, gkd-nokd;
            and losses over relations alone or beside kd: sp, cc, pkt, rkd, info-nce, kd+sp, ….
        variants: further arms, each by a name of its own: the options in which it differs, by their dotted names, as in
            {gkd-wide: {method: gkd, graph.embed_dim: 128}}.
        seeds: number of paired seeds: seed, seed + 1, …
        workers: student trainings that run at once, one thread each; above 1 on CPUs alone.
        cost_batch_sizes: batch sizes at which time and memory of a step are measured; [] measures nothing.
        cost_repeats: timed steps per case.
    """

    methods: list[Literal[METHOD_NAMES]] = field(default_factory=lambda: ["ce", "kd", "gkd"])
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    workers: int = 1
    cost_batch_sizes: list[int] = field(default_factory=lambda: [64])
    cost_repeats: int = 5

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be a list of different methods, got {self.methods}")
        for name in self.variants:
            if name in METHOD_NAMES or not re.fullmatch(r"[\w+.-]+", name) or name == "teacher":
                raise ValueError(f"variants must have names of their own, of letters, digits and +-._, got {name!r}")
        _at_least(self, 1, "seeds", "workers", "cost_repeats")


@dataclass
class Config:
    """All options.

    Args:
        output: folder of the run: configuration, checkpoints, metrics, weights and results.
        seed: of initialisation, data order, augmentation and training noise, each with a stream of its own.
        method: what student trains with: ce, kd, gkd, gkd-constant, gkd-permuted, gkd-nograph, gkd-nokd, or a
            loss over relations, alone or beside kd: sp, cc, pkt, rkd, info-nce, kd+sp, ….
        teacher: the teacher's weights for student and compare; compare trains one where there is none.
        resume: go on from the last good checkpoint in output.
        precision: fp32, bf16 or fp16 (autocast; with fp16 the meta-step is in fp32).
        device: auto, cpu, cuda, or cuda:N for one of several; of several processes with cuda each takes its own.
        threads: of PyTorch, where not its own choice.
        micro_batch: images of a process's share of a batch that the networks take at a time, with the activations of
            these alone, as in gkd_fast.micro_batched; by default all.
        cuda_graphs: capture a step's forward and backward pass in a CUDA graph and replay it: a step then takes the
            device's time, whatever Python and its launches would; what cannot be captured is told.
        limit_batches: use only so many batches of each epoch, to try things out; by default all.
        save_every: steps between two checkpoints within an epoch; the end of an epoch has one always.
        diagnostics_every: epochs between two looks at the graphs and at each term's share of the gradient.
        log_with: trackers of accelerate that get each epoch's metrics too; their packages must be installed. all: those
            whose packages are.
        data: the images.
        teacher_network: the teacher.
        teacher_training: how the teacher is trained.
        student_network: the student.
        student_training: how the student is trained.
        distillation: logit distillation and losses over relations.
        graph: graph terms.
        meta: meta-network.
        compare: of the command compare.
    """

    output: str = "runs/default"
    seed: int = 0
    method: Literal[METHOD_NAMES] = "gkd"
    teacher: str | None = None
    resume: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    threads: int | None = None
    micro_batch: int | None = None
    cuda_graphs: bool = False
    limit_batches: int | None = None
    save_every: int = 500
    diagnostics_every: int = 1
    log_with: list[Literal[TRACKER_NAMES]] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    teacher_network: NetworkConfig = field(default_factory=lambda: NetworkConfig("wrn_40_2"))
    teacher_training: TrainingConfig = field(default_factory=TrainingConfig)
    student_network: NetworkConfig = field(default_factory=NetworkConfig)
    student_training: TrainingConfig = field(default_factory=TrainingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        _at_least(self, 0, "seed")
        _at_least(self, 1, "save_every", "diagnostics_every")
        for name in ("micro_batch", "limit_batches"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)


# Options that say where and how, and do not change what is computed.
FREE_OPTIONS = (
    "output",
    "resume",
    "cuda_graphs",
    "save_every",
    "diagnostics_every",
    "log_with",
    "compare",
    "data.data_dir",
    "data.download",
    "data.workers",
)
# Options that a teacher's training does not look at, and a student's.
TEACHER_FREE = ("method", "teacher", "student_network", "student_training", "distillation", "graph", "meta")
STUDENT_FREE = ("teacher_training",)


def relevant_options(config: Config, role: str) -> dict:
    """What decides the outcome of a training, by dotted name: a run can only be resumed with the same.

    Args:
        config: all options.
        role: "teacher" or "student".
    """
    free = FREE_OPTIONS + (TEACHER_FREE if role == "teacher" else STUDENT_FREE)
    options = {"role": role}
    for name, value in dataclasses.asdict(config).items():
        options |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    options["device"] = config.device.split(":")[0]  # any of several alike
    # What "auto" stands for may change from version to version.
    form = check_graph(config.graph.bandwidth, config.graph.neighbors, config.graph.self_weight)
    options |= dict(zip(("graph.bandwidth", "graph.neighbors", "graph.self_weight"), form))
    return {name: v for name, v in options.items() if name not in free and name.split(".")[0] not in free}


# Bounds are no types of jsonargparse's: some are of fields of the library's own MetaSettings, which does without it.
def _at_least(config, least: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def _above(config, bound: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > bound:
            raise ValueError(f"{name} must be above {bound}, got {getattr(config, name)}")
