"""Rows that are computed together."""

import torch

from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.batches import StepRows, batch, collate


def test_a_batch_is_padded_to_its_own_longest() -> None:
    result = batch([Row([5, 6, 7], start=1), Row([8]), Row([9, 4])], [0, 0, 1])
    assert result["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert result["lengths"].tolist() == [3, 1, 2]
    assert result["starts"].tolist() == [1, 0, 0]
    assert result["sources"].tolist() == [0, 0, 1]
    assert {tensor.dtype for tensor in result.values()} == {torch.int64}


def test_collate_puts_source_after_source() -> None:
    items = [  # two items of two sources
        [Row([1, 11]), Row([2, 22, 222])],
        [Row([1, 12]), Row([2, 23])],
    ]
    result = collate(items)
    assert result["sources"].tolist() == [0, 0, 1, 1]
    assert result["lengths"].tolist() == [2, 2, 3, 2]
    assert result["input_ids"].tolist() == [[1, 11, 0], [1, 12, 0], [2, 22, 222], [2, 23, 0]]


def test_an_item_has_a_row_of_every_source_and_short_ones_begin_again() -> None:
    one, two, three, seven, eight = (Row([token]) for token in (1, 2, 3, 7, 8))
    rows = StepRows([SourceData([one, two, three], []), SourceData([seven, eight], [one])])
    items = [rows[index] for index in range(len(rows))]
    assert items == [[one, seven], [two, eight], [three, seven]]
