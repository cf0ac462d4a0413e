"""Each source's own rows, from what people have to token ids of the merge's vocabulary."""

from mergekit_dam.data.benchmarks import benchmark_warning
from mergekit_dam.data.load import SourceData, load_rows, others
from mergekit_dam.data.read import files_of, is_missing
from mergekit_dam.data.row import Row, together

__all__ = [
    "Row",
    "SourceData",
    "benchmark_warning",
    "files_of",
    "is_missing",
    "load_rows",
    "others",
    "together",
]
