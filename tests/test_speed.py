"""How long a fit will take is told of where it computes, and where its sources live."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergekit_dam.check import speed
from mergekit_dam.check.speed import COPIED, READS, Speed, measure_speed
from mergekit_dam.fit.place import Place

HERE = Place(
    device="cpu", recompute="block", offload="none", sources=0, step=0, start=0, free=0, mapped=0,
    host=0, free_host=0, told=(),
)  # fmt: skip
WIDTH = 8


def measured(place: Place, *, is_live: bool = True) -> Speed:
    """Of three matrices."""
    parameters, held = 3 * WIDTH**2, 5 * COPIED
    return measure_speed(
        parameters, WIDTH, 2, torch.float32, place, held=held, is_live=is_live
    )  # fmt: skip


@pytest.fixture
def in_seconds(monkeypatch):
    """What each thing that is timed is said to take, in their order."""

    def say(*seconds: float) -> None:
        told = itertools.chain(seconds)

        def one(operation) -> float:
            assert isinstance(operation(), torch.Tensor)
            return next(told)

        monkeypatch.setattr(speed, "_seconds", one)

    return say


@pytest.mark.parametrize(
    "recompute, is_live, passes, makings",
    [("block", True, 5, 2), ("block", False, 4, 2), ("weights", True, 4, 2), ("none", False, 3, 1)],
)
def test_what_is_made_again_and_kept_teachers_count(
    in_seconds, recompute, is_live, passes, makings
) -> None:
    product, making, reducing = 512, 10.0, 100.0  # of 512 tokens
    in_seconds(product, making, reducing)
    found = measured(replace(HERE, recompute=recompute), is_live=is_live)
    assert found.of_token == 3 * passes
    assert found.of_pass == 3 * (makings * making + reducing)
    assert found.seconds(2, 7) == 2 * found.of_pass + 7 * found.of_token


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_nothing_is_copied_to_a_cpu(in_seconds, offload) -> None:
    in_seconds(1, 1, 1)  # and no fourth
    assert measured(replace(HERE, offload=offload)).copies == 0


def test_sources_are_copied_to_another_device_twice_in_a_pass(in_seconds) -> None:
    in_seconds(1, 1, 1, 4)
    found = measured(replace(HERE, device="meta", offload="disk"))
    assert found.copies == READS * 5 * 4
    assert found.seconds(3, 0) == 3 * (found.of_pass + found.copies)


@pytest.mark.parametrize("copies, longest", [(2.0, 11.0), (40.0, 40.0)])
def test_copies_from_host_memory_go_on_while_the_gpu_computes(copies, longest) -> None:
    assert Speed(1.0, 1.0, copies, go_on=True).seconds(1, 10) == longest
    assert Speed(1.0, 1.0, copies).seconds(1, 10) == 11 + copies


def test_what_is_timed_takes_time() -> None:
    found = measured(HERE)
    assert found.of_token > 0 and found.of_pass > 0
