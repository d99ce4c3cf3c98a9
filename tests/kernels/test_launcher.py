"""Launches without the JIT's binder: which compiled kernel an argument picks, hooks, and what reaches the launcher."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from gkd_fast.kernels.common import launcher
from gkd_fast.kernels.common.offline import Offline, offline


@triton.jit(do_not_specialize=["count"])
def copy(x, out, tensors, dims, count, width, scale: tl.float64, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + place, mask=place < count, other=0).to(TYPE) * width * dims[0]
    tl.store(out + place, value + tl.load(tensors[0] + place, mask=place < count))


class Recorder(Offline):
    """Keeps the arguments of every launch."""

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            if enter is not None:
                enter(launch_metadata)
            self.launched.append(((x, y, z), values))

        return run


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr("gkd_fast.kernels.common.offline.Offline", Recorder)
    copy.device_caches.clear()
    with offline("sm_90") as active:
        yield active
    copy.device_caches.clear()


def arguments(dtype=torch.float32, first=0, count=300, width=48, dims=(24, 8), scale=0.5):
    memory = torch.zeros(64, dtype=dtype)
    return memory[first:], memory, (memory[first:], memory), dims, count, width, scale


def fresh(**constants) -> launcher.Launch:
    return launcher.Launch(copy, {"WIDTH": 16, "TYPE": tl.float32, **constants})


def picked_apart(driver, one: dict, other: dict) -> bool:
    """Whether the two calls' arguments go to different compiled kernels; each is checked against Triton's choice."""
    variants = []
    launch = fresh()
    for options in (one, other, one, other):
        given = arguments(**options)
        launch((3,), *given)
        mine = launch.variant(*given)
        assert mine is not None
        assert mine is copy.warmup(*given, grid=(3,), **launch.constants)
        variants.append(mine)
    assert variants[0] is variants[2] and variants[1] is variants[3]
    return variants[0] is not variants[1]


@pytest.mark.parametrize(
    "one, other",
    [
        ({}, {"first": 1}),
        ({}, {"dtype": torch.bfloat16}),
        ({"count": 2**31 - 1}, {"count": 2**31}),
        ({"count": -(2**31)}, {"count": -(2**31) - 1}),
        ({"width": 16}, {"width": 17}),
        ({"width": 1}, {"width": 2}),
        ({"width": 16}, {"width": 2**32}),
        ({"dims": (16, 3)}, {"dims": (17, 3)}),
        ({"dims": (1, 3)}, {"dims": (5, 3)}),
        ({"dims": (16, 3)}, {"dims": (16, 2**40)}),
    ],
    ids=str,
)
def test_what_triton_specializes_on_picks_another_kernel(driver, one, other):
    assert picked_apart(driver, one, other)


@pytest.mark.parametrize(
    "one, other",
    [({"count": 1}, {"count": 300}), ({"count": 16}, {"count": 17}), ({"scale": 1.0}, {"scale": 0.25}),
     ({"first": 4}, {"first": 8})],
    ids=str,
)  # fmt: skip
def test_counts_numbers_and_aligned_addresses_share_a_kernel(driver, one, other):
    assert not picked_apart(driver, one, other)


def test_misalignment_within_a_tuple_picks_another_kernel(driver):
    launch, given = fresh(), list(arguments())
    launch((3,), *given)
    aligned = launch.variant(*given)
    given[2] = given[2][0][1:], given[2][1]
    launch((3,), *given)
    assert launch.variant(*given) is not aligned


def test_the_launcher_gets_what_triton_gives_it(driver):
    launch, given = fresh(), arguments()
    launch((3, 2), *given)
    launch((3, 2), *given)
    copy[(3, 2)](*given, **launch.constants)
    (grid, values), (fast_grid, fast_values), (plain_grid, plain_values) = driver.launched
    assert fast_grid == grid == plain_grid == (3, 2, 1)
    assert len(fast_values) == len(plain_values) == len(values)
    for x, y in zip(fast_values, plain_values, strict=True):
        assert x is y or x == y


def test_hooks_are_called(driver, monkeypatch):
    launch, given, seen = fresh(), arguments(), []
    launch((1,), *given)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: seen.append(metadata.get()["name"]))
    launch((1,), *given)
    assert seen == ["copy"]


def test_constants_and_options_make_launches_of_their_own(driver):
    same = launcher.launch(copy, WIDTH=16, TYPE=tl.float32)
    assert same is launcher.launch(copy, WIDTH=16, TYPE=tl.float32)
    others = [
        launcher.launch(copy, WIDTH=32, TYPE=tl.float32),
        launcher.launch(copy, WIDTH=16, TYPE=tl.float64),
        launcher.launch(copy, WIDTH=16, TYPE=tl.float32, num_warps=8),
        launcher.launch(copy, WIDTH=True, TYPE=tl.float32),
        launcher.launch(copy, WIDTH=1, TYPE=tl.float32),
    ]
    assert len({id(x) for x in (same, *others)}) == 6


def test_constants_come_last():
    with pytest.raises(ValueError, match="constants of copy must be its last arguments"):
        launcher.Launch(copy, {"width": 3})
