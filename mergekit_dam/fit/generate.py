"""Data that the sources write themselves, where none are given; kept beside the coefficients."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergekit_dam.config import DataSettings, Settings
from mergekit_dam.data import SourceData
from mergekit_dam.data.load import share_out
from mergekit_dam.data.written import load_written, save_written
from mergekit_dam.errors import DamError
from mergekit_dam.fit.processes import is_main, wait_for
from mergekit_dam.fit.sample import Sampler
from mergekit_dam.model.whole import load_whole
from mergekit_dam.opening import load_tokenizer
from mergekit_dam.plan import Plan, plan_alone
from mergekit_dam.sources import describe

RECIPE = 1  # changes when the same settings would give other rows


@dataclass(frozen=True)
class Generation:
    """The rows that one source writes."""

    source: ModelReference
    entry: DataSettings
    settings: Settings
    plan: Plan
    folder: Path

    @cached_property
    def length(self) -> int:
        """Tokens of a row, at most."""
        configs = (self.plan.model_config, self.source.config(self._trusts_code))
        limits = [getattr(c.get_text_config(), "max_position_embeddings", None) for c in configs]
        wanted = self.entry.max_length or self.settings.max_length
        return min([wanted, *(limit for limit in limits if limit)])

    @cached_property
    def path(self) -> Path:
        """Named by all that the rows depend on, so that they are written once and never mixed up
        with others."""
        source = describe(self.source)
        same = {
            "weights": source.weights,
            "dtype": self.plan.dtype,
            "config": source.config,
            "template": self._tokenizer.chat_template,
            "vocabulary": len(self._tokenizer),
            "rows": self.entry.generate,
            "length": self.length,
            "seed": self.settings.seed,
            "recipe": RECIPE,
        }
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", str(self.source).rstrip("/").rpartition("/")[2])
        return self.folder / f"{name[:40].lstrip('.')}-{digest}.jsonl"

    def load(self) -> SourceData:
        """The rows over the merge's vocabulary."""
        path, held_out = self.path, self.entry.held_out or self.settings.held_out
        config = self.source.config(self._trusts_code).get_text_config()
        written, ids = load_written(path, config.vocab_size), self._merged_ids()
        counts = {"on_completion": self._on_completion}
        rows = [row.row(ids, self.length, **counts) for row in written]
        return share_out([row for row in rows if row.counted], held_out, str(path))

    def require_prompts(self) -> None:
        """Raises DamError where answers are to count, and there will be none."""
        if self._on_completion and self._tokenizer.chat_template is None:
            raise DamError(
                f"{self.source} has no chat template, so it writes plain text, in which no "
                "completion begins: give `loss_on: all` to its `dam.data` entry."
            )

    def write(self, merge: MergeConfiguration, device: str) -> None:
        """With the source's own model and tokenizer, as mergekit reads them."""
        own = plan_alone(self.source, merge, self.plan.options)
        model = load_whole(own, device, torch.float32 if device == "cpu" else None)
        sampler = Sampler(model, self._tokenizer, str(self.source), self.length)
        count = self.entry.generate
        rows = tqdm(
            sampler.rows(count, self.settings.seed),
            f"{self.source} writes",
            total=count,
            disable=self.plan.options.quiet,
        )
        save_written(self.path, list(rows))

    def _merged_ids(self) -> dict[int, int] | None:
        if self.plan.vocabulary is None:
            return None
        permutation = self.plan.vocabulary.info.permutations[self.source]
        return {old: new for new, old in permutation.items() if old >= 0}

    def __str__(self) -> str:
        beginning = "its chat template" if self._tokenizer.chat_template else "its beginning token"
        return (
            f"{self.source}: will write {self.entry.generate:,} rows of at most {self.length:,} "
            f"tokens itself, from {beginning}, into {self.path}"
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source, self.plan.options)

    @property
    def _on_completion(self) -> bool:
        return (self.entry.loss_on or self.settings.loss_on) == "completion"

    @property
    def _trusts_code(self) -> bool:
        return self.plan.options.trust_remote_code


def write_if_missing(generation: Generation, merge: MergeConfiguration, device: str) -> None:
    """Under torchrun the first process writes, and the others wait."""
    path = generation.path
    if not path.exists() and is_main():
        generation.write(merge, device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of the model that is gone
    wait_for(path, path.exists)
