"""One source's own data, as the YAML names them."""

import glob
import os
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

Share = Annotated[float, Field(gt=0, lt=1)]
EVERY = "*"  # stands for each source that has no entry of its own
OF_FILES = ("name", "revision", "split", "streaming", "text", "columns", "examples")
LossOn = Literal["all", "completion"]

ENDINGS = ("json", "jsonl", "parquet", "csv", "txt")  # of files that are read
COMPRESSED = ("gz", "bz2", "xz", "zst")

# The columns that make a row; of those that a row has, the first in this order count. TRL's
# shapes, then the older ones of Alpaca, of questions and answers, of ShareGPT.
SHAPES = (
    ("messages",),
    ("prompt", "completion"),
    ("text",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("question", "answer"),
    ("conversations",),
)


def is_local(path: str) -> bool:
    """Whether a data path must be a file or folder here rather than a name on the Hub."""
    return (
        os.path.exists(path)
        or path.startswith((".", "/", "~"))
        or glob.has_magic(path)
        or ending(path) in ENDINGS
    )


def ending(path: str) -> str:
    """Of a file's name, without that of a compression."""
    stem, _, last = path.lower().rpartition(".")
    return stem.rpartition(".")[2] if last in COMPRESSED else last


class Block(pydantic.BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A frozen part of the YAML that knows all its keys."""


class DataSettings(Block):
    """One source's own data."""

    source: str = Field(
        description="the model, written as under `models`; `*`: every source without an entry"
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="a json, jsonl, parquet, csv or txt file, a pattern of such files "
        "(`data/*.jsonl`), a folder, or a data set's Hub name",
    )
    generate: int | None = Field(
        None, ge=2, description="rows that the source writes itself, instead of `path`"
    )
    name: str | None = Field(None, description="the data set's configuration on the Hub")
    revision: str | None = Field(None, description="its commit, tag or branch on the Hub")
    split: str = Field("train", description="the split to train on; slices such as `train[:10%]`")
    streaming: bool = Field(
        False, description="read rows as they come, instead of downloading the data set first"
    )
    held_out: Share | str | None = Field(
        None, description="share or named split that is held out; default: `dam.held_out`"
    )
    text: str | None = Field(None, description="short for `columns: {text: ...}`")
    columns: dict[str, str] | None = Field(
        None, description="our names of the columns, each with the data's own; default: the same"
    )
    loss_on: LossOn | None = Field(None, description="default: `dam.loss_on`")
    examples: int | None = Field(None, ge=2, description="rows used; default: `dam.examples`")
    max_length: int | None = Field(
        None, ge=2, description="tokens kept of a row; default: `dam.max_length`"
    )

    @pydantic.field_validator("columns")
    @classmethod
    def _one_shape(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        if columns is not None and all(set(columns) != set(shape) for shape in SHAPES):
            known = " or ".join(f"{{{', '.join(shape)}}}" for shape in SHAPES)
            raise ValueError(f"makes no row: name {known}")
        return columns

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "DataSettings":
        if (self.path is None) == (self.generate is None):
            raise ValueError("give a `path`, or the number of rows to `generate`")
        given = (name for name in OF_FILES if self.path is None and self._is_given(name))
        for name in given:
            raise ValueError(f"`{name}` has no effect on rows that a source writes itself")
        if self.path is None and isinstance(self.held_out, str):
            raise ValueError("rows that a source writes itself have no splits to hold out")
        return self

    @pydantic.model_validator(mode="after")
    def _one_mapping(self) -> "DataSettings":
        if self.text is not None and self.columns is not None:
            raise ValueError("give `text` or `columns`, not both")
        return self

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default

    @property
    def mapping(self) -> Mapping[str, str] | None:
        """Our names of columns -> the data's; None: they are the same."""
        return self.columns if self.text is None else {"text": self.text}
