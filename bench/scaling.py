"""Memory, traffic and arithmetic per rank of the graph terms, by formula, at any size.

The formulas count what ``gkd_fast.distributed`` and the ops send and keep; tests compare them with the bytes that
processes really send. A step is that of ``GraphKDLoss``, forward + backward, gradients to the students and to both
sides' graph convolutions (the teacher's learn from labels), with B samples in equal shards of b = B/W rows; its graphs
have their own nodes in them (``neighbors=None, self_weight=None``).
"""

from dataclasses import dataclass

from gkd_fast import distributed

LOG_SUM_BYTES = 8


@dataclass(frozen=True)
class Step:
    """A step of the loss.

    Attributes:
        batch: B, over all ranks.
        ranks: W.
        student_widths, teacher_widths: of the stages' features.
        embed: width E of the graph embeddings.
        feature_bytes: of a number as it travels: 4, or 2 under autocast.
        sum_bytes: of a number of statistics and upstreams: 4, or 8 for float64.
        budget: of the gathered columns of a call, in bytes (``gkd_fast.distributed.GATHER_BUDGET``).
    """

    batch: int
    ranks: int
    student_widths: tuple[int, ...] = (128, 128, 128)
    teacher_widths: tuple[int, ...] = (128, 128, 128)
    embed: int = 128
    feature_bytes: int = 4
    sum_bytes: int = 4
    budget: float = distributed.GATHER_BUDGET

    @property
    def rows(self) -> int:
        """b, of the largest shard."""
        return -(-self.batch // self.ranks)

    @property
    def stages(self) -> int:
        return len(self.student_widths) + len(self.teacher_widths)

    def rings(self, row_bytes: int) -> bool:
        """Whether columns of so many bytes a row go around in a ring."""
        return self.batch * row_bytes > self.budget


def graph_conv_messages(step: Step, width: int, nodes_gradient: bool) -> list[int]:
    """Bytes of every message of a symmetric graph convolution, forward and backward, by its row; see ``traffic``.

    Forward: the nodes for the degrees, then messages and degrees. Backward: upstreams and degrees for the messages'
    gradient; then degrees and node terms for the nodes' gradient. A ring sends nodes, messages and upstreams again.
    """
    nodes, messages = step.feature_bytes * width, step.feature_bytes * step.embed
    upstream, number = step.sum_bytes * step.embed, step.sum_bytes
    if step.rings(nodes + messages):
        found = [nodes, nodes + messages + number, nodes + messages + upstream + number]
        return found + ([nodes + messages + upstream + 2 * number] if nodes_gradient else [])
    return [nodes, messages + number, upstream + number] + ([2 * number] if nodes_gradient else [])


def loss_messages(step: Step) -> list[int]:
    """The same of node_contrast and relation_kl. They share the gathered embeddings.

    node_contrast's backward pass needs nothing, since its weighted sums are kept.
    """
    students, teachers, number = len(step.student_widths), len(step.teacher_widths), step.sum_bytes
    student_rows, teacher_rows = (step.feature_bytes * step.embed * count for count in (students, teachers))
    statistics = number * 2 * students * teachers + LOG_SUM_BYTES * (students + teachers)
    node = [teacher_rows]
    if step.rings(student_rows + teacher_rows):
        return [*node, student_rows + teacher_rows, student_rows + teacher_rows + statistics]
    return [*node, student_rows, statistics]


def moments(step: Step, width: int) -> int:
    """Bytes of a rank's part of the adaptive bandwidth."""
    return step.sum_bytes * (width + 2)


def traffic(step: Step) -> float:
    """Bytes that a rank sends, and receives, per step: a message m goes to W − 1 others, gathered or around a ring."""
    if step.ranks == 1:
        return 0
    headers = 2 * 16
    total = headers
    for widths, nodes_gradient in ((step.student_widths, True), (step.teacher_widths, False)):
        for width in widths:
            total += moments(step, width) + step.rows * sum(graph_conv_messages(step, width, nodes_gradient))
    total += step.rows * sum(loss_messages(step))
    return (step.ranks - 1) * total


def memory(step: Step) -> float:
    """Bytes of the columns that a rank holds at once, beyond its own rows.

    Gathered ones stay until the backward pass of what they were gathered for is over. The losses' comes first, with
    their upstreams and statistics; then, a graph convolution's upstreams, degrees and node terms are there. Of a ring
    there are three messages (at work, done, arriving) and two blocks of unit rows.
    """
    if step.ranks == 1:
        return 0
    kept = passing = 0.0
    messages = min(3, step.ranks)
    copied = step.sum_bytes if step.feature_bytes != step.sum_bytes else 0
    for widths, nodes_gradient in ((step.student_widths, True), (step.teacher_widths, False)):
        for width in widths:
            if step.rings(step.feature_bytes * (width + step.embed)):
                message = graph_conv_messages(step, width, nodes_gradient)[-1]
                passing = max(passing, messages * message + 2 * (step.sum_bytes * width + copied * step.embed))
            else:
                kept += step.batch * step.sum_bytes * (width + step.embed)
    beside = step.batch * step.sum_bytes * (step.embed + 2) if kept else 0
    if step.rings(step.feature_bytes * step.embed * step.stages):
        passing = max(passing, messages * loss_messages(step)[-1] + 2 * step.sum_bytes * step.embed * step.stages)
    else:
        gathered = step.batch * (step.sum_bytes * step.embed * step.stages + loss_messages(step)[-1])
        beside = max(beside, gathered)
    kept += beside
    return kept + step.rows * passing


def products(step: Step) -> float:
    """Floating-point operations of the matrix products per rank: a unit is 2·b·B·width. One rank alone halves the
    products that are symmetric."""
    unit = 2.0 * step.rows * step.batch
    half = 0.5 if step.ranks == 1 else 1.0
    students, teachers = len(step.student_widths), len(step.teacher_widths)
    total = 0.0
    for widths, nodes_gradient in ((step.student_widths, True), (step.teacher_widths, False)):
        for width in widths:
            # Degrees; similarities and messages; similarities and upstreams; the weights' two products and the sum.
            total += unit * half * (3 * width + 2 * step.embed)
            total += unit * half * (2 * width + 2 * step.embed) * nodes_gradient
    total += unit * step.embed * 2 * students * teachers
    return total + unit * half * step.embed * (2 * (students + teachers) + students)


def ring_from(step: Step) -> int:
    """The global batch from which the embeddings of both losses go around in a ring."""
    return int(step.budget // (step.feature_bytes * step.embed * step.stages)) + 1
