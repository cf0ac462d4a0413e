"""Rows that are computed together: little padding, every row, the same order again."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row, SourceData, together
from mergekit_dam.fit import fit
from mergekit_dam.fit.batches import PADDING, ByLength, StepRows, batch, collate, groups
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import MergedModel

QUIET = MergeOptions(quiet=True)
QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"


def sources(*lengths: list[int]) -> StepRows:
    return StepRows([SourceData([Row([1] * n) for n in own], []) for own in lengths])


def test_a_batch_is_padded_to_its_own_longest() -> None:
    result = batch([Row([5, 6, 7]), Row([8]), Row([9, 4], start=1)], [0, 0, 1])
    assert result["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert result["lengths"].tolist() == [3, 1, 2]
    assert result["starts"].tolist() == [0, 0, 1]
    assert result["sources"].tolist() == [0, 0, 1]
    assert {tensor.dtype for tensor in result.values()} == {torch.int64}


def test_collate_puts_source_after_source() -> None:
    items = [[Row([1, 11]), Row([2, 22, 222])], [Row([1, 12]), Row([2, 23])]]
    result = collate(items)
    assert result["sources"].tolist() == [0, 0, 1, 1]
    assert result["lengths"].tolist() == [2, 2, 3, 2]
    assert result["input_ids"].tolist() == [[1, 11, 0], [1, 12, 0], [2, 22, 222], [2, 23, 0]]


def test_an_item_has_a_row_of_every_source() -> None:
    rows = StepRows([SourceData([Row([1]), Row([2])], []), SourceData([Row([7])], [])])
    assert len(rows) == 2
    assert rows[1, 0] == [Row([2]), Row([7])]


row_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(st.lists(row_lengths, min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_has_every_row_and_short_sources_begin_again(lengths, step, seed) -> None:
    rows = sources(*lengths)
    items = list(ByLength(rows.lengths, step, seed))
    assert len(rows) <= len(items) < len(rows) + step
    assert len(items) % step == 0
    for number, own in enumerate(lengths):
        seen = Counter(item[number] for item in items)
        assert set(seen) == set(range(len(own)))
        assert max(seen.values()) - min(seen.values()) <= 1


@given(row_lengths, st.integers(0, 100))
def test_rows_together_are_of_similar_length_and_within_bounds(lengths, positions) -> None:
    rows = [Row([number] * length) for number, length in enumerate(lengths)]
    found = list(together(rows, positions))
    assert Counter(row.ids[0] for some in found for row in some) == Counter(range(len(rows)))
    assert [len(row) for some in found for row in some] == sorted(lengths, reverse=True)
    for some, later in zip(found, [*found[1:], []], strict=True):
        assert len(some) == 1 or len(some) * len(some[0]) <= positions
        assert not later or (len(some) + 1) * len(some[0]) > positions


def test_the_order_is_that_of_seed_and_epoch() -> None:
    rows = sources(list(range(1, 60)), list(range(3, 40)))

    def order(seed: int, epoch: int) -> list:
        sampler = ByLength(rows.lengths, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def padding(lengths: list[int]) -> float:
    return 1 - sum(lengths) / (max(lengths) * len(lengths))


@given(row_lengths)
def test_groups_have_every_row_once_and_little_padding(lengths) -> None:
    found = groups(lengths)
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    for group in found:
        own = [lengths[row] for row in group]
        assert own[0] == max(own)
        assert padding(own) <= PADDING
    for group, later in itertools.pairwise(found):  # the next would have been padded too much
        assert padding([lengths[row] for row in (*group, later[0])]) > PADDING


def test_rows_of_one_length_are_one_group() -> None:
    assert groups([9] * 20) == [list(range(20))]


def test_the_quickstart_computes_little_padding(monkeypatch) -> None:
    """Of all positions that a fit's steps compute, merge and teachers."""
    monkeypatch.chdir(QUICKSTART.parents[1])
    recipe = read_recipe("examples/quickstart/config.yml")
    prepared = prepare(recipe, QUIET, device="cpu")
    computed, passes = 0, 0

    def states(merged, taken):
        nonlocal computed, passes
        computed += sum(input_ids.numel() for input_ids, _ in taken)
        passes += len(taken)
        return [torch.zeros(*input_ids.shape, 1) for input_ids, _ in taken]

    monkeypatch.setattr(MergedModel, "all_states", states)
    monkeypatch.setattr(MergedModel, "head", lambda *_: _NoHead())
    distil = Distillation(prepared.merged, Objective())
    rows = StepRows(prepared.data)
    items, real, steps = list(ByLength(rows.lengths, 8, 1)), 0, 0
    for start in range(0, len(items), 8):
        inputs = collate([rows[item] for item in items[start : start + 8]])
        distil(**inputs)
        real += 2 * int(inputs["lengths"].sum())
        steps += 1
    assert real >= 0.95 * computed
    assert passes <= 8 * steps


class _NoHead:
    def __call__(self, states):
        return torch.zeros(len(states), 43)

    def trained(self):
        return []


def test_the_loss_does_not_depend_on_the_groups(recipe, tmp_path, monkeypatch) -> None:
    from mergekit_dam.fit import objective

    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    merged = prepare(read_recipe(str(recipe(models))), QUIET, device="cpu").merged
    rows = [Row(list(range(1, n))) for n in (4, 9, 12, 30, 31, 7)]
    inputs = batch(rows, [0, 1, 0, 1, 0, 1])
    assert len(groups([len(row) for row in rows])) > 1
    losses = [Distillation(merged, Objective())(**inputs)["loss"]]

    def one_group(lengths: list[int]) -> list[list[int]]:
        return [sorted(range(len(lengths)), key=lambda row: -lengths[row])]

    monkeypatch.setattr(objective, "groups", one_group)
    losses.append(Distillation(merged, Objective())(**inputs)["loss"])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("at", [1, 5, 7])
def test_a_fit_over_several_epochs_resumes_where_it_was(recipe, tmp_path, monkeypatch, at) -> None:
    """Five steps are an epoch here: the order goes on, within an epoch and after it."""
    from mergekit_dam.fit.trainer import CoefficientTrainer

    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    dam = {"steps": 8, "batch_size": 4, "checkpoint_every": 1}
    settings = read_recipe(str(recipe(models, dam=dam)))
    fit(settings, str(tmp_path / "whole.safetensors"), QUIET, device="cpu")
    step = CoefficientTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CoefficientTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(settings, str(tmp_path / "killed.safetensors"), QUIET, device="cpu")
    fit(settings, str(tmp_path / "killed.safetensors"), QUIET, device="cpu", resume=True)
    whole, resumed = (tmp_path / f"{n}.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
