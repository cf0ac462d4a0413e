"""Score model folders on the quickstart skills by greedy exact match.

    python examples/quickstart/evaluate.py MODEL_FOLDER [MODEL_FOLDER ...]

prints one row per model folder: the share of each skill's test prompts that the model completes
exactly, and the mean over the skills.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Row = dict[str, str]

SKILLS = ("add", "reverse", "sort", "max")
DATA = Path(__file__).resolve().parent / "data"


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file of {"prompt": ..., "completion": ...} rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> float:
    """Return the share of rows whose greedy completion equals the expected one."""
    model.eval()
    # Prompts of one length need no padding, so a row's answer cannot depend on its neighbours.
    groups: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        groups[len(ids)].append((ids, row["completion"]))

    longest = max(len(tokenizer(row["completion"])["input_ids"]) for row in rows)
    hits = 0
    for length, group in groups.items():
        prompts = torch.tensor([ids for ids, _ in group], device=model.device)
        output = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=longest + 1,  # room for <eos>: an answer that runs on is wrong
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        hits += sum(answer == wanted for answer, (_, wanted) in zip(answers, group, strict=True))
    return hits / len(rows)


def score_folder(folder: Path, tests: dict[str, list[Row]]) -> list[float]:
    """Load the model and tokenizer of a folder and score them on every skill."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [exact_match(model, tokenizer, rows) for rows in tests.values()]


def main() -> None:
    """Print the table of scores."""
    parser = argparse.ArgumentParser(description="Exact match on the quickstart skills.")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <skill>_test.jsonl")
    args = parser.parse_args()

    tests = {skill: read_rows(args.data / f"{skill}_test.jsonl") for skill in SKILLS}
    width = max(len("model"), *(len(str(folder)) for folder in args.models))
    print(f"{'model':<{width}}", *(f"{name:>8}" for name in (*SKILLS, "mean")))
    for folder in args.models:
        scores = score_folder(folder, tests)
        scores.append(sum(scores) / len(scores))
        print(f"{folder!s:<{width}}", *(f"{score:8.3f}" for score in scores), flush=True)


if __name__ == "__main__":
    main()
