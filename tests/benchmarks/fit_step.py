"""A step of the fit against a plain training step of one model of the same shape.

    python -m tests.benchmarks.fit_step [--shape small|cpu|7b] [--sources 3] [--repeat 5]

Random models are made and saved in a temporary folder. Plain steps (forward, backward to weights
and activations) and fit steps run alternately in this process.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import transformers
import yaml
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.batches import StepRows, collate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.teachers import KeptTeachers
from tests import tiny
from tests.benchmarks.measuring import Peak, alternate, machine, table

SHAPES = {
    "tiny": transformers.LlamaConfig(**tiny.SIZES),
    "small": transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "cpu": transformers.LlamaConfig(  # 90 million parameters
        hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=12288, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "7b": transformers.LlamaConfig(  # Llama 2 7B
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
PLAIN = "plain training step"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="cpu")
@click.option("--sources", default=3)
@click.option("--base", is_flag=True, help="a base as one more source, which teaches nothing")
@click.option("--rows", default=1, help="rows of each source in a step")
@click.option("--length", default=256, help="tokens of a row")
@click.option("--repeat", default=5)
@click.option("--device", default=None)
@click.option("--offload", multiple=True, default=("none", "disk"))
@click.option("--cap", type=float, help="GB of the GPU that may be used")
def main(shape, sources, base, rows, length, repeat, device, offload, cap) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cap and device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total)
    config, dtype = SHAPES[shape], torch.float32 if device == "cpu" else torch.bfloat16
    others = " and a base" if base else ""
    print(f"{machine(device)}; {sources} x {rows} rows of {length} tokens{others}, {dtype}")
    with tempfile.TemporaryDirectory() as folder:
        models = [save(Path(folder) / f"m{n}", config, n, dtype) for n in range(sources)]
        origin = save(Path(folder) / "base", config, sources, dtype) if base else None
        ids = [torch.randint(4, config.vocab_size, (rows, length)) for _ in models]
        steps = {PLAIN: _plain_step(models[0], torch.cat(ids), dtype, device)}
        predicted = {}
        for own in _settings(offload):
            name = ", ".join(f"{key}: {value}" for key, value in own.items())
            steps[name], predicted[name] = _fit_step(
                Path(folder), models, origin, ids, dtype, device, own
            )
        peaks = {}
        for name, step in steps.items():
            step()
            with Peak(device) as peak:
                step()
            peaks[name] = peak.most
        print(table(alternate(steps, repeat, device), peaks, PLAIN, predicted))


def _settings(offload: Iterable[str]) -> Iterator[dict[str, str]]:
    for where in offload:
        for recompute in ("block", "weights", "none") if where == "none" else ("weights",):
            for teacher in ("live", "cached") if recompute != "none" else ("live",):
                yield {"recompute": recompute, "teacher": teacher, "offload": where}


def save(folder: Path, config, seed: int, dtype: torch.dtype) -> Path:
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def _plain_step(folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    ids = ids.to(device)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def _fit_step(folder: Path, models, base, ids, dtype: torch.dtype, device: str, own: dict):
    document = {
        "merge_method": "dam",
        "models": [{"model": str(model)} for model in models],
        **({"base_model": str(base)} if base else {}),
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dtype": str(dtype).removeprefix("torch."),
        "dam": {
            "data": [{"source": str(m), "path": "unused.txt"} for m in models],
            "batch_size": len(ids[0]),
            **own,
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    data = [SourceData([Row(row) for row in rows.tolist()], []) for rows in ids]
    recipe = read_recipe(str(folder / "config.yml"))
    fit = prepare(recipe, MergeOptions(quiet=True, num_threads=torch.get_num_threads()),
                  device=device, data=data)  # fmt: skip
    kept = None
    if own["teacher"] == "cached":
        kept = KeptTeachers(fit.merged, folder / "teachers", "")
        kept.keep([source.train for source in data])
    distillation = Distillation(fit.merged, Objective(), teach=kept)
    stepped = StepRows(data)
    items = [stepped[(number,) * len(data)] for number in range(len(stepped))]
    inputs = {key: value.to(device) for key, value in collate(items).items()}

    def step() -> None:
        distillation(**inputs)["loss"].backward()
        distillation.zero_grad()

    return step, fit.needs.of(own["recompute"])


if __name__ == "__main__":
    main()
