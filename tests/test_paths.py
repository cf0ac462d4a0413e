"""Several passes side by side: the same numbers, and what a block needs is there once for all."""

import gc
from collections import Counter

import pytest
import tiny
import torch
from greenlet import getcurrent, greenlet
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row
from mergekit_dam.fit.batches import batch, groups
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import Block, MergedModel
from mergekit_dam.model.paths import Path, arrive, begun

LENGTHS = (12, 12, 7, 3)
ROWS = [Row([(7 * row + place) % 40 + 4 for place in range(n)]) for row, n in enumerate(LENGTHS)]
STEP = batch(ROWS, [0, 1, 0, 1])


@pytest.fixture
def make(recipe, tmp_path):
    def make(name: str = "llama", **dam) -> MergedModel:
        models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 2)
        path = str(recipe(models, dam=dam))
        return prepare(read_recipe(path), MergeOptions(quiet=True), device="cpu").merged

    return make


def step(merged: MergedModel) -> None:
    Distillation(merged, Objective())(**STEP)["loss"].backward()


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_each_has_the_states_that_it_has_alone(make, name, offload):
    merged = make(name, offload=offload)
    passes = [
        (torch.randint(4, 40, (rows, length)), view)
        for rows, length, view in ((2, 9, None), (1, 5, 0), (3, 4, None), (2, 9, 1), (1, 2, 0))
    ]
    with torch.no_grad():
        found = merged.all_states(passes)
        for states, own in zip(found, passes, strict=True):
            assert torch.equal(states, merged.states(*own))


def test_the_plain_average_side_by_side(make):
    """What is evaluated before a fit is the present view, and no merge."""
    merged, ids = make(offload="disk"), tiny.tokens()
    with torch.no_grad(), merged.as_average():
        average, _ = merged.all_states([(ids, None), (ids, 0)])
        assert torch.equal(average, merged.states(ids))
    for c in merged.parameters():
        c.data.mul_(0.5)
    assert not torch.equal(average, merged.states(ids))


@pytest.mark.parametrize("recompute, times", [("block", 2), ("weights", 2), ("none", 1)])
def test_a_weight_is_made_once_for_rows_of_all_lengths(make, watch, recompute, times):
    merged, table = make(), "model.embed_tokens.weight"
    merged.recompute = recompute
    step(merged)  # finds out how the model is split
    watched = watch(merged)
    assert len(groups(LENGTHS)) == 3
    step(merged)
    assert all(rows for name, rows in watched if name == table)
    made = Counter(name for name, _ in watched)
    assert made.pop(table) == 3  # each length looks up its own
    assert max(made.values()) == times
    assert made.keys() == merged.coefficients().keys() - {table}


def test_a_step_copies_each_block_once_for_each_way(make, monkeypatch):
    """Forwards for the merge and its teachers together, and backwards."""
    merged, copied = make(offload="cpu"), Counter()
    for _ in range(2):
        step(merged)  # what follows on what
    store = merged._weights._store
    copy = store._copy
    monkeypatch.setattr(store, "_copy", lambda wanted: copied.update([wanted]) or copy(wanted))
    step(merged)
    blocks = {tuple(m.names()) for m in merged.model.modules() if isinstance(m, Block)}
    assert {names for names, _ in copied} == blocks
    assert {index for _, index in copied} == {None}  # never a source alone
    assert max(copied.values()) <= 2


@pytest.mark.parametrize(
    "name, dam",
    [
        ("llama", {"recompute": "block"}),
        ("llama_tied", {"recompute": "weights", "offload": "cpu"}),
        ("mixtral", {"recompute": "none", "offload": "disk"}),
        ("gpt2", {"recompute": "block", "offload": "disk"}),
    ],
)
def test_gradients_are_those_of_rows_one_after_the_other(make, name, dam):
    merged = make(name, **dam)
    step(merged)
    together = [c.grad.clone() for c in merged.parameters()]
    merged.zero_grad()
    for source in (0, 1):
        rows, count = ROWS[source::2], sum(len(row) - 1 for row in ROWS[source::2])
        for row in rows:
            loss = Distillation(merged, Objective(similarity=0.0))(**batch([row], [source]))
            (loss["loss"] * (len(row) - 1) / count).backward()
    for one, other in zip(together, merged.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["a block", "between the blocks"])
def test_what_fails_in_one_of_them_is_raised_and_ends_all(make, monkeypatch, where, error):
    merged = make(offload="disk")
    step(merged)
    gradients = [c.grad.clone() for c in merged.parameters()]

    def fail(*args, **kwargs):
        raise error("no such number")

    if where == "a block":
        broken = Block, "run_with"
    else:
        broken = merged.model.base_model.rotary_emb, "forward"
    with monkeypatch.context() as patch, pytest.raises(error, match="no such number"):
        patch.setattr(*broken, fail)
        step(merged)
    begun = [o for o in gc.get_objects() if type(o) is greenlet and o and o is not getcurrent()]
    assert not begun
    assert torch.is_grad_enabled()
    merged.zero_grad()
    step(merged)
    assert all(map(torch.equal, gradients, (c.grad for c in merged.parameters())))


@pytest.mark.parametrize("is_wanted", [True, False])
def test_one_that_is_stopped_where_a_model_wants_no_gradients(is_wanted):
    """What the model's own context restores when it ends is not what was there for its caller."""

    def model(ids):
        with torch.no_grad():
            return arrive(None, (ids,), {})

    path = Path(model, torch.zeros(1, 2), "merge", has_gradients=not is_wanted)
    with torch.set_grad_enabled(is_wanted):
        with pytest.raises(ArithmeticError), begun([path]):
            raise ArithmeticError
        assert torch.is_grad_enabled() == is_wanted


def test_weights_are_looked_through_with_one_copy_of_each(make, monkeypatch):
    merged, copied = make(offload="cpu"), Counter()
    store = merged._weights._store
    copy = store._copy
    monkeypatch.setattr(store, "_copy", lambda wanted: copied.update([wanted]) or copy(wanted))
    assert merged.not_finite() is None
    assert set(copied.values()) == {1}


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
def test_gradients_are_the_merges_whoever_speaks_when_they_are_computed(make, recompute):
    merged = make(recompute=recompute)
    step(merged)
    expected = [c.grad.clone() for c in merged.parameters()]
    merged.zero_grad()
    loss = Distillation(merged, Objective())(**STEP)["loss"]
    with merged.speaking_as(0):
        loss.backward()
    assert all(map(torch.equal, expected, (c.grad for c in merged.parameters())))
