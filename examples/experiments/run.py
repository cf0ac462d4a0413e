"""Run scenarios over several seeds and collect one table for each.

    python examples/experiments/run.py --out DIR [--scenarios far,close] [--seeds 0,1,2]

Every scenario and seed has a folder of its own under DIR: its checkpoints, and the comparison that
`mergekit-dam compare` makes of them. What is there already is kept, so an interrupted run goes on;
`--again "dam,dam short"` computes these merges anew, `--only dam` no others. DIR/tables.md is
written from what is there.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import close
import domains
import far
import lora
import many
import tied
import weak
from mergekit.options import MergeOptions

from mergekit_dam.compare import compare, records
from mergekit_dam.compare.records import RESULTS, Entry, Results, mean, retention
from mergekit_dam.config import read_recipe
from mergekit_dam.table import piped

SCENARIOS: dict[str, Callable[[Path, int], Path]] = {
    "far": far.make,
    "close": close.make,
    "weak": weak.make,
    "two": many.two,
    "four": many.four,
    "eight": many.eight,
    "domains": domains.make,
    "tied": tied.make,
    "lora": lora.make,
}
# Fits with every default but the steps: a third, with which a fit reads as many tokens as
# `preset: paper` in its epoch; a fifteenth; and the start by least squares alone.
FITS = {"dam third": {"steps": 400}, "dam short": {"steps": 80}, "dam start": {"steps": 0}}


def run(
    folder: Path,
    scenario: str,
    seed: int,
    again: Sequence[str],
    only: Sequence[str],
    **settings: int,
) -> None:
    place = folder / f"{scenario}-{seed}"
    config = place / "config.yml"
    if not config.exists():
        config = SCENARIOS[scenario](place, seed)
    compare(
        read_recipe(str(config)),
        str(place / "compared"),
        MergeOptions(quiet=True, lora_merge_cache=str(place / "lora")),
        device="cpu",
        only=only,
        again=again,
        fits=FITS,
        say=lambda text: print(f"{scenario} {seed}: {text}", flush=True),
        **settings,
    )


# --- Tables ---------------------------------------------------------------------------------------


def tables(folder: Path) -> str:
    """One table for each scenario that has results, and what the tables come to."""
    parts, lines = [], []
    for scenario in SCENARIOS:
        found = [
            records.read(path) for path in sorted(folder.glob(f"{scenario}-*/compared/{RESULTS}"))
        ]
        found = [results for results in found if results is not None]
        if found:
            means = _means(found)
            parts.append(_table(scenario, found, means))
            lines.append(_summary(scenario, means))
    return "\n\n".join([*parts, piped(SUMMARY, lines)]) + "\n"


COLUMNS = ("merge", "KL", "agreement", "exact match", "retention", "forward", "backward", "tokens")
SUMMARY = (
    "scenario", "best KL", "best exact match", "retention of dam", "KL of paper / dam",
    "tokens of dam / paper", "KL of paper / third", "tokens of third / paper",
    "KL of short / paper", "tokens of short / paper", "passes of evolution / dam",
    "KL of evolution / dam",
)  # fmt: skip


def _means(found: list[Results]) -> dict[str, dict[str, float]]:
    """Merge or base -> means over the seeds. `spread` is the standard deviation of the KL."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(_name(e) for r in found for e in r.entries if e.scores):
        pairs = [(r, e) for r in found for e in r.entries if _name(e) == name and e.scores]
        if pairs and pairs[0][1].kind != "source":
            rows = [_numbers(results, entry) for results, entry in pairs]
            table[name] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
            kls = [row["KL"] for row in rows]
            table[name]["spread"] = statistics.stdev(kls) if len(kls) > 1 else 0.0
    return table


def _name(entry: Entry) -> str:
    return entry.kind if entry.kind != "merge" else entry.name


def _numbers(results: Results, entry: Entry) -> dict[str, float]:
    kept = [value for value in retention(entry, results) if value is not None]
    cost = entry.cost or records.Cost()
    return {
        "KL": mean(entry, "kl"),
        "agreement": mean(entry, "agreement"),
        "exact match": mean(entry, "exact") or 0.0,
        "retention": statistics.fmean(kept) if kept else 0.0,
        "forward": cost.forward_passes,
        "backward": cost.backward_passes,
        "tokens": cost.tokens,
    }


def _table(scenario: str, found: list[Results], means: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (
            name,
            f"{row['KL']:.4f} ± {row['spread']:.4f}",
            *(f"{row[key]:.3f}" for key in COLUMNS[2:5]),
            *(f"{row[key]:,.0f}" for key in COLUMNS[5:]),
        )
        for name, row in sorted(means.items(), key=lambda item: item[1]["KL"])
    ]
    describe = SCENARIOS[scenario]
    text = getattr(describe, "func", describe).__globals__["__doc__"].strip().splitlines()[0]
    seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
    return f"### {scenario}\n\n{text} {seeds}.\n\n{piped(COLUMNS, rows)}"


def _summary(scenario: str, means: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    merged = {name: row for name, row in means.items() if name != "base"}
    best = [min(merged, key=lambda name: merged[name]["KL"])]
    best.append(max(merged, key=lambda name: merged[name]["exact match"]))

    def ratio(first: str, second: str, key: str) -> str:
        there = first in means and second in means and means[second][key]
        return f"{means[first][key] / means[second][key]:.2f}" if there else "-"

    return (
        scenario,
        *best,
        f"{means['dam']['retention']:.3f}" if "dam" in means else "-",
        ratio("dam paper", "dam", "KL"),
        ratio("dam", "dam paper", "tokens"),
        ratio("dam paper", "dam third", "KL"),
        ratio("dam third", "dam paper", "tokens"),
        ratio("dam short", "dam paper", "KL"),
        ratio("dam short", "dam paper", "tokens"),
        ratio("evolution", "dam", "forward"),
        ratio("evolution", "dam", "KL"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--again", default="", help="merges to compute anew")
    parser.add_argument("--only", default="", help="merges to compare; default: all")
    parser.add_argument("--search-rows", type=int, default=64)
    parser.add_argument("--evaluations", type=int, default=60)
    args = parser.parse_args()
    again, only = ([name for name in given.split(",") if name] for given in (args.again, args.only))
    for seed in filter(None, args.seeds.split(",")):
        for scenario in args.scenarios.split(","):
            run(
                args.out, scenario, int(seed), again, only,
                search_rows=args.search_rows, evaluations=args.evaluations,
            )  # fmt: skip
    records.write_text(args.out / "tables.md", tables(args.out))
    print(f"The tables are in {args.out / 'tables.md'}.")


if __name__ == "__main__":
    main()
