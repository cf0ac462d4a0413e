"""The `dam:` block of the YAML: everything that the fit reads, with its defaults.

docs/config.md is written from the descriptions here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from mergekit_dam.config.data_settings import EVERY, Block, DataSettings, LossOn, Share
from mergekit_dam.formula import Formula, Granularity
from mergekit_dam.task_vectors import Sparsify

Weight = Annotated[float, Field(ge=0)]
Basis = Literal["differences", "coefficients"]
STARTS = ("least_squares", "average", "weights")  # any other is the path of a file

# arXiv 2410.08371, section 4; L1 and L2 are off there as in the published training script.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "start": "average",
        "use_base": False,
        "basis": "coefficients",
        "epochs": 1,
        "batch_size": 1,
        "examples": 1729,
        "max_length": 2048,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "objective": {"temperature": 2.0, "similarity": 0.01},
    },
}


COMPARISONS = ("kl", "reverse_kl", "jsd", "mse", "entropy")  # the terms that look at predictions


class Objective(Block):
    """Weights of the terms that the fit minimises (arXiv 2410.08371, section 3.2).

    The first group compares the merge with a source on that source's data; the second looks at
    the coefficients alone.
    """

    temperature: float = Field(1.0, gt=0, description="T of `kl`, `reverse_kl`, `jsd`, `entropy`")
    kl: Weight = Field(1.0, description="T² · KL(source ‖ merge), mean over the tokens")
    reverse_kl: Weight = Field(0.0, description="T² · KL(merge ‖ source)")
    jsd: Weight = Field(0.0, description="T² · Jensen-Shannon divergence")
    mse: Weight = Field(0.0, description="mean squared difference of the logits")
    entropy: Weight = Field(0.0, description="T² · entropy of the merge's own predictions")
    similarity: Weight = Field(
        0.01, description="mean pairwise cosine of the sources' coefficients, mean over tensors"
    )
    l1: Weight = Field(0.0, description="sum of |c|")
    l2: Weight = Field(0.0, description="sum over sources and tensors of the 2-norm of c")
    overlap: Weight = Field(
        0.0, description="mean pairwise sum of min(|c_i|, |c_j|), summed over tensors"
    )
    weighted_overlap: Weight = Field(
        0.0, description="the same, weighted by sin²(2θ), θ the angle between what c_i, c_j scale"
    )

    @pydantic.model_validator(mode="after")
    def _some_term(self) -> "Objective":
        if not any(getattr(self, name) for name in COMPARISONS):
            terms = ", ".join(f"`{name}`" for name in COMPARISONS)
            raise ValueError(
                f"has no term that looks at predictions: give one of {terms} a weight above 0"
            )
        return self


class Train(Block):
    """Which kinds of tensors get trained coefficients; the others keep their start."""

    linear: bool = Field(True, description="weight matrices of linear layers and experts")
    embedding: bool = Field(True, description="token and position embeddings, tied heads")
    norm: bool = Field(True, description="norm weights and other vectors")
    bias: bool = Field(True, description="biases")


class GranularityRule(Block):
    """A granularity for some output tensors, in the manner of mergekit's parameters."""

    value: Granularity
    filter: str | None = Field(None, description="part of the tensors' names; default: all")


class Settings(Block):
    """The `dam:` block."""

    data: tuple[DataSettings, ...] = Field(
        description="one entry for each source, or one alone without `source`, for all of them"
    )
    loss_on: LossOn = Field(
        "all",
        description="`completion`: what predicts a prompt counts for nothing, in the fit and in "
        "the held-out figures",
    )
    preset: Literal["paper"] | None = Field(
        None, description="`paper`: the published settings, where not given here"
    )
    formula: Formula = Field(
        "weights", description="`weights`: Σ c·W; `task_vectors`: W_base + Σ c·(W - W_base)"
    )
    sparsify: Sparsify = Field(
        "task_arithmetic",
        description="with `task_vectors`: they are prepared as this method of mergekit's does it, "
        "with its own parameters (`weight`, `density`, ...); `task_arithmetic` takes them whole",
    )
    granularity: Granularity | tuple[GranularityRule, ...] = Field(
        "column",
        description="one coefficient for each `column`, `row`, `tensor` or `element`; or a list "
        "of `{filter, value}`, of which the first that matches a tensor's name counts",
    )
    start: str | None = Field(
        None,
        description="where the coefficients begin: `least_squares` (layer by layer, nearest to the "
        "sources' own outputs, from the average, or with `steps: 0` from a base that is a source), "
        "`average`, `weights` (the YAML's), or the path of a coefficient "
        "file of these sources; default: `weights` where the YAML gives some, `average` where a "
        "source's layers have no counterparts in the merge, else `least_squares`",
    )
    calibration: int | None = Field(
        None,
        ge=1,
        description="rows of each source for the least-squares start; default: 32, or 128 with "
        "`steps: 0`",
    )
    use_base: bool | None = Field(
        None,
        description="with `formula: weights`, whether `base_model` is one more source, which needs "
        "no data and teaches nothing; default: where it is given and is no source already",
    )
    train: Train = Field(Train(), description="which kinds of tensors are trained")
    objective: Objective = Field(Objective(), description="the terms of the loss")
    steps: int | None = Field(
        None, ge=0, le=10**9, description="optimiser steps; 1,200 unless `epochs` is given"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        le=10**9,
        description="passes over the longest source's data, instead of `steps`",
    )
    batch_size: int = Field(
        2,
        ge=1,
        le=2**16,
        description="rows of each source in a step, on each device; at equal tokens many steps of "
        "few rows come further than few steps of many",
    )
    accumulation: int = Field(1, ge=1, description="batches added up for one step")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of AdamW; default: for each tensor one that moves its "
        "weights by 0.05 of what its sources differ in",
    )
    basis: Basis = Field(
        "differences",
        description="what AdamW steps along with `formula: weights`: what each source differs in "
        "from the base (or from the sources' mean) and that middle itself, or each coefficient",
    )
    schedule: Literal["cosine", "linear", "constant", "polynomial"] = Field(
        "cosine", description="how the learning rate falls, after `warmup`"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 turns it off")
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="of the row order, the choice of held-out rows, random sparsification, and the "
        "rows that sources write",
    )
    examples: int = Field(2000, ge=2, description="rows used of each source's data")
    max_length: int = Field(1024, ge=2, description="tokens kept of a row")
    held_out: Share = Field(0.05, description="share of a source's rows that is held out")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of the fit's forward passes; auto: float32 on a CPU, on a GPU the "
        "models' own with bfloat16 for float16; coefficients are float32 always",
    )
    teacher: Literal["live", "cached"] = Field(
        "live",
        description="`cached`: each source's states on its rows are computed once and kept on disk "
        "beside the checkpoints, which pays where rows are seen more than once",
    )
    recompute: Literal["auto", "block", "weights", "none"] = Field(
        "auto",
        description="what the backward pass makes again: whole blocks, their merged weights alone, "
        "or nothing; the gradients are the same; auto: the fastest that fits into half of the "
        "free memory",
    )
    offload: Literal["auto", "none", "cpu", "disk"] = Field(
        "auto",
        description="where the sources' weights live between their uses: on the device (`none`), "
        "in host memory beside a GPU (`cpu`), or in the checkpoints' files (`disk`); the result "
        "is the same; auto: the first of these that fits",
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="steps between held-out evaluations, for the report's curve; the fit ends with "
        "the best coefficients of them; default: before and after the fit alone",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="with `evaluate_every`: the fit stops after so many evaluations in a row that "
        "are no better than the best of them (the start is none); default: it runs to its end",
    )
    report_to: tuple[str, ...] = Field(
        (), description="the Trainer's integrations: tensorboard, wandb, trackio, ..."
    )

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _for_all(cls, data: Any) -> Any:
        return ({"source": EVERY, **data},) if isinstance(data, Mapping) else data

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, fields: Any) -> Any:
        name = fields.get("preset") if isinstance(fields, dict) else None
        if isinstance(name, str) and name in PRESETS:
            preset = dict(PRESETS[name])
            if fields.get("steps") is not None:
                preset.pop("epochs", None)
            given = fields.get("objective")
            if isinstance(given, dict):
                preset["objective"] = preset.get("objective", {}) | given
                fields = {key: value for key, value in fields.items() if key != "objective"}
            fields = preset | fields
        return fields

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "Settings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        return self

    @pydantic.model_validator(mode="after")
    def _evaluates_for_patience(self) -> "Settings":
        if self.patience and not self.evaluate_every:
            raise ValueError("`patience` counts evaluations: give `evaluate_every`, too")
        return self

    @pydantic.model_validator(mode="after")
    def _sparsifies_task_vectors(self) -> "Settings":
        if self.sparsify != "task_arithmetic" and self.formula != "task_vectors":
            raise ValueError(f"`sparsify: {self.sparsify}` needs `formula: task_vectors`")
        return self

    @pydantic.field_validator("train")
    @classmethod
    def _some_kind(cls, train: Train) -> Train:
        if not any(value for _, value in train):
            raise ValueError("leaves no kind of tensor to train: switch one on")
        return train

    def granularity_of(self, name: str) -> Granularity:
        """Of one output tensor; `column` where no rule matches."""
        if isinstance(self.granularity, str):
            return self.granularity
        matching = (r for r in self.granularity if r.filter in (None, "*") or r.filter in name)
        return next((rule.value for rule in matching), "column")

    @property
    def calibration_rows(self) -> int:
        """Of each source; more do not help where steps follow (docs/experiments.md)."""
        return self.calibration or (128 if self.max_steps == 0 else 32)

    @property
    def max_steps(self) -> int:
        """Optimiser steps, or -1 where `epochs` decides (the Trainer's convention)."""
        if self.epochs is not None:
            return -1
        return 1200 if self.steps is None else self.steps
