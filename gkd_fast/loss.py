"""The distillation loss: graphs of both networks' stages, compared as nodes and as relations."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gkd_fast._arguments import check_choice, check_count, check_factor, check_graph, check_positive, is_whole
from gkd_fast._column_bank import ColumnBank
from gkd_fast._compilation import leaves_graphs
from gkd_fast._diagnostics import LastCall, Report, graph_report, vacuous
from gkd_fast._group import GroupHolder
from gkd_fast._inputs import Features, Weights, check_devices, nodes_of, target_of, tensors_of, weights_of_pairs
from gkd_fast._pooling import Pool, stage_pools
from gkd_fast._probe import Sample, pools_and_widths
from gkd_fast._stages import check_dims, check_pairs, frozen_widths
from gkd_fast._terms import pair_losses, teacher_graph_loss, weighted_sum
from gkd_fast._training import (
    ALONE,
    CHECKED_CALLS,
    TrainingWatch,
    being_captured,
    beside_training,
    recomputing,
    repeats_or_is_undone,
)
from gkd_fast.distributed import checking, shards_of
from gkd_fast.modules import BatchGCN, PlainHead, graph_embeddings
from gkd_fast.ops.autograd import saveable

GRAPHS = ("batch", "none")


def _meets_columns(criterion: "GraphKDLoss", *arguments, **options) -> bool:
    return criterion.bank is not None or criterion.process_group is not None


class GraphKDLoss(nn.Module):
    """Graph-based representation knowledge distillation (Yang et al., 2024, DOI 10.12263/DZXB.20230976).

    Each stage's features become a graph over the batch and, through a :class:`gkd_fast.BatchGCN`, graph embeddings.
    For every wanted pair of a student stage s and a teacher stage t two losses per sample are weighted by w[b,s,t],
    averaged over the batch, summed over the pairs and divided by the number of student stages:

    - ``node``: :func:`gkd_fast.functional.node_contrast`,
    - ``relation``: :func:`gkd_fast.functional.relation_kl`.

    The teacher's embeddings are detached in both; its graph convolutions learn from labels (``teacher_graph``): one
    classifier shared by its stages, cross-entropy summed over them. The terms share a graph: whoever takes their
    gradients apart needs ``retain_graph=True``.

    Args:
        student_dims: width of each student stage's features, an int or a list of S ints.
        teacher_dims: the same of the teacher, T of them.
        num_classes: number of classes; needed for ``teacher_graph="labels"``.
        embed_dim: width of the graph embeddings; unused with ``teacher_graph="frozen"``.
        layers: graph convolutions per stage.
        bandwidth: of the graph convolutions: σ > 0, or ``"auto"``.
        neighbors: of the graph convolutions, with ``bandwidth="auto"``: how many others a node listens to at any batch
            size (``"auto"``: 8), or None: a bandwidth that follows from the mean distance; see
            :class:`gkd_fast.BatchGCN`.
        self_weight: of the graph convolutions: the own message's weight beside the others', from 0 to 1, or None.
            ``"auto"``: 0.8 with ``bandwidth="auto"``, else None.
        normalization: ``"symmetric"`` or ``"row"``.
        node_temperature: τ > 0 of the node loss.
        relation_temperature: τ > 0 of the relation loss.
        node_weight: factor of the node loss, ≥ 0; at 0 the term is left out.
        relation_weight: factor of the relation loss, ≥ 0; at 0 the term is left out.
        graph: ``"batch"``, or ``"none"``: no graph convolutions; the losses are those of the plain features, projected
            linearly where they are not ``embed_dim`` wide, and ``layers``, ``bandwidth``, ``neighbors``,
            ``self_weight`` and ``normalization`` are without effect.
        teacher_graph: ``"labels"``: trainable graph convolutions on the teacher's side, which need ``target`` in every
            training-mode call; ``"frozen"``: the teacher's features as they are, to whose width the student's graph
            convolutions then lead.
        pairs: ``"all"``, ``"matched"`` (k ↔ k, S = T) or a list of (student stage, teacher stage).
        pool: how features become one row per sample, see :func:`gkd_fast.features.pool_features`; one for all stages, a
            list with one for each, or a dict of these for ``"student"`` and ``"teacher"``. Features ``[B, dim]`` are
            such rows already.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are one batch, see :mod:`gkd_fast.distributed`. Each rank's terms
            are (ranks/global batch) times the sum over its own samples, so that their mean over the ranks, and the mean
            of the parameters' gradients that DDP takes, are those of one process with the whole batch. All ranks call
            the loss together, those without samples with zero rows.
        column_bank: so many past embeddings of either side are further columns of both losses, without gradient: what a
            sample is told from, and has relations with. :meth:`remember` adds to them.

    Shapes: features are a tensor or a list of them, ``[B, C]``, ``[B, C, H, W]``, tokens ``[B, N, C]`` or what
    ``pool`` says; ``target`` is ``[B]`` integer labels (-100: none) or ``[B, num_classes]`` probabilities; ``weights``
    is ``[B, S, T]``, a :class:`gkd_fast.PairWeightNetwork` (evaluated wholly without gradient), or None: 0.5.

    A loss can be copied, pickled and initialised on the meta device; a pickle leaves the process group behind, and the
    loss then says so until its attribute ``process_group`` is set.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type or value.
    """

    def __init__(
        self,
        student_dims: int | Sequence[int],
        teacher_dims: int | Sequence[int],
        *,
        num_classes: int | None = None,
        embed_dim: int = 128,
        layers: int = 1,
        bandwidth: float | str = "auto",
        neighbors: float | str | None = "auto",
        self_weight: float | str | None = "auto",
        normalization: str = "symmetric",
        node_temperature: float = 0.1,
        relation_temperature: float = 0.1,
        node_weight: float = 1.0,
        relation_weight: float = 1.0,
        graph: str = "batch",
        teacher_graph: str = "labels",
        pairs: str | Sequence[tuple[int, int]] = "all",
        pool: Pool = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
        column_bank: int = 0,
    ):
        super().__init__()
        self.student_dims = check_dims("student_dims", student_dims)
        self.teacher_dims = check_dims("teacher_dims", teacher_dims)
        self.pairs = check_pairs(pairs, len(self.student_dims), len(self.teacher_dims))
        check_choice("graph", graph, GRAPHS)
        if not isinstance(teacher_graph, str) or teacher_graph not in ("labels", "frozen"):
            raise ValueError(f"teacher_graph must be 'labels' or 'frozen', got {teacher_graph!r}")
        self.node_temperature = check_positive("node_temperature", node_temperature)
        self.relation_temperature = check_positive("relation_temperature", relation_temperature)
        self.node_weight = check_factor("node_weight", node_weight)
        self.relation_weight = check_factor("relation_weight", relation_weight)
        if self.node_weight == 0 and self.relation_weight == 0:
            raise ValueError("node_weight and relation_weight must not both be 0")
        self.student_pool = stage_pools(pool, len(self.student_dims), "student")
        self.teacher_pool = stage_pools(pool, len(self.teacher_dims), "teacher")
        if not is_whole(column_bank) or column_bank < 0:
            raise ValueError(f"column_bank must be a number of embeddings, 0 or more, got {column_bank!r}")
        self.graph = graph
        self.teacher_graph = teacher_graph
        self.bandwidth, self.neighbors, self.self_weight = check_graph(bandwidth, neighbors, self_weight)
        self.pool = pool
        self.backend = backend
        self._group = GroupHolder(process_group)

        embed_dim = check_count("embed_dim", embed_dim)
        if num_classes is not None:
            num_classes = check_count("num_classes", num_classes)
        options: Any = {"layers": layers, "bandwidth": bandwidth, "neighbors": neighbors, "self_weight": self_weight,
                        "normalization": normalization, "backend": backend}  # fmt: skip

        def heads(dims: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
            convolutions = [BatchGCN(d, w, **options) for d, w in zip(dims, widths)]
            return nn.ModuleList(convolutions if graph == "batch" else [PlainHead(c) for c in convolutions])

        self.teacher_heads: nn.ModuleList | None = None
        self.classifier: nn.Linear | None = None
        if teacher_graph == "labels":
            if num_classes is None:
                raise ValueError("num_classes is needed for teacher_graph='labels', got None")
            self.teacher_heads = heads(self.teacher_dims, [embed_dim] * len(self.teacher_dims))
            self.classifier = nn.Linear(embed_dim, num_classes)
            widths = [embed_dim] * len(self.student_dims)
        else:
            widths = frozen_widths(self.teacher_dims, self.pairs, len(self.student_dims))
        self.student_heads = heads(self.student_dims, widths)
        embedded = self.teacher_dims if self.teacher_heads is None else [embed_dim] * len(self.teacher_dims)
        self.embedding_widths = widths, embedded  # of the student's stages, of the teacher's
        self.bank = ColumnBank(int(column_bank), widths, embedded) if column_bank else None
        self._last = LastCall()
        self._training_calls = 0
        self._watch = TrainingWatch()

    @classmethod
    def from_models(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        sample: Sample,
        *,
        student_stages: Sequence[str],
        teacher_stages: Sequence[str],
        pool: Pool | None = None,
        select: Any = None,
        **options: Any,
    ) -> "GraphKDLoss":
        """The loss for two models, with the stages' widths and layouts read off forward passes on ``sample``.

        Each model runs on the sample, on another number of samples, and on smaller images (shorter sequences) where it
        takes them. What changes with these tells which dimensions of a stage are samples, positions and channels. The
        models' modes, buffers and hooks and the random state are left as they were. The loss is on the student's device
        and in its type; the features that it is then called with are those of :class:`gkd_fast.StageFeatures`::

            criterion = GraphKDLoss.from_models(student, teacher, images, student_stages=names, ...)
            stages = StageFeatures(student, names, pool=criterion.student_pool)

        Args:
            student: any module.
            teacher: any module.
            sample: an input batch that both take: a tensor, a sequence of arguments, or a dict of keyword arguments.
            student_stages: module names, as in ``student.named_modules()``.
            teacher_stages: the same of the teacher.
            pool: as in the constructor; checked. None: found out.
            select: as in :class:`gkd_fast.StageFeatures`, or a dict of that for ``"student"`` and ``"teacher"``.
            **options: as in the constructor.

        Raises:
            ValueError: a stage is no module of its model, its output is not features, or its layout cannot be told; the
                message names the stage, both shapes and what to pass.
        """
        pools, widths = {}, {}
        for side, model, stages in (("student", student, student_stages), ("teacher", teacher, teacher_stages)):
            pools[side], widths[side] = pools_and_widths(side, model, stages, sample, pool, select)
        criterion = cls(widths["student"], widths["teacher"], pool=pools, **options)
        own = next((p for p in student.parameters() if p.is_floating_point()), None)
        return criterion if own is None else criterion.to(own.device, own.dtype)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group whose ranks' samples are one batch; RuntimeError where a pickle left it behind."""
        return self._group.group()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = GroupHolder(group)

    def forward(
        self, student_feats: Features, teacher_feats: Features, target: Tensor | None = None, *, weights: Weights = None
    ) -> Tensor:
        """The scalar loss: the sum of :meth:`terms`.

        In training mode these calls are counted: the first and the hundredth look at :meth:`diagnostics`, the hundredth
        also at whether what is trained has moved, and warn; where gradients are accumulated the first hundredth after a
        step does.
        Recomputations by activation checkpointing and calls in the steps of :class:`gkd_fast.UnrolledSGD` are not
        counted, and the column bank remembers none of them. A call that is captured in a CUDA graph, and its replays,
        are not counted either; the column bank must be full by then.
        """
        loss = reduce(torch.add, self.terms(student_feats, teacher_feats, target, weights=weights).values())
        self._count_training_call(loss, weights)
        return loss

    def _count_training_call(self, loss: Tensor, weights: Weights) -> None:
        if self.training and not torch.compiler.is_compiling() and not repeats_or_is_undone():
            if being_captured(loss):  # diagnostics wait for the device
                return
            self._training_calls += 1
            if self._training_calls in CHECKED_CALLS:
                self.diagnostics()
            if self._watch.looks_at(self._training_calls):
                self._watch.look(self, weights, loss)

    @leaves_graphs(_meets_columns)
    def terms(
        self, student_feats: Features, teacher_feats: Features, target: Tensor | None = None, *, weights: Weights = None
    ) -> dict[str, Tensor]:
        """The terms of the loss: ``node``, ``relation`` and, where there is a target, ``teacher_graph``; scalars.

        Raises:
            ValueError, TypeError: see the class; also when ``target`` is missing in training mode.
        """
        if self.training and self.classifier is not None and target is None:
            raise ValueError(
                "target is needed in training mode with teacher_graph='labels': without labels the teacher's graph "
                "convolutions learn nothing; use teacher_graph='frozen' if there are none"
            )
        embeddings = self.embed(student_feats, teacher_feats)
        if self.bank is None or not self.training:
            return self._terms(*embeddings, target, weights)
        features = [*tensors_of("student_feats", student_feats), *tensors_of("teacher_feats", teacher_feats)]
        again = self.bank.has_met(embeddings[0], features, self.parameters())
        terms = self._terms(*embeddings, target, weights, again)
        if not again and not repeats_or_is_undone():
            self.remember(*embeddings)
            self.bank.mark_call(features, self.parameters())
        return terms

    @leaves_graphs(_meets_columns)
    def embed(self, student_feats: Features, teacher_feats: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Graph embeddings of the student's and of the teacher's stages, lists of ``[B, embed_dim]``.

        No gradient reaches the teacher's features; its graph convolutions have theirs.
        """
        with checking(self.process_group, "GraphKDLoss.embed"):
            check_devices(self, student_feats, teacher_feats)
            students = nodes_of("student_feats", student_feats, self.student_dims, self.student_pool)
            teachers = [
                saveable(x.detach())
                for x in nodes_of("teacher_feats", teacher_feats, self.teacher_dims, self.teacher_pool)
            ]
            if len(students[0]) != len(teachers[0]):
                raise ValueError(
                    f"teacher_feats must have the students' batch size ({len(students[0])}), got {len(teachers[0])}"
                )
        shards = shards_of(self.process_group, [*students, *teachers], ("GraphKDLoss.embed",))
        self._last = LastCall(features=(tensors_of("", student_feats), tensors_of("", teacher_feats)))
        if self.teacher_heads is None:
            embeddings = graph_embeddings(self.student_heads, students, shards)
            return embeddings, [x.to(embeddings[0].dtype) for x in teachers]
        embeddings = graph_embeddings([*self.student_heads, *self.teacher_heads], [*students, *teachers], shards)
        return embeddings[: len(students)], embeddings[len(students) :]

    @leaves_graphs(_meets_columns)
    def terms_from_embeddings(
        self,
        student_embeddings: Sequence[Tensor],
        teacher_embeddings: Sequence[Tensor],
        target: Tensor | None = None,
        *,
        weights: Weights = None,
    ) -> dict[str, Tensor]:
        """:meth:`terms` of the embeddings that :meth:`embed` gave; without a target, ``teacher_graph`` is left out.

        No training call: nothing is counted or remembered, see :meth:`remember`.
        """
        again = self.training and self.bank is not None and recomputing() and self.bank.is_newest(student_embeddings)
        return self._terms(student_embeddings, teacher_embeddings, target, weights, again)

    def _terms(
        self,
        student_embeddings: Sequence[Tensor],
        teacher_embeddings: Sequence[Tensor],
        target: Tensor | None,
        weights: Weights,
        again: bool = False,
    ) -> dict[str, Tensor]:
        """The terms; ``again``: of the embeddings that the bank remembered last, which do not meet themselves."""
        with checking(self.process_group, "GraphKDLoss.terms"):
            for side, stages, dims in (
                ("student", student_embeddings, self.student_dims),
                ("teacher", teacher_embeddings, self.teacher_dims),
            ):
                if len(stages) != len(dims):
                    raise ValueError(f"{side}_embeddings must hold {len(dims)} stages, got {len(stages)}")
            detached = [t.detach() for t in teacher_embeddings]
            pair_weights = weights_of_pairs(weights, student_embeddings, detached)
            if self.classifier is not None and target is not None:
                target = target_of(target, teacher_embeddings[0], self.classifier.out_features)
        told = "GraphKDLoss.terms", "no target" if target is None else "target"
        shards = shards_of(self.process_group, [*student_embeddings, *teacher_embeddings], told)
        batch = len(detached[0]) if shards is None else shards.total
        last = self._last if self._last.has_features else LastCall(embeddings=(student_embeddings, teacher_embeddings))
        self._last = last
        last.batch, last.shards = batch, shards and shards.fresh()
        last.weights = None if pair_weights is None else pair_weights.detach()
        bank = None if self.bank is None else self.bank.contents(before_newest=again)
        if self.training and batch == 1 and (bank is None or not len(bank[0][0])):
            self._watch.warn_once("alone", ALONE)
        # Times a sum over samples: the mean over the batch, or this rank's part in that of all.
        share = 1 / batch if shards is None else shards.size / batch
        pair_share = share / len(self.student_dims)
        nodes, relations = pair_losses(
            student_embeddings,
            detached,
            self.pairs,
            bank,
            (
                self.node_temperature if self.node_weight else None,
                self.relation_temperature if self.relation_weight else None,
            ),
            self.backend,
            shards,
        )
        terms = {}
        if nodes is not None:
            last.node_losses = nodes.detach()
            terms["node"] = weighted_sum(nodes, pair_weights, self.pairs, self.node_weight * pair_share)
        if relations is not None:
            terms["relation"] = weighted_sum(relations, pair_weights, self.pairs, self.relation_weight * pair_share)
        if self.classifier is not None and target is not None:
            terms["teacher_graph"] = share * teacher_graph_loss(self.classifier, teacher_embeddings, target)
        return terms

    @torch.no_grad()
    def remember(self, student_embeddings: Sequence[Tensor], teacher_embeddings: Sequence[Tensor]) -> None:
        """Puts a batch's embeddings into the column bank, whose oldest leave it.

        A call in training mode does so once per step: not when it is made again with the same tensors at the same
        parameters, nor in a recomputation by activation checkpointing, which sees the bank as the call saw it. Whoever
        calls :meth:`embed` and :meth:`terms_from_embeddings` calls this after a training step. With a process group all
        ranks call it, and each has the whole bank.
        """
        if self.bank is None:
            raise ValueError("remember needs a column_bank above 0")
        if not repeats_or_is_undone():
            self.bank.add([*student_embeddings, *teacher_embeddings], self._last.shards)

    @torch.no_grad()
    @beside_training()
    def diagnostics(
        self, student_feats: Features | None = None, teacher_feats: Features | None = None, *, weights: Weights = None
    ) -> Report:
        """Whether the graphs of the last call, or of the features given, say anything; warns, once, if they do not.

        The loss keeps numbers per sample and stage pair of its last call, and of its features a weak reference alone:
        what is made of these is left out where nobody holds them any more, and after a compiled call. They
        are embedded with the parameters as they are now. With a process group the numbers are the global batch's, and
        all ranks call this together.

        Args:
            student_feats, teacher_feats, weights: as in a call of the loss; None: those of the last call.

        Returns:
            - ``node_loss_minus_log_batch``: mean node loss of the wanted pairs minus log B; near 0 none is told apart.
            - ``weight_mean``, ``weight_std``: of the wanted pairs' weights.
            - ``student_cosine``, ``teacher_cosine``: mean cosine of two embeddings per stage; near 1 all coincide.
            - ``student_neighbors``, ``teacher_neighbors``: effective neighbours per graph convolution, mean over the
              batch, 1 to B (:func:`gkd_fast.functional.effective_neighbors`), with a ``self_weight`` of the others, 1
              to B − 1;
            - ``wanted_neighbors``: how many the bandwidths are to give, where ``neighbors`` says so;
            - ``student_bandwidth``, ``teacher_bandwidth``: their bandwidths.

        Raises:
            RuntimeError: there was no call yet.
            TypeError: one network's features without the other's.
        """
        if (student_feats is None) != (teacher_feats is None):
            raise TypeError("student_feats and teacher_feats must be given together, got one of them")
        if student_feats is not None and teacher_feats is not None:
            self.terms_from_embeddings(*self.embed(student_feats, teacher_feats), weights=weights)
        last = self._last
        if not last.batch:
            raise RuntimeError("diagnostics needs a call of the loss first")
        report = graph_report(self, last)
        self._last = last
        judges_embeddings = self._training_calls >= CHECKED_CALLS[-1]
        if reasons := vacuous(report, last.batch, self, judges_embeddings):
            self._watch.warn_once("vacuous", reasons)
        return report

    def param_groups(self) -> list[dict]:
        """Named parameter groups: ``student_graph``, ``teacher_graph`` and ``classifier`` (where they exist)."""
        modules = {
            "student_graph": self.student_heads,
            "teacher_graph": self.teacher_heads,
            "classifier": self.classifier,
        }
        return [{"name": name, "params": list(m.parameters())} for name, m in modules.items() if m is not None]
