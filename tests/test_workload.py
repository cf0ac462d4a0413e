"""What a fit will compute is what it computes."""

import random
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions

from mergekit_dam.check.speed import duration
from mergekit_dam.config import Settings, read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import fit, teachers
from mergekit_dam.fit import workload as workload_module
from mergekit_dam.fit.batches import PADDING, StepRows, collate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.workload import (
    FORESEEN,
    _computed,
    _pairs,
    _total,
    extent_of_a_fit,
    items_of_a_fit,
    workload,
)
from mergekit_dam.model import MergedModel
from mergekit_dam.model.live import Live

QUIET = MergeOptions(quiet=True)
VOCABULARY = tiny.VOCABULARY


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


def rows(count: int, longest: int, seed: int) -> list[Row]:
    """Few are nearly as long as the longest, as in most texts."""
    draw = random.Random(seed)
    lengths = [max(3, int(longest * draw.random() ** 3)) for _ in range(count - 1)]
    return [Row(draw.choices(range(3, VOCABULARY), k=length)) for length in (*lengths, longest)]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 3},
        {"steps": 7, "accumulation": 3},
        {"epochs": 1.5},
        {"epochs": 2, "accumulation": 2},
    ],
    ids=str,
)
def test_it_is_what_the_trainer_computes(recipe, models, tmp_path, monkeypatch, settings):
    data = [SourceData(rows(n, 30, n), rows(2, 9, n)) for n in (11, 7)]
    document = read_recipe(str(recipe(models, dam={"steps": None, "batch_size": 2, **settings})))
    seen, computed, forward = [], [], Distillation.forward

    def recorded(self, input_ids, lengths, starts, sources):
        seen.append([row[:n].tolist() for row, n in zip(input_ids, lengths, strict=True)])
        return forward(self, input_ids, lengths, starts, sources)

    monkeypatch.setattr(Distillation, "forward", recorded)
    states = MergedModel.all_states

    def counted(self, passes):
        if torch.is_grad_enabled():  # a step, and no held-out figures
            computed.append(sum(ids.numel() for ids, view in passes if view is None))
        return states(self, passes)

    monkeypatch.setattr(MergedModel, "all_states", counted)
    fit(document, str(tmp_path / "o.safetensors"), QUIET, device="cpu", data=data)
    stepped = StepRows(data)
    items = list(items_of_a_fit(stepped.lengths, document.settings))
    batches = [[stepped[item] for item in items[n : n + 2]] for n in range(0, len(items), 2)]
    told = [[row.ids for source in zip(*batch, strict=True) for row in source] for batch in batches]
    assert seen == told
    work = workload(stepped.lengths, document.settings)
    assert (work.passes, work.tokens) == (len(computed), sum(computed))
    assert sum(work.largest) == max(computed)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.061, "0.061 s"), (99.4, "99 s"), (99.7, "1.7 min"), (5995, "1.7 h"), (360_000, "100 h")],
)
def test_durations_read_as_people_say_them(seconds, told):
    assert duration(seconds) == told


lengths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=30), min_size=1, max_size=3)


@given(lengths, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))
def test_several_processes_share_it(lengths, processes, batch_size, steps):
    settings = Settings(data=(), batch_size=batch_size, steps=steps)
    one = workload(lengths, settings.model_copy(update={"batch_size": batch_size * processes}))
    each = workload(lengths, settings, processes)
    assert each.passes == one.passes
    assert sum(each.largest) <= sum(one.largest)
    assert each.tokens * processes * (1 - PADDING) <= one.tokens + processes


@pytest.mark.parametrize(
    "lengths, groups",
    [
        ([[9], [9]], ((9, 18),)),
        ([[9], [3]], ((9, 9), (3, 3))),
        ([[3, 3], [9, 2]], ((9, 9), (3, 3))),  # more than in the pass of 3 and 2
        ([[9, 3], [9, 9]], ((9, 18), (9, 0))),  # and 9, 3 in another pass
    ],
)
def test_rows_of_about_the_same_length_go_together(lengths, groups):
    work = workload(lengths, Settings(data=(), batch_size=1, epochs=1))
    assert tuple((group.length, sum(group.tokens)) for group in work.candidates[0]) == groups


@given(lengths, st.integers(1, 3))
def test_passes_with_most_tokens_and_with_most_pairs_of_them_count(lengths, batch_size):
    """Of pairs some models keep something."""
    settings = Settings(data=(), batch_size=batch_size, epochs=1)
    items = list(items_of_a_fit(lengths, settings))
    passes = [
        list(_computed(items[n : n + batch_size], lengths))
        for n in range(0, len(items), batch_size)
    ]
    work = workload(lengths, settings)
    assert _total(work.candidates[0]) == max(map(_total, passes))
    assert max(map(_pairs, work.candidates)) == max(map(_pairs, passes))
    assert work.lengths == {group.length for groups in work.candidates for group in groups}


lasting = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(0, 40)}),
    st.fixed_dictionaries({"epochs": st.floats(0.01, 5)}),
)


@given(lengths, lasting, st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_passes_are_counted_without_their_rows(lengths, lasting, batch, accumulation, processes):
    settings = Settings(data=(), batch_size=batch, accumulation=accumulation, **lasting)
    passes = extent_of_a_fit(lengths, settings, processes).passes
    assert passes * batch * processes == len(list(items_of_a_fit(lengths, settings, processes)))
    assert workload(lengths, settings, processes).passes == passes


@given(lengths, st.integers(1, 4), st.integers(1, 3))
def test_the_longest_rows_of_a_long_fit_count(lengths, batch, processes):
    """A few long ones among many may come late."""
    settings = Settings(data=(), batch_size=batch, epochs=2)
    whole = workload(lengths, settings, processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload_module, "FORESEEN", 4)
        found = workload(lengths, settings, processes)
    assert _total(found.candidates[0]) >= (1 - PADDING) * _total(whole.candidates[0])
    assert (found.steps, found.passes) == (whole.steps, whole.passes)


def counted(monkeypatch, module) -> list[tuple[int, ...]]:
    """The items that a module takes, from now on."""
    taken = []

    def watched(*arguments):
        for item in items_of_a_fit(*arguments):
            taken.append(item)
            yield item

    monkeypatch.setattr(module, "items_of_a_fit", watched)
    return taken


@pytest.mark.parametrize(
    "dam",
    [
        {"steps": 10**9, "batch_size": 8},
        {"epochs": 1e9, "batch_size": 7, "accumulation": 10**9},
        {"steps": 400, "batch_size": 2**16},  # more than all rows
    ],
    ids=str,
)
def test_of_a_long_fit_or_a_large_step_little_is_gone_through(monkeypatch, dam):
    """A mistake in these settings waits for no more than a moment for its answer."""
    lengths, settings = [[len(r) for r in rows(1500, 90, 0)]] * 2, Settings(data=(), **dam)
    taken = counted(monkeypatch, workload_module)
    found = workload(lengths, settings)
    assert 0 < len(taken) <= max(FORESEEN, settings.batch_size)
    assert found.passes == extent_of_a_fit(lengths, settings).passes
    mean = sum(map(sum, lengths)) / 1500
    assert 1 <= found.tokens / found.passes / settings.batch_size / mean <= 1.01 / (1 - PADDING)


def test_rows_that_are_kept_are_those_of_one_epoch(monkeypatch):
    data = StepRows([SourceData(rows(n, 9, n), []) for n in (30, 11)])
    taken = counted(monkeypatch, teachers)
    kept = teachers.rows_of_a_fit(data, Settings(data=(), batch_size=4, steps=10**9), 1)
    assert [len(own) for own in kept] == [30, 11]
    assert len(taken) <= 32


def test_an_entry_may_have_longer_rows_than_the_others(recipe, models):
    path = recipe(models, dam={"max_length": 8, "batch_size": 1})
    document = yaml.safe_load(path.read_text())
    document["dam"]["data"][1]["max_length"] = 60
    path.write_text(yaml.safe_dump(document))
    found = prepare(read_recipe(str(path)), QUIET, device="cpu")
    longest = [max(map(len, own.train)) for own in found.data]
    assert longest[0] == 8 < longest[1]
    assert 8 + longest[1] >= found.needs.tokens > longest[1]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rows_of_several_lengths_take_what_was_predicted(recipe, tmp_path, batch_size):
    """Within 15 %, counted tensor by tensor, in the step that takes most."""
    config = transformers.LlamaConfig(
        **{**tiny.SIZES, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
    )
    models = tiny.save_models(tmp_path, config, 2)
    data = [SourceData(rows(40, longest, longest), []) for longest in (400, 250)]
    path = recipe(models, dam={"batch_size": batch_size, "steps": 10})
    found = prepare(read_recipe(str(path)), QUIET, device="cpu", data=data)
    step, stepped = Distillation(found.merged, found.settings.objective), StepRows(data)
    items = list(items_of_a_fit(stepped.lengths, found.settings))
    most = 0
    for start in range(0, len(items), batch_size):
        inputs = collate([stepped[item] for item in items[start : start + batch_size]])
        with Live() as live:
            step(**inputs)["loss"].backward()
        step.zero_grad()
        most = max(most, live.most)
    assert found.needs.of(found.place.recompute) == pytest.approx(most, rel=0.15)
