"""What autograd does around the ops, on interpreted kernels."""

import pytest
import torch

from tests.ops_cases import BANKED, FUNCTIONS
from tests.test_checkpointing import test_gradients_are_the_plain_ones as check_checkpointing
from tests.test_in_place import test_a_changed_output_has_its_own_gradient as check_in_place
from tests.test_inference_mode import FUNCTIONS as OF_FROZEN_ROWS
from tests.test_inference_mode import test_gradients_are_those_of_ordinary_features as check_inference_mode
from tests.test_transforms import test_is_what_the_reference_gives as check_transform

NAMES = ["graph_conv row", "neighbor_conv row", "node_contrast", "relation_kl"]


@pytest.mark.parametrize("name", [*NAMES, *BANKED])
def test_checkpointing(name):
    check_checkpointing(name, False)


@pytest.mark.parametrize("name", [*FUNCTIONS, *BANKED])
def test_results_changed_in_place(name):
    check_in_place(name)


@pytest.mark.parametrize("name", OF_FROZEN_ROWS)
def test_rows_from_inference_mode(name):
    check_inference_mode(name, torch.float64, "triton")


@pytest.mark.parametrize("transform", ["grad", "grad of grad", "vmap", "grad of vmap"])
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name, transform):
    check_transform(name, transform)
