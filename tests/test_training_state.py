"""What a loss keeps from call to call: the column bank, counted calls, what diagnostics need, process groups."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gkd_fast import GraphKDLoss, PairWeightNetwork, UnrolledSGD

BATCH, DIM, CLASSES = 16, 6, 3
BACKENDS = ["reference", "auto"]


def _criterion(**options) -> GraphKDLoss:
    torch.manual_seed(0)
    return GraphKDLoss([DIM, DIM], DIM, num_classes=CLASSES, embed_dim=5, **options)


def _batch(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = [torch.randn(BATCH, DIM, generator=generator, requires_grad=True) for _ in range(2)]
    return student, torch.randn(BATCH, DIM, generator=generator), torch.arange(BATCH) % CLASSES


def _loss_of(criterion, layer, teacher, target, *student):
    return criterion([layer(student[0]), *student[1:]], teacher, target)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpointed_loss_has_the_plain_gradient_and_remembers_once(reentrant, inside, backend):
    """``inside``: the features are made within the checkpoint too, anew in the recomputation."""
    results = []
    for checkpointed in (False, True):
        criterion, layer = _criterion(column_bank=40, backend=backend), nn.Linear(DIM, DIM)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(DIM) * 2)
        for step in range(2):  # the second meets what the first remembered
            student, teacher, target = _batch(step)
            arguments = criterion, layer if inside else nn.Identity(), teacher, target
            call = partial(_loss_of, *arguments)
            loss = checkpoint(call, *student, use_reentrant=reentrant) if checkpointed else call(*student)
            gradients = torch.autograd.grad(loss, student) if not reentrant else None
            if gradients is None:
                loss.backward()
                gradients = [x.grad for x in student]
        results.append((loss.detach(), gradients, _state(criterion), criterion._training_calls))
    (loss, gradients, state, calls), found = results[0], results[1]
    assert torch.equal(found[0], loss) and found[3] == calls == 2
    assert all(torch.equal(f, g) for f, g in zip(found[1], gradients))
    assert found[2].keys() == state.keys() and all(torch.equal(found[2][k], state[k]) for k in state)
    assert len(state["bank.student_0"]) == 2 * BATCH


def test_a_full_bank_is_recomputed_with_what_has_left_it():
    criterion = _criterion(column_bank=BATCH + 2)
    for step in range(3):
        student, teacher, target = _batch(step)
        plain = copy.deepcopy(criterion)
        expected = torch.autograd.grad(plain(student, teacher, target), student)
        loss = checkpoint(lambda *s: criterion(s, teacher, target), *student, use_reentrant=False)  # noqa: B023
        assert all(torch.equal(f, e) for f, e in zip(torch.autograd.grad(loss, student), expected))


def test_a_recomputation_of_an_earlier_call_is_an_error():
    criterion = _criterion(column_bank=40)
    losses = []
    for step in range(2):
        student, teacher, target = _batch(step)
        losses.append(checkpoint(lambda *s, t=teacher, y=target: criterion(s, t, y), *student, use_reentrant=False))
    with pytest.raises(RuntimeError, match="column_bank: this recomputes a call that is not the last one"):
        sum(losses).backward()


def test_a_step_meets_the_bank_of_its_start_however_often_it_looks_at_its_loss():
    criterion = _criterion(column_bank=40)
    criterion(*_batch(0))
    student, teacher, target = _batch(1)
    terms = criterion.terms(student, teacher, target)
    loss = criterion(student, teacher, target)
    torch.testing.assert_close(loss, sum(terms.values()))
    assert len(criterion.state_dict()["bank.student_0"]) == 2 * BATCH
    torch.optim.SGD(criterion.parameters(), lr=0.1).zero_grad()
    with torch.no_grad():
        for p in criterion.parameters():
            p.add_(0.01)
    criterion(student, teacher, target)  # another step
    assert len(criterion.state_dict()["bank.student_0"]) == 40


def test_unrolled_steps_are_no_training_calls():
    criterion, layer, scale = _criterion(column_bank=40), nn.Linear(DIM, DIM), nn.Parameter(torch.ones(()))
    (student, _), teacher, target = _batch()
    criterion([layer(student), student], teacher, target)
    before = _state(criterion)

    def objective():
        return scale * criterion([layer(student), student], teacher, target)

    with UnrolledSGD(layer.parameters(), [layer], lr=0.1) as unrolled:
        unrolled.step(objective)
        unrolled.step(objective)
        assert unrolled.hypergradient(objective, [scale])[0].isfinite()
    assert criterion._training_calls == 1
    after = _state(criterion)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_terms_are_no_training_calls():
    criterion = _criterion()
    criterion.terms(*_batch())
    criterion.terms_from_embeddings(*criterion.embed(*_batch()[:2]), _batch()[2])
    criterion.eval()(*_batch())
    assert criterion._training_calls == 0


def test_a_call_keeps_no_features_and_no_embeddings():
    criterion = _criterion()
    student, teacher, target = _batch()
    features = [torch.relu(x) for x in student]
    teacher = teacher.clone()
    references = [weakref.ref(x.untyped_storage()) for x in (*features, teacher)]
    criterion(features, teacher, target, weights=PairWeightNetwork(5, 2, 1)).backward()
    del features, teacher
    gc.collect()
    kept = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.dim() == 2 and x.shape == (BATCH, DIM)]
    assert {id(x) for x in kept} <= {id(x) for x in student} | {id(x.grad) for x in student}
    del references


def test_diagnostics_leave_out_what_is_gone_and_take_features():
    criterion = _criterion()
    student, teacher, target = _batch()
    criterion(student, teacher, target)
    whole = criterion.diagnostics()
    assert {"student_cosine", "teacher_neighbors", "student_bandwidth"} <= whole.keys()
    criterion([x + 0 for x in student], teacher + 0, target)
    rest = criterion.diagnostics()
    assert set(rest) == {"weight_mean", "weight_std", "node_loss_minus_log_batch"}
    assert rest["node_loss_minus_log_batch"] == pytest.approx(whole["node_loss_minus_log_batch"])
    with pytest.raises(TypeError, match="student_feats and teacher_feats must be given together"):
        criterion.diagnostics(student)
    given = criterion.diagnostics(student, teacher)
    assert given.keys() == whole.keys()
    for name in whole:
        assert given[name] == pytest.approx(whole[name], rel=1e-5)


def test_diagnostics_of_a_compiled_call_are_its_numbers():
    criterion, batch = _criterion(), _batch()
    torch.compile(criterion, backend="eager", fullgraph=True)(*batch)
    numbers = criterion.diagnostics()
    assert set(numbers) == {"weight_mean", "weight_std", "node_loss_minus_log_batch"}
    whole = criterion.diagnostics(*batch[:2])
    assert numbers["node_loss_minus_log_batch"] == pytest.approx(whole["node_loss_minus_log_batch"], rel=1e-4)


def test_diagnostics_of_embeddings_alone():
    criterion = _criterion()
    embeddings = [torch.randn(BATCH, 5) for _ in range(3)]
    criterion.terms_from_embeddings(embeddings[:2], embeddings[2:])
    assert set(criterion.diagnostics()) >= {"student_cosine", "teacher_cosine"}
    assert "student_neighbors" not in criterion.diagnostics()


def test_a_loss_with_a_process_group_pickles_and_says_what_is_missing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        criterion = _criterion(process_group=torch.distributed.group.WORLD, column_bank=4)
        alone = criterion.terms(*_batch())["node"]
        loaded = pickle.loads(pickle.dumps(criterion))
        with pytest.raises(RuntimeError, match="process_group, of 1 ranks, was left behind .* set its attribute"):
            loaded(*_batch())
        assert copy.copy(criterion).process_group is copy.deepcopy(criterion).process_group is criterion.process_group
        again = pickle.loads(pickle.dumps(loaded))
        again.process_group = torch.distributed.group.WORLD
        assert again.terms(*_batch())["node"] > alone  # told from what the bank remembers too
        with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got int"):
            again.process_group = 3
        loaded.process_group = None
        assert loaded(*_batch()).isfinite()
    finally:
        torch.distributed.destroy_process_group()


def test_a_loss_pickles_while_its_features_are_alive():
    criterion, batch = _criterion(column_bank=4), _batch()
    criterion(*batch)
    twins = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))
    expected = criterion.eval()(*batch)
    for twin in twins:
        assert torch.equal(twin.eval()(*batch), expected)
        twin.diagnostics()


def _train(steps: int, weights=None, optimize=(), **options) -> None:
    """Steps of a student's layer and what else is to be optimized."""
    criterion, layer = _criterion(**options), nn.Linear(DIM, DIM)
    modules = {"criterion": criterion, "weights": weights}
    optimizer = torch.optim.SGD([*layer.parameters(), *(p for m in optimize for p in modules[m].parameters())], lr=0.1)
    (student, _), teacher, target = _batch()
    for _ in range(steps):
        optimizer.zero_grad()
        criterion([layer(student), student], teacher, target, weights=weights).backward()
        optimizer.step()


def test_parameters_that_no_optimizer_moves_are_told_once():
    with pytest.warns(
        UserWarning, match="in 100 training calls the parameters of student_graph, teacher_graph, class"
    ) as told:
        _train(230)
    assert len([w for w in told if "have not moved" in str(w.message)]) == 1


@pytest.mark.parametrize("optimized", [True, False])
def test_parameters_are_judged_after_a_step_however_many_calls_it_accumulates(optimized):
    criterion, layer = _criterion(), nn.Linear(DIM, DIM)
    optimizer = torch.optim.SGD([*layer.parameters(), *(criterion.parameters() if optimized else ())], lr=0.1)
    (student, _), teacher, target = _batch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for call in range(260):
            criterion([layer(student), student], teacher, target).backward()
            if call % 120 == 119:
                optimizer.step()
                optimizer.zero_grad()
    told = [str(w.message) for w in told if "have not moved" in str(w.message)]
    assert len(told) == (0 if optimized else 1) and all("in 200 training calls" in x for x in told)


def test_a_weight_network_in_the_optimizer_is_told():
    network = PairWeightNetwork(5, 2, 1)
    with pytest.warns(UserWarning, match="parameters of weights=PairWeightNetwork have not moved: .* without gradient"):
        _train(120, network, ["criterion", "weights"])


@pytest.mark.parametrize("frozen", [False, True])
def test_what_moves_or_is_frozen_is_no_matter(frozen):
    network = PairWeightNetwork(5, 2, 1).requires_grad_(False) if frozen else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(120, network, ["criterion"], pairs=[(0, 0)])


def test_an_optimizer_that_goes_around_version_counters_moves_them_too():
    criterion, (student, teacher, target) = _criterion(), _batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            criterion(student, teacher, target).backward()
            for p in criterion.parameters():
                p.data.add_(p.grad, alpha=-0.1)
                p.grad = None


def test_a_batch_of_one_is_told_once():
    criterion = _criterion()
    student, teacher, target = _batch()
    one = [x[:1] for x in student], teacher[:1], target[:1]
    with pytest.warns(UserWarning, match="a batch of one sample teaches nothing: .*drop_last=True"):
        criterion(*one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*one)
        _criterion().eval()(*one)
    banked = _criterion(column_bank=20)
    banked(student, teacher, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        banked(*one)  # told from what the bank holds


def test_the_advice_on_a_vacuous_graph_helps():
    features = torch.randn(400, 2048)  # all distances are alike, and the automatic bandwidth goes with them
    target = torch.arange(400) % CLASSES
    options = {"num_classes": CLASSES, "embed_dim": 5}
    with pytest.warns(UserWarning, match=r"such as bandwidth=([\d.]+)") as told:
        GraphKDLoss(2048, 2048, neighbors=None, self_weight=None, **options)(features, features, target)
    (message,) = [str(w.message) for w in told]
    assert "try bandwidth='auto'" not in message
    advised = float(message.rsplit("bandwidth=", 1)[1].split(";")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraphKDLoss(2048, 2048, bandwidth=advised, **options)(features, features, target)
        GraphKDLoss(2048, 2048, **options)(features, features, target)
    alike = torch.ones(20, 64)
    with pytest.warns(UserWarning, match="features coincide, which no bandwidth helps"):
        GraphKDLoss(64, 64, **options)(alike, alike, target[:20])
