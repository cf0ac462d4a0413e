"""How long a fit will take is told of where it computes, and where its sources live."""

from dataclasses import replace

import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from mergekit_dam.check import check, estimate, speed
from mergekit_dam.check.estimate import Estimate
from mergekit_dam.check.speed import COPIED, Speed, measure_speed
from mergekit_dam.config import read_recipe
from mergekit_dam.fit.place import Place

HERE = Place(
    device="cpu", recompute="block", offload="none", sources=0, step=0, start=0, free=0, mapped=0,
    host=0, free_host=0, waiting=0, told=(),
)  # fmt: skip
WIDTH = 8


def measured(place: Place, *, is_live: bool = True) -> Speed:
    """Of three matrices."""
    parameters, held = 3 * WIDTH**2, 5 * COPIED
    return measure_speed(parameters, WIDTH, 2, torch.float32, place, held=held, is_live=is_live)


@pytest.fixture
def in_seconds(monkeypatch):
    """What each thing that is timed is said to take, in their order."""

    def say(*seconds: float) -> None:
        told = iter(seconds)

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


@pytest.mark.parametrize(
    "offload, recompute, is_live, copies",
    [
        ("cpu", "block", True, 2),  # forwards and backwards
        ("cpu", "none", False, 2),
        ("disk", "block", True, 4),  # for weights twice, for their gradients and the teachers
        ("disk", "weights", False, 3),
        ("disk", "none", True, 3),
    ],
)
def test_sources_are_copied_to_another_device(
    in_seconds, monkeypatch, offload, recompute, is_live, copies
) -> None:
    pinned, ones = [], torch.ones

    def one(*sizes, pin_memory, **keys):  # which only a GPU's driver can pin
        pinned.append(pin_memory)
        return ones(*sizes, **keys)

    monkeypatch.setattr(torch, "ones", one)
    in_seconds(1, 1, 1, 7)
    place = replace(HERE, device="meta", offload=offload, recompute=recompute)
    found = measured(place, is_live=is_live)
    assert found.copies == 5 * copies * 7
    assert pinned == [offload == "cpu"]
    assert found.go_on == (offload == "cpu")


@pytest.mark.parametrize("copies, longest", [(2.0, 11.0), (40.0, 40.0)])
def test_copies_from_host_memory_go_on_while_the_gpu_computes(copies, longest) -> None:
    assert Speed(1.0, 1.0, copies, go_on=True).seconds(1, 10) == longest
    assert Speed(1.0, 1.0, copies).seconds(1, 10) == 11 + copies


def test_what_is_timed_takes_time() -> None:
    found = measured(HERE)
    assert found.of_token > 0 and found.of_pass > 0


@pytest.fixture
def foretold(recipe, tmp_path):
    """What `check` finds of a fit of two tiny models."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)

    def foretell(**dam) -> Estimate:
        loaded = read_recipe(str(recipe(models, dam=dam)))
        return check(
            loaded, MergeOptions(quiet=True), coefficients=loaded.coefficients, will_fit=True,
            will_merge=False, device="cpu", in_full=True,
        ).estimate  # fmt: skip

    return foretell


def test_check_takes_the_fits_own_settings(foretold, monkeypatch) -> None:
    seen = []

    def spy(*args, **keys) -> Speed:
        seen.append((args[4].recompute, keys["is_live"]))
        return Speed(1.0, 1.0)

    monkeypatch.setattr(estimate, "measure_speed", spy)
    foretold(recompute="weights", teacher="cached")
    found = foretold(recompute="none", teacher="live")
    assert seen == [("weights", False), ("none", True)]
    assert found.seconds == 1 + found.tokens
    assert "time: about" in str(found)


def test_a_device_that_is_full_is_checked_without_a_time(foretold, monkeypatch) -> None:
    def full(*_args, **_keys):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(estimate, "measure_speed", full)
    told = str(foretold())
    assert "time:" not in told and "memory: weights" in told
