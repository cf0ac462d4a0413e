"""Where a fit keeps what it needs, and what is said where that does not fit."""

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import transformers
from mergekit.options import MergeOptions

from mergekit_dam import least_squares
from mergekit_dam.config import Settings, read_recipe
from mergekit_dam.config.settings import Train
from mergekit_dam.errors import DamError
from mergekit_dam.fit import container, forecast, memory
from mergekit_dam.fit import place as place_module
from mergekit_dam.fit.forecast import Outline, merged_skeleton
from mergekit_dam.fit.memory import Needs, Rows, size
from mergekit_dam.fit.place import choose_recompute, place, remedies, require_memory
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.model import activations
from mergekit_dam.model.activations import Activations

QUIET = MergeOptions(quiet=True)
KEPT = Activations(
    all=1000, largest=200, inputs=50, later=0, given=20, passed=20, taught=80, most=240, passing=40
)
NEEDS = Needs(
    tokens=10,
    rows=2,
    groups=(Rows(10, KEPT),),
    widest=10,
    states=100,
    blocks=50_000,
    block=1000,
    gradients=1000,
    matrix=300,
)


@pytest.mark.parametrize(
    "free, mode", [(10**6, "none"), (40_000, "weights"), (12_000, "block"), (1, "block")]
)
def test_auto_takes_the_fastest_that_fits(free, mode):
    settings = Settings(data=())
    chosen, why = choose_recompute(settings, NEEDS, free)
    assert chosen == mode
    assert f"recompute: {mode}, with about" in why
    settings = Settings(data=(), recompute="weights")
    assert choose_recompute(settings, NEEDS, free) == ("weights", "")


def place_on(
    monkeypatch, device: str, groups: list[int], *, gpu: int, host: int, own: float = 0, **settings
):
    memory = {"cpu": host, device: gpu}
    monkeypatch.setattr(place_module, "free_memory", memory.__getitem__)
    return place(Settings(data=(), **settings), device, NEEDS, sum(groups), groups, own=own)


def test_where_a_fit_keeps_what_it_needs(monkeypatch):
    groups = [5000, 20_000, 20_000, 20_000, 100, 5000]
    large = place_on(monkeypatch, "cuda:0", groups, gpu=10**6, host=10**6)
    assert (large.offload, large.sources, large.host) == ("none", 70_100, 0)
    small = place_on(monkeypatch, "cuda:0", groups, gpu=70_000, host=10**6)
    assert (small.offload, small.sources, small.host) == ("cpu", 60_000, 70_100)
    assert "70.1 KB of host memory" in str(small) and "offload: cpu, since" in small.told[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")  # each process keeps them
    shared = place_on(monkeypatch, "cuda:0", groups, gpu=70_000, host=10**6)
    assert (shared.offload, shared.sources, shared.host) == ("disk", 20_000, 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    mapped = place_on(monkeypatch, "cpu", groups, gpu=10**6, host=10**6)
    assert (mapped.offload, mapped.sources, mapped.mapped) == ("none", 0, 70_100)


def refused(monkeypatch, *, needs=None, **settings) -> str:
    """What is said to a fit whose settings do not fit beside 4 KB; `needs` tells what others
    need, by their settings."""
    groups, chosen = [500, 2000, 2000, 2000], Settings(data=(), **settings)

    def again(changed: Settings):
        found = place_on(monkeypatch, "cuda:0", groups, gpu=6000, host=10**4)
        return replace(found, step=(needs or {}).get(settings_of(changed, chosen), 10**6))

    found = place_on(monkeypatch, "cuda:0", groups, gpu=6000, host=10**4, **settings)
    with pytest.raises(DamError) as error:
        require_memory(replace(found, step=10**6), chosen, again)
    return error.value.message


def settings_of(changed: Settings, before: Settings) -> str:
    own = {k: v for k, v in changed.model_dump().items() if v != before.model_dump()[k]}
    return ", ".join(f"{key} {value}" for key, value in own.items())


@pytest.mark.parametrize(
    "settings, helps, told",
    [
        ({"recompute": "none"}, "recompute block", "set `dam.recompute: block`."),
        ({"offload": "none"}, "offload cpu", "set `dam.offload: cpu`."),
        ({"offload": "cpu"}, "offload disk", "set `dam.offload: disk`."),
        (
            {"recompute": "none", "offload": "none"},
            "offload disk, recompute block",
            "set `dam.recompute: block` and `dam.offload: disk`.",
        ),
        ({"batch_size": 8}, "batch_size 2", "set `dam.batch_size: 2`."),
        ({}, "batch_size 1", "set `dam.batch_size: 1`."),
        ({"batch_size": 1}, "max_length 256", "set `dam.max_length: 256`."),
        (
            {"batch_size": 4},
            "max_length 256, batch_size 1",
            "set `dam.batch_size: 1` and `dam.max_length: 256`.",
        ),
        ({}, "nothing", "no setting would fit."),
    ],
)
def test_what_does_not_fit_names_a_remedy_that_is_one(monkeypatch, settings, helps, told):
    names = [", ".join(order) for order in itertools.permutations(helps.split(", "))]
    message = refused(monkeypatch, needs=dict.fromkeys(names, 0), **settings)
    held = settings.get("offload") == "none"
    lack = "The sources need 6.5 KB" if held else "A step needs about 1 MB of memory beside"
    assert message.startswith(lack)
    assert message.endswith(told)


def test_no_remedy_is_tried_twice(monkeypatch):
    found = place_on(monkeypatch, "cpu", [5], gpu=10**6, host=10**6)
    for settings in ({"offload": "none"}, {"offload": "none", "recompute": "none"}, {}):
        tried = list(remedies(Settings(data=(), **settings), found))
        assert all(changes not in tried[:number] for number, changes in enumerate(tried))


def test_a_start_that_does_not_fit_is_smaller_or_another(monkeypatch):
    found = place_on(monkeypatch, "cpu", [5], gpu=10**6, host=10**6)
    large = replace(found, start=10**7)
    for fits, told in (("calibration", "`dam.calibration: 8`"), ("start", "`dam.start: average`")):

        def again(changed: Settings, fits: str = fits):
            small = changed.calibration == 8 if fits == "calibration" else changed.start
            return found if small else large

        with pytest.raises(DamError, match=told) as error:
            require_memory(large, Settings(data=()), again)
        assert error.value.message.startswith("The least-squares start needs about 10 MB")


def test_a_fetched_block_is_there_with_the_next_and_room_is_asked_for_a_third(monkeypatch):
    groups = [5000, 20_000, 20_000, 20_000, 100, 5000]
    there = {"host": 10**6, "offload": "cpu", "recompute": "weights"}
    found = place_on(monkeypatch, "cuda:0", groups, gpu=10**5, **there)
    assert (found.sources, found.waiting) == (60_000, 20_000)
    assert found.taken == found.needed - 20_000 == 40_000 + found.step
    assert f"takes {size(found.taken)}" in str(found)
    short = place_on(monkeypatch, "cuda:0", groups, gpu=found.needed - 1, **there)
    assert found.fits and not short.fits
    for offload in ("none", "disk"):
        other = place_on(monkeypatch, "cuda:0", groups, gpu=10**5, host=10**6, offload=offload)
        assert other.waiting == 0 and other.taken == other.needed


def test_sources_that_are_models_of_their_own_have_copies_too(monkeypatch):
    groups, free = [900, 900, 900], {"gpu": 10**5, "host": 10**6, "offload": "cpu"}
    alone = place_on(monkeypatch, "cuda:0", groups, **free)
    beside = place_on(monkeypatch, "cuda:0", groups, own=1 / 3, **free)
    assert (alone.sources, beside.sources) == (2700, 3600)


def test_sources_that_host_memory_does_not_hold(monkeypatch):
    groups = [5000, 20_000, 20_000, 20_000]
    found = place_on(monkeypatch, "cuda:0", groups, gpu=10**5, host=10**4, offload="cpu")
    with pytest.raises(DamError, match=r"need 65 KB of host memory .* set `dam.offload: disk`"):
        require_memory(
            found,
            Settings(data=(), offload="cpu"),
            lambda changed: replace(found, host=0 if changed.offload == "disk" else found.host),
        )


def test_too_little_memory_for_a_start_ends_before_it(recipe, tmp_path, monkeypatch):
    config = transformers.LlamaConfig(**{**tiny.SIZES, "vocab_size": 32_000, "hidden_size": 128})
    models = tiny.save_models(tmp_path, config, 2)
    path = recipe(models, dam={"start": "least_squares"})
    monkeypatch.setattr(place_module, "free_memory", lambda device: 100 * 10**6)
    with pytest.raises(DamError, match=r"start needs about .* set `dam.start: average`"):
        prepare(read_recipe(str(path)), QUIET, device="cpu")


def test_whatever_is_tried_what_takes_the_same_is_measured_once(recipe, tmp_path, monkeypatch):
    steps, starts, tried = [], [], []

    def of_steps(config, dtype, lengths, frozen, **keys):
        steps.extend(lengths)
        return activations.measure(config, dtype, lengths, frozen, **keys)

    def of_starts(config, skeleton, dtype, rows, *others, **keys):
        starts.append([[len(row) for row in own] for own in rows])
        return least_squares.start_needs(config, skeleton, dtype, rows, *others, **keys)

    def placed(settings, *others, **keys):
        tried.append(settings)
        return place(settings, *others, **keys)

    monkeypatch.setattr(forecast, "measure", of_steps)
    monkeypatch.setattr(forecast, "start_needs", of_starts)
    monkeypatch.setattr(forecast, "place", placed)
    monkeypatch.setattr(place_module, "free_memory", lambda device: 1000)
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    keys = {"start": "least_squares", "recompute": "none", "offload": "none", "batch_size": 4}
    with pytest.raises(DamError, match="no setting would fit"):
        prepare(read_recipe(str(recipe(models, dam=keys))), QUIET, device="cpu")
    assert len(tried) > 10
    assert len(steps) == len(set(steps)) > 0
    assert len(starts) == 1  # no remedy that was tried shortens these rows


def test_what_is_foreseen_does_not_depend_on_what_was_tried_before(recipe, tmp_path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["gemma2"], 2)
    path = recipe(models, dam={"start": "least_squares"})
    found = prepare(read_recipe(str(path)), QUIET, device="cpu")
    shapes = HeaderShapes(found.plan)
    make = functools.partial(
        Outline, found.plan, shapes, merged_skeleton(found.plan, shapes), "cpu", found.data
    )
    shared = make()
    for change in (
        {}, {"train": Train(linear=False)}, {"granularity": "row"}, {"compute_dtype": "bfloat16"},
        {"max_length": 9}, {"batch_size": 1}, {"calibration": 2}, {"start": "average"},
    ):  # fmt: skip
        settings = found.settings.model_copy(update=change)
        one, other = shared.foresee(settings), make().foresee(settings)
        assert (one.needs, one.place.start) == (other.needs, other.place.start), change
    assert len(shared._steps) == 3 and len(shared._starts) == 6


def test_rows_of_the_start():
    assert Settings(data=()).calibration_rows == 32
    assert Settings(data=(), steps=0).calibration_rows == 128
    assert Settings(data=(), steps=0, calibration=7).calibration_rows == 7


def grouped(root: Path, line: str, group: str, files: dict[str, object]) -> Path:
    """A system's files, as far as they tell of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpu:/x\n{line}\n")
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return root


STAT = "anon 5\nactive_file 20\ninactive_file 30\ntotal_active_file 1\ntotal_inactive_file 2"


SECOND = {"memory.max": 1000, "memory.current": 400, "memory.stat": STAT}


FIRST = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 400, "memory.stat": STAT}


@pytest.mark.parametrize(
    "line, group, files, left",
    [
        ("0::/pod/a", "pod/a", SECOND, 650),
        ("0::/pod/a", "pod", SECOND, 650),  # the limit of a group above
        ("0::/", ".", SECOND, 650),  # as a container sees itself
        ("9:blkio,memory:/docker/a", "memory", FIRST, 603),  # its own is not to be seen
        ("9:memory:/docker/a", "memory/docker/a", FIRST, 603),
        ("0::/pod", "pod", {**SECOND, "memory.max": "max"}, math.inf),
        ("0::/pod", "pod", {**SECOND, "memory.current": 5000}, 0),
        ("0::/pod", "other", SECOND, math.inf),
    ],
)
def test_what_a_container_leaves(tmp_path, line, group, files, left):
    assert container.memory_left(grouped(tmp_path, line, group, files)) == left


def test_a_containers_limit_is_what_is_free(monkeypatch, tmp_path):
    assert container.memory_left(tmp_path) == math.inf  # a system without such files
    monkeypatch.setattr(memory, "memory_left", lambda: 12_345)
    assert memory.free_memory("cpu") == 12_345


@pytest.mark.parametrize(
    "count, told",
    [(0, "0 B"), (999.4, "999 B"), (999.6, "1 KB"), (999.6e6, "1 GB"), (1.234e9, "1.23 GB")],
)
def test_sizes_in_words(count, told):
    assert memory.size(count) == told
