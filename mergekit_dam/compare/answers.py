"""Exact match: greedy decoding of a row's completion from its prompt."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_dam.config import Settings
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit.rows import load_source_data
from mergekit_dam.model import MergedModel
from mergekit_dam.plan import Plan

BATCH = 64  # prompts that are answered together
LONGEST = 64  # tokens of an answer; nobody expects a longer text word for word


@dataclass(frozen=True)
class Answer:
    """A prompt and its completion, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def load_answers(
    settings: Settings, plan: Plan, data: Sequence[SourceData], out: str
) -> list[list[Answer]]:
    """For each source, the answers of its held-out rows: short completions of prompts. `out`: see
    `load_data`."""
    entries = tuple(e.model_copy(update={"loss_on": "completion"}) for e in settings.data)
    settings = settings.model_copy(update={"loss_on": "completion", "data": entries})
    return [
        list(_read(source, settings, plan, out, held_out))
        for source, held_out in zip(plan.sources, map(_held_out, data), strict=True)
    ]


def _read(
    source: ModelReference,
    settings: Settings,
    plan: Plan,
    out: str,
    held_out: Collection[tuple[int, ...]],
) -> Iterator[Answer]:
    """Rows know where their completion begins when the loss is on completions."""
    try:
        rows = load_source_data(source, settings, plan, out).held_out
    except DamError:  # text in which nothing is asked
        return
    for row in rows:
        if row.start > 0 and tuple(row.ids) in held_out:
            answer = _ended(row.ids[row.start + 1 :], plan.tokenizer.eos_token_id)
            if len(answer) <= LONGEST:
                yield Answer(tuple(row.ids[: row.start + 1]), tuple(answer))


def _ended(completion: list[int], end: int | None) -> list[int]:
    """Up to the token with which decoding ends: chat templates write a line break after it."""
    return completion[: completion.index(end) + 1] if end in completion else completion


def _held_out(data: SourceData) -> set[tuple[int, ...]]:
    """Whole rows: one that is cut has an answer that is cut."""
    return {tuple(row.ids) for row in data.held_out if not row.is_cut}


@torch.no_grad()
def exact_matches(
    model: MergedModel, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase
) -> float:
    """The share of the completions that greedy decoding gives, to the last token."""
    hits = 0
    for group in _groups(answers):
        longest = max(len(answer.completion) for answer in group)
        prompts = torch.tensor([answer.prompt for answer in group], device=model.device)
        output = model.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        for answer, given in zip(group, output[:, prompts.shape[1] :].tolist(), strict=True):
            hits += tuple(given[: len(answer.completion)]) == answer.completion
    return hits / len(answers)


def _groups(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """Prompts of one length need no padding, so no answer depends on its neighbours."""
    by_length: dict[int, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_length[len(answer.prompt)].append(answer)
    for same in by_length.values():
        for start in range(0, len(same), BATCH):
            yield same[start : start + BATCH]
