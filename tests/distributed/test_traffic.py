"""What a step really sends, receives, holds and multiplies, against the formulas of ``bench/scaling.py``."""

import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench import scaling
from gkd_fast import GraphKDLoss, distributed
from gkd_fast.functional import graph_conv
from gkd_fast.ops.columns import Columns
from tests.ops_cases import Calls, requires_cpp

COUNTERS = Path("/proc/self/io")
pytestmark = [requires_cpp, pytest.mark.skipif(not COUNTERS.exists(), reason="counts bytes by Linux's /proc/self/io")]

WIDTHS = {"student_widths": (24, 40), "teacher_widths": (56, 32, 24)}


def written() -> int:
    """Bytes that this process has written, to sockets above all."""
    return int(re.search(r"wchar: (\d+)", COUNTERS.read_text()).group(1))


class Received:
    """Counts the bytes of other ranks that collectives deliver to this one."""

    def __enter__(self):
        self.total = 0
        self.patches = pytest.MonkeyPatch()
        gather, start = getattr(dist, distributed.GATHER), dist.batch_isend_irecv

        def counting_gather(output, x, **options):
            self.total += output.nbytes - x.nbytes
            return gather(output, x, **options)

        def counting_start(operations):
            self.total += sum(o.tensor.nbytes for o in operations if o.op is dist.irecv)
            return start(operations)

        self.patches.setattr(dist, distributed.GATHER, counting_gather)
        self.patches.setattr(dist, "batch_isend_irecv", counting_start)
        return self

    def __exit__(self, *exception):
        self.patches.undo()


def problem(group, batch):
    """A loss in its steady state and this rank's arguments."""
    ranks = dist.get_world_size(group)
    torch.manual_seed(0)
    options = {"neighbors": None, "self_weight": None}  # the graphs of the formulas
    criterion = GraphKDLoss(*WIDTHS.values(), num_classes=3, embed_dim=48, process_group=group, **options)
    criterion._training_calls = 2  # its own look at the graphs is over
    students, teachers = ([torch.randn(batch // ranks, w) for w in widths] for widths in WIDTHS.values())
    return criterion, [x.requires_grad_() for x in students], teachers, torch.randint(3, (batch // ranks,))


def step(group, batch, budget):
    """Bytes sent and received in a step of the loss."""
    distributed.GATHER_BUDGET = budget
    criterion, *arguments = problem(group, batch)
    dist.barrier(group)
    with Received() as received:
        before = written()
        criterion(*arguments).backward()
        return written() - before, received.total


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_is_that_of_the_formulas(pool, ranks, budget):
    """What is sent beyond it are the transport's own headers and the alignment: as much for any batch."""
    excess = []
    for batch in (1024, 4096):
        expected = scaling.traffic(scaling.Step(batch, ranks, **WIDTHS, embed=48, budget=budget))
        results = pool.run(step, batch, budget, ranks=ranks)
        assert all(received == pytest.approx(expected, rel=1e-3) for _, received in results)
        excess += [[sent - expected for sent, _ in results]]
    assert excess[0] == excess[1] and 0 <= max(excess[0]) < 11_000 * (ranks - 1)


def test_traffic_where_some_calls_gather_and_others_do_not(pool):
    """The nodes and messages of the narrower stages fit the budget, those of the wider ones and the losses' do not."""
    budget = 1024 * 4 * (40 + 48)
    expected = scaling.traffic(scaling.Step(1024, 2, **WIDTHS, embed=48, budget=budget))
    assert [received for _, received in pool.run(step, 1024, budget, ranks=2)] == pytest.approx(
        [expected] * 2, rel=1e-3
    )


def convolution(group, rows, width, channels):
    """Bytes received by graph_conv with its search, and its results beside those of one process."""
    distributed.GATHER_BUDGET = float("inf")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(0)
    nodes, messages = (torch.randn(ranks * rows, w, generator=generator) for w in (width, channels))
    mine = slice(rank * rows, (rank + 1) * rows)
    with Received() as received:
        outputs = [graph_conv(nodes[mine], messages[mine], process_group=group)]
    own = nodes[mine]
    outputs.append(graph_conv(own, own, process_group=group))
    expected = [graph_conv(nodes, x)[mine] for x in (messages, nodes)]
    return received.total, max((x - y).abs().max().item() for x, y in zip(outputs, expected))


def test_nodes_travel_once_for_the_search_and_the_convolution(pool):
    """And the messages, and log-sums in float64; what is summed over the ranks takes a few hundred bytes."""
    for received, error in pool.run(convolution, 512, 40, 48, ranks=2):
        assert received == pytest.approx(512 * (4 * (40 + 48) + 8), rel=0.01) and error < 1e-4


def held(group, batch, budget):
    """The most bytes of columns that a step has at once, as the ops see them."""
    distributed.GATHER_BUDGET = budget
    criterion, *arguments = problem(group, batch)
    alive = weakref.WeakKeyDictionary()
    peak = 0
    blocks, start = Columns.blocks, distributed.Shards._start

    def arriving(self, outgoing, to, message, source):
        alive[message.untyped_storage()] = None
        return start(self, outgoing, to, message, source)

    def watched(self, *extra, **options):
        nonlocal peak
        for block in blocks(self, *extra, **options):
            alive.update({x.untyped_storage(): None for x in (*block.columns, *block.extra)})
            peak = max(peak, sum(storage.nbytes() for storage in alive))
            yield block

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Columns, "blocks", watched)
        patches.setattr(distributed.Shards, "_start", arriving)
        criterion(*arguments).backward()
    return peak


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_is_that_of_the_formulas(pool, ranks, budget):
    expected = scaling.memory(scaling.Step(1024, ranks, **WIDTHS, embed=48, budget=budget))
    assert pool.run(held, 1024, budget, ranks=ranks) == pytest.approx([expected] * ranks, rel=0.01)


def products(group, batch):
    """Operations of the matrix products of a step, by the ops that it calls and their sizes."""
    criterion, *arguments = problem(group, batch)
    with Calls() as recorder:
        criterion(*arguments).backward()
    total = 0
    for op, given in recorder.calls:
        if op in ("graph_degrees", "graph_conv", "graph_conv_backward"):
            nodes, columns = given["nodes"], given.get("column_nodes", given["nodes"])
            width = given["messages"].shape[1] if "messages" in given else 0
            dims = [nodes.shape[1]] if op == "graph_degrees" else [nodes.shape[1], width]
            if op == "graph_conv_backward" and given["needs"][0]:
                dims = [nodes.shape[1], width, width, nodes.shape[1]]
        elif op in ("node_contrast", "relation_kl", "relation_kl_backward"):
            nodes, students = given["students"][0], len(given["students"])
            both = students + len(given["teachers"])
            columns = given.get("teacher_columns", [nodes])[0]
            count = {"node_contrast": 2 * sum(given.get("wanted", ())), "relation_kl": both}.get(op, both + students)
            dims = [nodes.shape[1]] * count
        else:
            continue
        total += 2 * len(nodes) * len(columns) * sum(dims)
    return total


@pytest.mark.parametrize("ranks", [2, 4])
def test_products_are_those_of_the_formulas(pool, ranks):
    expected = scaling.products(scaling.Step(256, ranks, **WIDTHS, embed=48))
    assert pool.run(products, 256, ranks=ranks) == [expected] * ranks
