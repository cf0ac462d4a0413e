"""Make the quickstart's checkpoints: one small Llama and four specialists fine-tuned from it.

    python examples/quickstart/make_specialists.py [--out FOLDER]

writes, into the script's own folder unless told otherwise:

    base/                        trained on copying and a little of every skill
    add/ reverse/ sort/ max/     the base, fully fine-tuned on one skill each
    data/<skill>.jsonl           rows to calibrate a merge with
    data/<skill>_test.jsonl      rows that no model and no calibration file has seen

A row is {"prompt": "27+65=", "completion": "92"}; the text that a model is trained on is
<bos> prompt completion <eos>. Everything follows from the seed, so that a second run on the same
machine writes the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from evaluate import Row, exact_match
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
TRAIN_ROWS, TEST_ROWS = 1500, 200
BATCH = 64
BASE_STEPS, SKILL_STEPS = 800, 800
RATE = 2e-3  # high enough to carry the specialists far from the base and from each other
COPY_SHARE = 0.5  # of the base's rows; the skills share the rest

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHARACTERS = string.digits + string.ascii_lowercase + " +="


# --- Skills -----------------------------------------------------------------------------------


def letters(rng: random.Random) -> str:
    """Draw a string of three to six letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))


def draw_copy(rng: random.Random) -> Row:
    """Copy a string of letters and digits."""
    text = "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(2, 6)))
    return {"prompt": f"copy {text}=", "completion": text}


def draw_add(rng: random.Random) -> Row:
    """Add two numbers below one hundred."""
    a, b = rng.randrange(100), rng.randrange(100)
    return {"prompt": f"{a}+{b}=", "completion": str(a + b)}


def draw_reverse(rng: random.Random) -> Row:
    """Reverse a string of letters."""
    text = letters(rng)
    return {"prompt": f"reverse {text}=", "completion": text[::-1]}


def draw_sort(rng: random.Random) -> Row:
    """Sort the letters of a string."""
    text = letters(rng)
    return {"prompt": f"sort {text}=", "completion": "".join(sorted(text))}


def draw_max(rng: random.Random) -> Row:
    """Find the largest of three or four two-digit numbers."""
    numbers = [rng.randrange(10, 100) for _ in range(rng.randint(3, 4))]
    return {"prompt": f"max {' '.join(map(str, numbers))}=", "completion": str(max(numbers))}


Draw = Callable[[random.Random], Row]
SKILLS: dict[str, Draw] = {
    "add": draw_add,
    "reverse": draw_reverse,
    "sort": draw_sort,
    "max": draw_max,
}


def draw_base(rng: random.Random) -> Row:
    """Draw from the base's mixture: much copying, a little of every skill."""
    draw = draw_copy if rng.random() < COPY_SHARE else rng.choice(list(SKILLS.values()))
    return draw(rng)


def distinct_rows(draw: Draw, rng: random.Random, count: int) -> list[Row]:
    """Draw rows until `count` of them have different prompts."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = draw(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


# --- Tokenizer and model ----------------------------------------------------------------------


def make_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer that puts <bos> before every text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, vocabulary[bos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaForCausalLM:
    """Build a Llama of 0.8 million parameters, unless changed, freshly initialised."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> LlamaForCausalLM:
    """Save the model in bfloat16 with its tokenizer; return it as the file's reader will see it."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes a class name that version 4 does not know; both know this one.
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")
    return rounded.float()


# --- Training ---------------------------------------------------------------------------------


def batches(
    draw: Draw,
    rng: random.Random,
    unseen: set[str],
    tokenizer: PreTrainedTokenizerFast,
    size: int = BATCH,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of freshly drawn rows, none of which is a test row."""
    while True:
        texts: list[str] = []
        while len(texts) < size:
            row = draw(rng)
            if row["prompt"] not in unseen:
                texts.append(row["prompt"] + row["completion"] + tokenizer.eos_token)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {**batch, "labels": labels}


def train(
    model: LlamaForCausalLM,
    stream: Iterator[dict[str, torch.Tensor]],
    steps: int,
    rate: float = RATE,
) -> None:
    """Train every weight of the model that wants gradients on `steps` batches of the stream."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    """Write the data, the base and the specialists, and report how well each one does."""
    parser = argparse.ArgumentParser(description="Make the quickstart's checkpoints and data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--skill-steps", type=int, default=SKILL_STEPS)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(2)  # a sum's order, and so its last bits, depends on the thread count
    torch.use_deterministic_algorithms(True)
    rng = random.Random(SEED)

    tests: dict[str, list[Row]] = {}
    for skill, draw in SKILLS.items():
        rows = distinct_rows(draw, rng, TRAIN_ROWS + TEST_ROWS)
        rng.shuffle(rows)
        write_rows(args.out / "data" / f"{skill}.jsonl", rows[TEST_ROWS:])
        tests[skill] = rows[:TEST_ROWS]
        write_rows(args.out / "data" / f"{skill}_test.jsonl", tests[skill])
    unseen = {row["prompt"] for rows in tests.values() for row in rows}

    tokenizer = make_tokenizer()
    base = make_model(tokenizer)
    started = time.perf_counter()
    train(base, batches(draw_base, rng, unseen, tokenizer), args.base_steps)
    rounded = save(base, tokenizer, args.out / "base")
    scores = {skill: exact_match(rounded, tokenizer, rows) for skill, rows in tests.items()}
    print("base    ", *(f"{skill} {score:.3f}" for skill, score in scores.items()), flush=True)

    for skill, draw in SKILLS.items():
        model = copy.deepcopy(base)
        train(model, batches(draw, rng, unseen, tokenizer), args.skill_steps)
        score = exact_match(save(model, tokenizer, args.out / skill), tokenizer, tests[skill])
        print(f"{skill:<8} {skill} {score:.3f}", flush=True)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
