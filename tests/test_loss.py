import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gkd_fast import GraphKDLoss, PairWeightNetwork, StageFeatures, functional

STUDENT_DIMS, TEACHER_DIMS, CLASSES = [6, 8], [10, 12, 14], 5


def _criterion(**options) -> GraphKDLoss:
    options = {"num_classes": CLASSES, "embed_dim": 7, "backend": "reference"} | options
    return GraphKDLoss(STUDENT_DIMS, TEACHER_DIMS, **options)


def _batch(batch: int = 11, dtype=torch.float32):
    student = [torch.randn(batch, d, dtype=dtype, requires_grad=True) for d in STUDENT_DIMS]
    teacher = [torch.randn(batch, d, dtype=dtype, requires_grad=True) for d in TEACHER_DIMS]
    return student, teacher, torch.randint(CLASSES, (batch,))


def test_terms_are_weighted_means_over_samples_and_sums_over_pairs(published_case):
    case = published_case
    num_students, _, width = case["students"].shape
    dims = [width] * num_students, [width] * len(case["teachers"])
    criterion = GraphKDLoss(*dims, teacher_graph="frozen", backend="reference").double()
    terms = criterion.terms_from_embeddings([*case["students"]], [*case["teachers"]], weights=case["weights"])
    torch.testing.assert_close(terms["node"], case["node_loss"], atol=1e-10, rtol=0)
    torch.testing.assert_close(terms["relation"], case["relation_loss"], atol=1e-10, rtol=0)


def test_the_loss_is_the_sum_of_its_terms():
    criterion, batch = _criterion(), _batch()
    terms = criterion.terms(*batch)
    assert list(terms) == ["node", "relation", "teacher_graph"]
    torch.testing.assert_close(criterion(*batch), sum(terms.values()))


def test_factors_scale_the_terms_and_zero_leaves_them_out():
    batch = _batch()
    torch.manual_seed(1)
    plain = _criterion().terms(*batch)
    torch.manual_seed(1)
    scaled = _criterion(node_weight=3.0, relation_weight=0).terms(*batch)
    torch.testing.assert_close(scaled["node"], 3 * plain["node"])
    assert "relation" not in scaled


def test_teacher_graph_learns_from_labels_alone():
    criterion = _criterion()
    student, teacher, target = _batch()
    terms = criterion.terms(student, teacher, target)
    heads = list(criterion.teacher_heads.parameters())
    for name in ("node", "relation"):
        gradients = torch.autograd.grad(terms[name], [*heads, *teacher], retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["teacher_graph"], heads, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(terms["teacher_graph"], [*student, *teacher], allow_unused=True))


def test_teacher_graph_is_the_cross_entropy_of_one_shared_classifier():
    criterion = _criterion()
    student, teacher, target = _batch()
    _, et = criterion.embed(student, teacher)
    expected = sum(F.cross_entropy(criterion.classifier(e), target) for e in et)
    torch.testing.assert_close(criterion.terms(student, teacher, target)["teacher_graph"], expected)


def test_soft_targets():
    criterion = _criterion()
    student, teacher, target = _batch()
    one_hot = F.one_hot(target, CLASSES).float()
    torch.testing.assert_close(criterion(student, teacher, one_hot), criterion(student, teacher, target))


def test_target_is_needed_in_training_mode_alone():
    criterion = _criterion()
    student, teacher, _ = _batch()
    with pytest.raises(ValueError, match="target is needed in training mode"):
        criterion(student, teacher)
    assert list(criterion.eval().terms(student, teacher)) == ["node", "relation"]
    frozen = _frozen()
    assert list(frozen.terms(student, teacher[:2])) == ["node", "relation"]


def _frozen() -> GraphKDLoss:
    return GraphKDLoss(STUDENT_DIMS, TEACHER_DIMS[:2], teacher_graph="frozen", pairs="matched", backend="reference")


def test_frozen_teachers_lead_the_widths():
    student, teacher, _ = _batch()
    criterion = _frozen()
    es, et = criterion.embed(student, teacher[:2])
    assert [e.shape[1] for e in es] == TEACHER_DIMS[:2]
    assert all(torch.equal(e, t) for e, t in zip(et, teacher))
    # Pairs of unlike widths go to the node loss apart; each is what it would be alone.
    expected = sum(functional.node_contrast(s, t).mean() for s, t in zip(es, et)) * 0.5 / 2
    torch.testing.assert_close(criterion.terms(student, teacher[:2])["node"], expected)
    assert [g["name"] for g in criterion.param_groups()] == ["student_graph"]


def test_weights_default_to_one_half():
    batch = _batch()
    criterion = _criterion()
    torch.testing.assert_close(criterion(*batch), criterion(*batch, weights=torch.full((11, 2, 3), 0.5)))


def test_a_tensor_of_weights_has_gradient():
    weights = torch.rand(11, 2, 3, requires_grad=True)
    _criterion()(*_batch(), weights=weights).backward()
    assert (weights.grad != 0).all()


def test_a_weight_network_is_evaluated_without_gradient():
    criterion, network = _criterion(), PairWeightNetwork(7, 2, 3)
    student, teacher, target = _batch()
    es, et = criterion.embed(student, teacher)
    with torch.no_grad():
        weights = network(es, et)
    by_network = criterion.terms_from_embeddings(es, et, target, weights=network)
    by_tensor = criterion.terms_from_embeddings(es, et, target, weights=weights)
    for name in by_tensor:
        torch.testing.assert_close(by_network[name], by_tensor[name])
    total = sum(by_network.values())
    assert all(
        g is None for g in torch.autograd.grad(total, list(network.parameters()), allow_unused=True, retain_graph=True)
    )
    found, expected = (
        torch.autograd.grad(sum(t.values()), student, retain_graph=True) for t in (by_network, by_tensor)
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected))
    assert not set(network.parameters()) & set(criterion.parameters())


def test_a_weight_network_can_be_differentiated_later_in_the_same_autocast():
    criterion, network = _criterion(), PairWeightNetwork(7, 2, 3)
    student, teacher, target = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        criterion(student, teacher, target, weights=network)
        es, et = criterion.embed(student, teacher)
        loss = criterion.terms_from_embeddings(es, et, weights=network(es, et))["node"]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("pairs", [[(0, 2), (1, 0)], [(1, 1)]])
def test_pairs_restrict_both_losses(pairs):
    batch = _batch()
    torch.manual_seed(1)
    everything = _criterion()
    torch.manual_seed(1)
    some = _criterion(pairs=pairs)
    mask = torch.zeros(11, 2, 3)
    for s, t in pairs:
        mask[:, s, t] = 0.5
    expected = everything.terms(*batch, weights=mask)
    found = some.terms(*batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_matched_pairs():
    criterion = GraphKDLoss([3, 4], [5, 6], num_classes=2, pairs="matched")
    assert criterion.pairs == [(0, 0), (1, 1)]


def test_features_of_any_rank():
    criterion = _criterion(pool="mean")
    _, teacher, target = _batch()
    maps = torch.randn(11, 6, 2, 3)
    tokens = torch.randn(11, 4, 8)
    found = criterion([maps, tokens], teacher, target)
    torch.testing.assert_close(found, criterion([maps.mean((2, 3)), tokens.mean(1)], teacher, target))
    with_cls = _criterion(pool="cls")
    es, _ = with_cls.embed([torch.zeros(11, 6), tokens], teacher)
    torch.testing.assert_close(es[1], with_cls.student_heads[1](tokens[:, 0]))
    flattened = GraphKDLoss(36, 10, num_classes=CLASSES, pool=lambda x: x.flatten(1))
    assert flattened(maps, teacher[0], target).isfinite()


def test_one_tensor_each():
    criterion = GraphKDLoss(6, 10, num_classes=CLASSES)
    student, teacher, target = _batch()
    torch.testing.assert_close(criterion(student[0], teacher[0], target), criterion(student[:1], teacher[:1], target))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_batches(batch):
    student, teacher, target = _batch(batch)
    loss = _criterion()(student, teacher, target)
    loss.backward()
    assert loss.isfinite() and all(s.grad.isfinite().all() for s in student)


def test_autocast_losses_are_float32():
    criterion = _criterion()
    student, teacher, target = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        terms = criterion.terms(student, teacher, target, weights=PairWeightNetwork(7, 2, 3))
    exact = criterion.terms(student, teacher, target)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.1, atol=0.02)


def test_double():
    criterion = _criterion().double()
    assert criterion(*_batch(dtype=torch.float64)).dtype == torch.float64


def test_copies_pickles_and_state_dicts_give_the_same_loss():
    criterion, batch = _criterion(), _batch()
    expected = criterion(*batch)
    loaded = _criterion()
    assert not torch.equal(loaded(*batch), expected)
    loaded.load_state_dict(criterion.state_dict())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), loaded):
        assert torch.equal(twin(*batch), expected)


def test_to_another_device():
    criterion = _criterion().to("meta")
    student, teacher, target = _batch()
    moved = criterion.eval()([s.to("meta") for s in student], [t.to("meta") for t in teacher], target.to("meta"))
    assert moved.device.type == "meta" and moved.shape == ()


def test_compiled():
    criterion, batch = _criterion(), _batch()
    compiled = torch.compile(criterion, fullgraph=True)
    loss, expected = compiled(*batch), criterion(*batch)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, batch[0])
    for g, e in zip(found, torch.autograd.grad(expected, batch[0])):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_param_groups_hold_every_parameter_once():
    criterion = _criterion()
    groups = criterion.param_groups()
    assert [g["name"] for g in groups] == ["student_graph", "teacher_graph", "classifier"]
    assert sorted(map(id, criterion.parameters())) == sorted(id(p) for g in groups for p in g["params"])


def test_diagnostics():
    criterion = _criterion()
    with pytest.raises(RuntimeError, match="needs a call"):
        criterion.diagnostics()
    student, teacher, target = _batch()
    criterion(student, teacher, target, weights=PairWeightNetwork(7, 2, 3))
    report = criterion.diagnostics()
    es, et = criterion.embed(student, teacher)
    losses = functional.node_contrast(es, et, backend="reference")
    assert report["node_loss_minus_log_batch"] == pytest.approx(losses.mean().item() - math.log(11), abs=1e-5)
    cosines = F.normalize(es[0]) @ F.normalize(es[0]).T
    assert report["student_cosine"][0] == pytest.approx((cosines.sum().item() - 11) / 110, abs=1e-5)
    found = functional.effective_neighbors(teacher[2], report["teacher_bandwidth"][2], others=True)
    assert report["teacher_neighbors"][2] == pytest.approx(found.mean().item())
    assert report["wanted_neighbors"] == 8
    own_node = _criterion(neighbors=None, self_weight=None)
    own_node(student, teacher, target)
    found = functional.effective_neighbors(teacher[2]).mean().item()
    assert own_node.diagnostics()["teacher_neighbors"][2] == pytest.approx(found)
    assert 0.3 < report["weight_mean"] < 0.7 and report["weight_std"] > 0


def test_diagnostics_wait_for_the_device_once(monkeypatch):
    """Numbers of weights, losses and of every stage come together."""
    criterion = GraphKDLoss([6, 7], [5], num_classes=3, embed_dim=8, backend="reference").eval()
    students, teachers = [torch.randn(12, 6), torch.randn(12, 7)], [torch.randn(12, 5)]
    criterion(students, teachers, torch.randint(0, 3, (12,)), weights=torch.rand(12, 2, 1))
    waits = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, f=plain, n=name: (waits.append(n), f(x))[1])
    report = criterion.diagnostics()
    assert waits == ["tolist"]
    numbers = [x for value in report.values() for x in (value if isinstance(value, list) else [value])]
    assert len(numbers) == 4 + 3 * 3 and all(type(x) is float for x in numbers)


def test_a_vacuous_graph_warns_once():
    student, teacher, target = _batch()
    alike = [1 + 0.05 * s.abs() for s in student]
    criterion = _criterion(bandwidth=1.0)
    with pytest.warns(UserWarning, match="student stage 0 has 11 effective neighbours of 11"):
        criterion(alike, teacher, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(alike, teacher, target)
        criterion.diagnostics()
        _criterion()(student, teacher, target)


def test_embeddings_that_coincide_warn_once_training_has_gone_on_for_a_while():
    criterion, batch = _criterion(), _batch(8)
    with torch.no_grad():
        criterion.student_heads[1].linears[0].bias.fill_(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            criterion(*batch)
    with pytest.warns(UserWarning, match=r"student stage 1 has embeddings of mean cosine (0\.99|1\.00)"):
        criterion(*batch)


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Conv2d(width, 2 * width, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(CLASSES),
    )  # fmt: skip


def test_from_models_reads_the_widths_and_leaves_no_trace():
    student, teacher = _network(4), _network(8)
    sample = torch.randn(3, 1, 8, 8)
    for network in (student, teacher):
        network(sample)
    student[3].eval()
    before = {**student.state_dict(), **{f"t{k}": v for k, v in teacher.state_dict().items()}}
    before = {k: v.clone() for k, v in before.items()}
    modes = [m.training for m in student.modules()]
    torch.manual_seed(1)
    stages = {"student_stages": ["1", "4"], "teacher_stages": ["4"]}
    criterion = GraphKDLoss.from_models(student, teacher, sample, **stages, num_classes=CLASSES)
    torch.manual_seed(1)
    by_hand = GraphKDLoss([4, 8], [16], num_classes=CLASSES)
    assert all(torch.equal(p, q) for p, q in zip(criterion.parameters(), by_hand.parameters(), strict=True))
    after = {**student.state_dict(), **{f"t{k}": v for k, v in teacher.state_dict().items()}}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert modes == [m.training for m in student.modules()]
    assert not student[1]._forward_hooks
    _, student_features = StageFeatures(student, ["1", "4"])(sample)
    _, teacher_features = StageFeatures(teacher, ["4"])(sample)
    assert criterion(student_features, teacher_features, torch.tensor([0, 1, 2])).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "num_classes is needed for teacher_graph='labels'"),
        ({"teacher_graph": "none"}, "teacher_graph must be 'labels' or 'frozen', got 'none'"),
        ({"teacher_graph": "frozen"}, r"student stage 0 is paired with widths \[10, 12, 14\]"),
        ({"pairs": "matched"}, "needs as many student as teacher stages, got 2, 3"),
        ({"pairs": "some"}, "pairs must be 'all', 'matched' or a list"),
        ({"pairs": []}, "pairs must be 'all', 'matched' or a list"),
        ({"pairs": [(2, 0)]}, r"pairs must lie below \(2, 3\), got \(2, 0\)"),
        ({"pool": "max"}, "pool must be 'mean', 'cls' or a callable, got 'max'"),
        ({"node_temperature": 0}, "node_temperature must be positive"),
        ({"relation_temperature": -1}, "relation_temperature must be positive"),
        ({"node_weight": -1}, "node_weight must be finite and not negative"),
        ({"node_weight": 0, "relation_weight": 0}, "must not both be 0"),
        ({"bandwidth": 0}, "bandwidth must be positive"),
        ({"normalization": "both"}, "normalization must be one of"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        _criterion(**options)


def test_bad_widths_say_what_is_wrong():
    for dims in (0, [], [3, -1], [2.5]):
        with pytest.raises(ValueError, match="student_dims must be a positive int or a list"):
            GraphKDLoss(dims, 3, num_classes=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, t, y: (s[:1], t, y), ValueError, "student_feats must hold 2 stages, got 1"),
        (lambda s, t, y: (s, t[0], y), ValueError, "teacher_feats must hold 3 stages, got 1"),
        (
            lambda s, t, y: ([s[1], s[0]], t, y),
            ValueError,
            r"student_feats\[0\] must have width 6, got shape \(11, 8\)",
        ),
        (lambda s, t, y: ([s[0], s[1][:4]], t, y), ValueError, r"student_feats\[1\] must have the batch size .* got 4"),
        (lambda s, t, y: ([x[:4] for x in s], t, y), ValueError, r"must have the students' batch size \(4\), got 11"),
        (lambda s, t, y: ([s[0], "x"], t, y), TypeError, r"student_feats\[1\] must be a Tensor, got str"),
        (lambda s, t, y: ([s[0][0], s[1]], t, y), ValueError, "features must be .* got shape"),
        (lambda s, t, y: (s, t, y[:3]), ValueError, "target must be 11 integer labels"),
        (lambda s, t, y: (s, t, y.float()), ValueError, "target must be 11 integer labels"),
        (lambda s, t, y: (s, t, y.to("meta")), ValueError, r"target must be on the device of the features \(cpu\)"),
        (lambda s, t, y: (s, t, torch.rand(11, 4)), ValueError, r"probabilities \[11, 5\], got torch.float32"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        _criterion()(*change(*_batch()))


def test_bad_weights_say_what_is_wrong():
    criterion, batch = _criterion(), _batch()
    with pytest.raises(ValueError, match=r"weights must have shape \(11, 2, 3\), got \(11, 2\)"):
        criterion(*batch, weights=torch.ones(11, 2))
    with pytest.raises(ValueError, match=r"weights must be on the device of the features \(cpu\), got meta"):
        criterion(*batch, weights=torch.ones(11, 2, 3, device="meta"))
    with pytest.raises(TypeError, match="weights must be a Tensor, a PairWeightNetwork or None, got float"):
        criterion(*batch, weights=0.5)


def test_losses_that_share_rows_are_those_of_the_functions():
    """And their gradients, of both terms together and of each alone, to the second order."""
    torch.manual_seed(3)
    x = [torch.randn(9, 7, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def terms(backend: str) -> dict:
        options = {"teacher_graph": "frozen", "backend": backend, "node_weight": 1.7, "relation_weight": 0.6}
        criterion = GraphKDLoss([7, 7], [7, 7, 7], **options)
        return criterion.terms_from_embeddings(x[:2], x[2:])

    def derivatives(loss):
        first = torch.autograd.grad(loss, x[:2], create_graph=True)
        return *first, *torch.autograd.grad(sum(g.sin().sum() for g in first), x[:2])

    for names in (["node", "relation"], ["node"], ["relation"]):
        found, expected = (derivatives(sum(terms(backend)[k] for k in names)) for backend in ("auto", "reference"))
        torch.testing.assert_close(found, expected)
