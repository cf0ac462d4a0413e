"""Of an embedding's table only the rows are made that a step looks up: nothing else changes."""

import copy
from collections import Counter

import pytest
import tiny
import torch
import torch.nn.functional as F
from mergekit.options import MergeOptions
from torch import nn

from mergekit_dam.config import read_recipe
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import MergedModel
from mergekit_dam.model import lookup as lookup_module
from mergekit_dam.model.lookup import Lookup

TABLES = {"gpt2": ["transformer.wte.weight", "transformer.wpe.weight"]}
WIDTH = 5
TABLE = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))
ROWS = 256  # of a vocabulary, of which a few are looked up
WIDE = tiny.SIZES["hidden_size"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def make(recipe, tmp_path):
    def make(name: str, **keys) -> MergedModel:
        config = copy.deepcopy(tiny.CONFIGS[name])
        config.vocab_size = ROWS
        models = tiny.save_models(tmp_path, config, 3)
        recipe_ = read_recipe(str(recipe(models[:2], base_model=str(models[2]), **keys)))
        merged = prepare(recipe_, MergeOptions(quiet=True), device="cpu").merged
        torch.manual_seed(0)
        for c in merged.parameters():
            c.data.uniform_()
        return merged

    return make


def step(merged: MergedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of rows that repeat tokens, among them the one that pads."""
    ids = tiny.tokens()
    ids[:, 3], ids[0, 5:] = 0, 9
    merged.zero_grad()
    logits = merged(ids)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: c.grad for n, c in merged.trained_coefficients().items()}


def with_whole_tables(merged: MergedModel) -> MergedModel:
    for block in merged._blocks:
        block._tables = []
    return merged


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
@pytest.mark.parametrize(
    "name, keys",
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("llama_tied", {"dam": {"granularity": "row"}}),
        ("gemma3", {"dam": {"granularity": "element"}}),
        ("gemma3", {}),  # scales what it looks up
        ("gpt2", {"dam": {"granularity": "tensor"}}),
        ("llama", {"dam": {"formula": "task_vectors"}}),
        ("llama", {"dam": {"formula": "task_vectors", "sparsify": "ties"}}),
        ("llama", {"dtype": "bfloat16"}),
    ],
)
def test_logits_and_gradients_are_those_with_whole_tables(make, name, keys, recompute):
    merged = make(name, **keys)
    merged.recompute = recompute
    logits, gradients = step(merged)
    whole, expected = step(with_whole_tables(merged))
    assert torch.equal(logits, whole)
    for tensor, gradient in gradients.items():  # of the table, sums in another order
        bound = (2e-2 if "dtype" in keys else 1e-5) * expected[tensor].abs().max()
        assert (gradient - expected[tensor]).abs().max() <= bound, tensor


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_no_table_is_made_whole_but_for_the_head(make, watch, name):
    merged, tables = make(name), TABLES.get(name, [EMBEDDING])
    merged.recompute = "block"
    with torch.no_grad():
        merged.states(tiny.tokens())  # finds out how the model is split
    made = watch(merged)
    merged.states(tiny.tokens()).sum().backward()
    times = Counter(tensor for tensor, rows in made if rows is not None)
    # With a padding id, too, nothing is looked up again; but gemma2's scale asks for its block.
    assert times == dict.fromkeys(tables, 2 if name == "gemma2" else 1)
    whole = {tensor for tensor, rows in made if rows is None}
    assert whole  # the layers
    assert not whole & set(tables)


@pytest.mark.parametrize("granularity, made", [("tensor", 5), ("row", None)])
def test_rows_with_coefficients_of_their_own_are_made_with_the_others(
    make, watch, granularity, made
):
    merged = make("llama", dam={"granularity": granularity})
    asked = watch(merged)
    merged(torch.arange(5)[None])
    assert (EMBEDDING, made) in asked


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
def test_the_backward_pass_makes_no_table_again(make, watch, recompute):
    merged = make("llama", dam={"granularity": "row"})
    merged.recompute = recompute
    made = watch(merged)
    step(merged)
    assert made.count((EMBEDDING, None)) == 1


def test_of_more_rows_than_there_are_the_table_is_made(make, watch):
    merged = make("llama")
    made = watch(merged)
    for count in (ROWS, ROWS + 1):
        merged(torch.zeros(1, count, dtype=torch.long))
    assert [rows for tensor, rows in made if tensor == EMBEDDING] == [ROWS, None]


@pytest.mark.parametrize("count", [1, 7, 20, 21])
def test_rows_are_made_in_parts(make, watch, monkeypatch, count):
    """That of a table are as many as are worked on at once."""
    merged, ids = make("llama"), torch.randint(0, ROWS, (1, count))
    expected = merged(ids)
    made = watch(merged)
    monkeypatch.setattr(lookup_module, "at_once", lambda device: 7 * WIDE)
    assert torch.equal(merged(ids), expected)
    parts = [rows for tensor, rows in made if tensor == EMBEDDING]
    assert max(parts) <= 7
    assert sum(parts) == count
    assert set(parts[:-1]) <= {7}


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
@pytest.mark.parametrize("keys", [{}, {"dam": {"formula": "task_vectors"}}])
def test_gradients_of_parts_are_those_of_all_rows(make, watch, monkeypatch, keys, recompute):
    merged = make("llama", **keys)
    merged.recompute = recompute
    logits, expected = step(merged)
    made = watch(merged)
    monkeypatch.setattr(lookup_module, "at_once", lambda device: 7 * WIDE)
    in_parts, gradients = step(merged)
    assert len([tensor for tensor, _ in made if tensor == EMBEDDING]) > 1
    assert torch.equal(in_parts, logits)
    for tensor, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[tensor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "keys", [{"offload": "disk"}, {"offload": "cpu"}, {"compute_dtype": "bfloat16"}, {}]
)
def test_so_is_a_teachers_table_where_it_would_be_copied(make, keys):
    merged, ids = make("llama", dam=keys), tiny.tokens()
    embedding = merged.model.model.embed_tokens
    with merged.speaking_as(1), torch.no_grad():
        (table,) = embedding.weights(1, whole=False).values()
        assert isinstance(table, Lookup) == bool(keys)
        assert torch.equal(embedding(ids), F.embedding(ids, embedding.weights(1)["weight"]))


def lookup(asked: list, table: torch.Tensor = TABLE, *, alone: bool = True) -> Lookup:
    def make(ids):
        asked.append(ids)
        return table * 1 if ids is None else table[ids]

    return Lookup(table.shape, table.dtype, table.device, make, alone=alone)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0), (1, 2, 3)])
def test_ids_of_any_shape(shape):
    ids, asked = torch.randint(0, len(TABLE), shape), []
    assert torch.equal(F.embedding(ids, lookup(asked)), F.embedding(ids, TABLE))
    assert torch.equal(asked[0], ids.flatten())


@pytest.mark.parametrize("padding", [0, 6, -1, -7])
def test_a_row_that_pads_has_no_gradient(padding):
    ids, gradients = torch.tensor([0, 3, 6, 3]), []
    for own in (TABLE.clone().requires_grad_(), TABLE.clone().requires_grad_()):
        table = own if gradients else lookup([], own)
        (F.embedding(ids, table, padding_idx=padding) * TABLE[:4]).sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("alone", [True, False])
def test_of_many_rows_the_table_is_made_once(alone):
    """Also where who asks first wants no gradient."""
    table, asked = TABLE.clone().requires_grad_(), []
    ids, own = torch.randint(0, len(TABLE), (5,)), lookup(asked, table, alone=alone)
    with torch.no_grad():
        for _ in range(3):  # 7 may be looked up
            assert torch.equal(F.embedding(ids, own), F.embedding(ids, TABLE))
    (F.embedding(ids, own) * TABLE[:5] + F.linear(TABLE, own).sum()).sum().backward()
    found = asked.pop(0) if alone else ids
    assert torch.equal(found, ids)
    assert asked == [None]
    expected = TABLE.clone().requires_grad_()
    (F.embedding(ids, expected) * TABLE[:5] + F.linear(TABLE, expected).sum()).sum().backward()
    torch.testing.assert_close(table.grad, expected.grad)


def test_gradients_of_several_calls_are_rows_until_all_are_there():
    table, ids, seen = TABLE.clone().requires_grad_(), torch.tensor([[1, 3, 3], [6, 0, 1]]), []
    own = lookup([], table, alone=False)
    own.whole().register_hook(lambda gradient: seen.append(gradient.is_sparse))
    found = [F.embedding(some, own) for some in ids]
    (found[0] * TABLE[:3] + found[1]).sum().backward()
    expected = torch.zeros_like(TABLE).index_add(0, ids[0], TABLE[:3])
    torch.testing.assert_close(table.grad, expected.index_add(0, ids[1], torch.ones(3, WIDTH)))
    assert seen == [True]


def test_gradients_of_a_frequent_row_are_not_lost():
    table = TABLE.bfloat16().requires_grad_()
    own, ids = lookup([], table, alone=False), torch.zeros(1000, dtype=torch.long)
    F.embedding(ids, own).sum().backward()
    torch.testing.assert_close(table.grad[0], torch.full((WIDTH,), 1000.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "compute",
    [
        lambda table: F.linear(torch.ones(2, WIDTH), table),
        lambda table: table[1:3].sum(),
        lambda table: torch.cat([table, table]),
        lambda table: torch.ones(2, WIDTH) @ table.T,
        lambda table: table.mT.sum(),
        lambda table: F.linear(torch.ones(2, WIDTH), table.data),
        lambda table: F.embedding(torch.tensor([1, 1]), table.clone(), max_norm=0.5),
        lambda table: F.embedding(torch.tensor([1, 2]), table, scale_grad_by_freq=True),
    ],
)
def test_what_else_computes_with_it_gets_it_whole(compute):
    asked = []
    assert torch.equal(compute(lookup(asked)), compute(TABLE))
    assert asked
    assert all(ids is None for ids in asked)


def test_what_models_ask_of_a_weight_makes_nothing():
    table, asked = lookup(asked := []), asked
    module = nn.Embedding(len(TABLE), WIDTH)
    module._parameters["weight"] = table
    assert (module.weight.shape, module.weight.dtype) == (TABLE.shape, TABLE.dtype)
    assert module.weight.device == TABLE.device
    assert module.weight.size(0) == len(TABLE)
    assert (module.weight.dim(), module.weight.numel()) == (2, TABLE.numel())
    assert not asked
    with torch.no_grad():
        assert torch.equal(module(torch.tensor([2])), TABLE[2:3])
