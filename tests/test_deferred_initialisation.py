"""A loss that is made on the meta device and gets its memory and its numbers later."""

import pytest
import torch

from gkd_fast import GraphKDLoss, PairWeightNetwork

OPTIONS = {"num_classes": 3, "embed_dim": 5, "pairs": [(0, 0), (1, 0)], "column_bank": 6, "backend": "reference"}


def _made(device: str = "cpu") -> GraphKDLoss:
    with torch.device(device):
        return GraphKDLoss([4, 6], [4, 5], **OPTIONS)


def _call(criterion: GraphKDLoss) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    student, teacher = ([torch.randn(8, d, generator=generator) for d in dims] for dims in ([4, 6], [4, 5]))
    return criterion(student, teacher, torch.arange(8) % 3)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loaded_into_deferred_memory_gives_the_usual_loss(assign):
    usual, deferred = _made(), _made("meta")
    _call(usual)  # leaves embeddings in the bank
    if not assign:
        deferred.to_empty(device="cpu")
        for tensor in (*deferred.parameters(), *deferred.buffers()):
            # What uninitialised memory may hold.
            torch.nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else 8)
    deferred.load_state_dict(usual.state_dict(), assign=assign)
    for criterion in (usual, deferred):
        criterion.eval()
    expected, found = _call(usual), _call(deferred)
    assert expected.isfinite() and torch.equal(found, expected)


def test_everything_that_deferred_memory_leaves_open_is_in_the_state_dict():
    for module in (_made("meta"), PairWeightNetwork(4, 2, 2)):
        names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        assert names == set(module.state_dict())
