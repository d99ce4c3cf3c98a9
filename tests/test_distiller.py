"""The method as one module: what it trains, what it holds, and that nothing around it changes that."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gkd_fast import GraphDistiller, GraphKDLoss, losses
from gkd_fast.distiller import CALLS_WITHOUT_META_STEP, MetaSettings

STAGES = ["1", "3"]


def network(width: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width, 4),
        )


def batch(size: int = 12, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 9, 9, generator=generator), torch.randint(4, (size,), generator=generator)


def distiller_of(**options) -> GraphDistiller:
    images, _ = batch()
    student, teacher = network(3, seed=1), network(5, seed=2)
    torch.manual_seed(4)
    options = {"sample": images, "embed_dim": 8, "meta": MetaSettings(width=8, lr=0.5)} | options
    return GraphDistiller(student, teacher, STAGES, STAGES, 4, **options)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: nn.Module, part: str) -> bool:
    names = [name for name, _ in module.named_parameters() if name.startswith(part)]
    assert names
    return all(not torch.equal(before[name], module.state_dict()[name]) for name in names)


def step(distiller, optimizer, images, labels):
    loss, terms, logits = distiller(images, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss, terms, logits


def test_a_step_trains_student_and_graphs_and_a_meta_step_the_pair_weights():
    distiller = distiller_of()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    before, teacher = state(distiller), state(distiller.teacher)
    loss, terms, logits = step(distiller.train(), optimizer, *batch())
    assert list(terms) == ["cross_entropy", "kd", "node", "relation", "teacher_graph"] and logits.shape == (12, 4)
    torch.testing.assert_close(loss.detach(), sum(terms.values()))
    assert not any(x.requires_grad for x in terms.values())
    assert moved(before, distiller, "student.") and moved(before, distiller, "criterion.")
    assert not any(x.requires_grad for x in distiller.pair_weights.parameters())
    assert not moved(before, distiller, "pair_weights.")  # by weight decay neither

    between = state(distiller)
    assert distiller.meta_step(*batch())["meta_gradient_norm"] > 0
    assert moved(before, distiller, "pair_weights.student_projections.0.weight")
    for name, x in distiller.state_dict().items():
        assert name.startswith("pair_weights.") or torch.equal(x, between[name]), name
    assert all(torch.equal(x, teacher[name]) for name, x in distiller.teacher.state_dict().items())


def test_the_teacher_is_no_part_of_it_but_moves_with_it():
    distiller = distiller_of().train()
    assert not any(module.training for module in distiller.teacher.modules())
    own = {id(p) for p in distiller.teacher.parameters()}
    assert not own & {id(p) for p in distiller.parameters()} and not any(
        "teacher." in n for n in distiller.state_dict()
    )
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    distiller.double()
    assert {p.dtype for p in (*distiller.teacher.parameters(), *distiller.parameters())} == {torch.float64}
    assert next(distiller.to("meta").teacher.parameters()).device.type == "meta"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_apart(duplicate):
    distiller = distiller_of()
    other = duplicate(distiller)
    expected = distiller(*batch()).loss
    torch.testing.assert_close(other(*batch()).loss, expected, rtol=0, atol=0)
    other.meta_step(*batch())
    torch.testing.assert_close(distiller(*batch()).loss, expected)
    assert moved(state(distiller), other, "pair_weights.student_projections.0.weight")


def test_a_checkpoint_restores_it():
    distiller, other = distiller_of(), distiller_of()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    for _ in range(2):
        step(distiller, optimizer, *batch())
        distiller.meta_step(*batch())
    saved = copy.deepcopy([distiller.state_dict(), distiller.meta_optimizer.state_dict()])
    other.load_state_dict(saved[0])
    other.meta_optimizer.load_state_dict(saved[1])
    for one in (distiller, other):
        one.meta_step(*batch())
    for name, x in distiller.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], x, rtol=0, atol=0)


def test_graph_none_compares_the_plain_features():
    distiller = distiller_of(graph="none", embed_dim=6)  # the student's last stage is that wide
    images, labels = batch()
    features = distiller.student_outputs(images).features, distiller.teacher_outputs(images).features
    embeddings, _ = distiller.criterion.embed(*features)
    torch.testing.assert_close(embeddings[1], features[0][1], rtol=0, atol=0)
    torch.testing.assert_close(embeddings[0], distiller.criterion.student_heads[0].projection(features[0][0]))
    one_by_one = [distiller.criterion.embed(*([x[i : i + 1] for x in s] for s in features))[0][0] for i in range(12)]
    torch.testing.assert_close(torch.cat(one_by_one), embeddings[0])
    assert "student_neighbors" not in distiller.diagnostics(images)
    step(distiller, torch.optim.SGD(distiller.parameters(), lr=0.1), images, labels)
    with pytest.raises(ValueError, match="graph must be one of .*, got 'non'"):
        GraphKDLoss(8, 8, num_classes=2, graph="non")


def test_without_graphs_and_with_further_losses():
    images, labels = batch()

    class LastStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = losses.InfoNCE(6, 10)

        def forward(self, students, teachers):
            return self.loss(students[-1], teachers[-1])

    student, teacher = network(3), network(5)
    distiller = GraphDistiller(
        student, teacher, STAGES, STAGES, criterion=None, kd_weight=0, extra_losses={"nce": LastStage()}
    )
    distiller(images, labels)
    before = state(distiller)
    _, terms, _ = step(distiller, torch.optim.SGD(distiller.parameters(), lr=0.1), images, labels)
    assert list(terms) == ["cross_entropy", "nce"] and moved(before, distiller, "extra_losses.nce")
    alone = GraphDistiller(student, None, criterion=None, student_stages=STAGES)
    assert list(alone(images, labels).terms) == ["cross_entropy"]


def test_dictionaries_in_and_out_and_labels_that_are_probabilities():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = network(width)

        def forward(self, pixel_values):
            return {"logits": self.net(pixel_values), "other": None}

    images, labels = batch()
    student, teacher = Model(3), Model(5)
    stages = [f"net.{name}" for name in STAGES]
    distiller = GraphDistiller(student, teacher, stages, stages, 4, sample={"pixel_values": images}, embed_dim=8)
    expected = distiller({"pixel_values": images}, labels)
    one_hot = nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(distiller((images,), one_hot).loss, expected.loss)
    smooth = GraphDistiller(student, None, criterion=None, student_stages=stages, label_smoothing=0.2)
    expected = nn.functional.cross_entropy(expected.logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(smooth(images, labels).loss, expected)


def test_micro_batches_and_compilation_change_nothing():
    images, labels = batch()
    found = []
    for micro_batch, compiled in ((None, False), (5, False), (None, True)):
        # In training mode batch norm's statistics would be those of the micro-batches.
        distiller = distiller_of(micro_batch=micro_batch).double().eval()
        module = torch.compile(distiller, backend="eager") if compiled else distiller
        loss, _, _ = module(images.double(), labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in distiller.parameters() if p.requires_grad)])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("how", ["the student", "both networks", "all of it"])
def test_compiled_it_trains_and_takes_meta_steps_alike(how):
    """Compiled graphs have no second derivatives, so that a meta-step goes without them."""
    images, labels = batch()
    found = []
    for compiled in (False, True):
        distiller = distiller_of().double()
        module = distiller
        if compiled and how == "the student":
            distiller.student.compile(backend="aot_eager")
        elif compiled and how == "both networks":
            both = (torch.compile(x, backend="aot_eager") for x in (network(3, seed=1), network(5, seed=2)))
            torch.manual_seed(4)
            options = {"sample": images, "embed_dim": 8, "meta": MetaSettings(width=8, lr=0.5)}
            module = distiller = GraphDistiller(*both, STAGES, STAGES, 4, **options).double()
        elif compiled:
            module = torch.compile(distiller, backend="aot_eager")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        for _ in range(2):
            step(module, optimizer, images.double(), labels)
            distiller.meta_step(images.double(), labels)
        found.append([p.detach() for p in distiller.parameters()])
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_loss_scale_cancels_out(micro_batch):
    images, labels = batch()
    plain, scaled = (distiller_of(micro_batch=micro_batch) for _ in range(2))
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), images, labels)
    optimizer, scaler = torch.optim.SGD(scaled.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(scaled(images, labels).loss).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(list(scaled.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_autocast_around_it_reaches_steps_and_meta_steps(micro_batch):
    distiller = distiller_of(micro_batch=micro_batch)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    seen = set()
    distiller.student[3].register_forward_hook(lambda *args: seen.add(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = distiller(*batch())
    loss.backward()
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller.meta_step(*batch())["meta_gradient_norm"] > 0
    assert loss.dtype == torch.float32 and seen == {torch.bfloat16}
    seen.clear()
    with torch.autocast("cpu", torch.float16):
        distiller.meta_step(*batch())
    assert seen == {torch.float32}


def test_pair_weights_that_no_meta_step_trains_are_told_of():
    distiller = distiller_of()
    distiller._training_calls = CALLS_WITHOUT_META_STEP - 1
    with pytest.warns(UserWarning, match="meta_step was never called"):
        distiller(*batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": None}, "sample is needed to make the criterion"),
        ({"criterion": "graphs"}, "criterion must be a GraphKDLoss, 'graph' or None, got 'graphs'"),
        ({"criterion": None}, "embed_dim: options of a criterion that is made here"),
        ({"kd_weight": -1.0}, "kd_weight must"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be in \[0, 1\], got 2.0"),
        ({"teacher_graph": "frozen", "pairs": "matched"}, "meta needs embeddings of one width"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        distiller_of(**options)
    with pytest.raises(ValueError, match="meta must be True or MetaSettings"):
        distiller_of(meta=None).meta_step(*batch())
