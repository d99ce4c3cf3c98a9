"""A loop around GraphDistiller and the driver give the same numbers."""

import copy
from dataclasses import replace

import pytest
import torch

from gkd_fast import GraphDistiller
from gkd_fast.train.build import build_distiller, build_network_for
from gkd_fast.train.data import load_splits


@pytest.mark.parametrize("by_name", [False, True])
def test_thirty_lines_are_the_driver_bit_for_bit(tiny, by_name):
    torch.set_num_threads(1)
    config = replace(
        tiny,
        student_network=replace(tiny.student_network, auxiliary=not by_name),
        teacher_network=replace(tiny.teacher_network, auxiliary=not by_name),
    )
    splits = load_splits(config.data, config.seed)
    teacher = build_network_for(config.teacher_network, splits, seed=99)
    driver = build_distiller(config, splits, "gkd", config.student_network, config.student_training, teacher)
    student, criterion, pair_weights = copy.deepcopy([driver.student, driver.criterion, driver.pair_weights])

    class Logits(torch.nn.Module):  # the driver's networks give features and logits, others logits alone
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images).logits[-1]

    stages = [f"network.stage{k}" for k in (1, 2, 3)] if by_name else None
    networks = [Logits(x) if by_name else x for x in (student, copy.deepcopy(teacher))]
    distiller = GraphDistiller(
        *networks, stages, stages, criterion=criterion, meta=config.meta, pair_weights=pair_weights
    )
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(20):
        images, labels = next(iter(torch.utils.data.DataLoader(splits.train, batch_size=40)))
        images = images + 0.1 * step
        expected = driver.train_step(images, labels)
        distiller.train()
        loss, terms, _ = distiller(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Stages that are collected by name are pooled after a permutation, and second derivatives of that round apart.
        rounding = 1e-5 if by_name and step > 10 else 0
        assert terms.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(terms[name], x, rtol=rounding, atol=0)
        if step == 10:
            norms = [d.meta_step(images, labels)["meta_gradient_norm"].item() for d in (driver, distiller)]
            assert norms[0] > 0 and norms[1] == (pytest.approx(norms[0], rel=1e-5) if by_name else norms[0])
    own = {name.replace(".network.", "."): x for name, x in distiller.state_dict().items()}
    for name, x in driver.module.state_dict().items():
        torch.testing.assert_close(
            own[name], x, rtol=rounding, atol=rounding, msg=lambda told, name=name: f"{name}: {told}"
        )
