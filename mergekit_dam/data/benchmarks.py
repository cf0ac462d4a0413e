"""Data that look like the test set of a benchmark, on which nobody should fit."""

import re

from mergekit_dam.config.data_settings import DataSettings

# Those whose training split is there for training, and those that are nothing but a test.
WITH_TRAINING = (
    "ai2 arc", "arc challenge", "arc easy", "boolq", "commonsenseqa", "competition math", "drop",
    "gsm8k", "hellaswag", "hendrycks math", "mbpp", "mmlu", "openbookqa", "piqa", "race", "sciq",
    "squad", "super glue", "triviaqa", "trivia qa", "winogrande",
)  # fmt: skip
TEST_ALONE = (
    "agieval", "aime", "alpaca eval", "bbh", "big bench hard", "bigcodebench", "cmmlu", "gpqa",
    "humaneval", "humaneval plus", "ifeval", "livecodebench", "math 500", "math500", "mgsm",
    "mmlu pro", "mmlu redux", "mt bench", "musr", "swe bench", "truthfulqa", "truthful qa",
)  # fmt: skip
TEST_SPLIT = ("test", "validation", "valid", "val", "dev", "eval")


def benchmark_warning(entry: DataSettings) -> str | None:
    """A sentence where the names of an entry say so."""
    if entry.path is None:
        return None
    name, split = _words(f"{entry.path} {entry.name or ''}"), _words(entry.split)
    found = _first(TEST_ALONE, name)
    if found is None and _first(TEST_SPLIT, f"{name} {split}"):
        found = _first(WITH_TRAINING, name)
    if found is None:
        return None
    return (
        f"The data {entry.path} (split {entry.split}) of the source {entry.source} look like the "
        f"test set of {found}: fitted on it, the merge's score there says nothing; take other data."
    )


def _words(name: str) -> str:
    """In lower case, any signs between the words being one blank."""
    return re.sub(r"[^a-z0-9]+", " ", name.lower())


def _first(candidates: tuple[str, ...], words: str) -> str | None:
    return next((name for name in candidates if f" {name} " in f" {words} "), None)
