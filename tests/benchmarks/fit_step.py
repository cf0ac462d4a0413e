"""A step of the fit against a plain training step of one model of the same shape.

    python -m tests.benchmarks.fit_step [--shape small|cpu|7b] [--sources 3] [--repeat 5]

Random models are made and saved in a temporary folder, or in `--folder`, where the next run finds
them. Plain steps (forward, backward to weights and activations) and fit steps run alternately in
this process.
"""

import copy
import gc
import math
import tempfile
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import transformers
import yaml
from mergekit.options import MergeOptions

from mergekit_dam import products
from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.batches import StepRows, collate
from mergekit_dam.fit.memory import free_memory
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import Fit, prepare
from mergekit_dam.fit.teachers import KeptTeachers
from tests import tiny
from tests.benchmarks.measuring import Step, alternate, machine, peak_of, table, taken

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
SAME = "a plain step with the fit's products"  # where these are others than torch's


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
@click.option("--layers", type=int, help="instead of the shape's own number")
@click.option("--folder", type=Path, help="where the models are kept")
@click.option("--mkl", is_flag=True, help="products as on other makers' processors")
@click.option("--only", default="", help="the steps of the fit whose names have this in them")
def main(
    shape, sources, base, rows, length, repeat, device, offload, cap, layers, folder, mkl, only
) -> None:
    if mkl:
        products.onednn_is_faster = lambda: False
    device = chosen(device, cap)
    config, dtype = told(shape, layers, sources, base, rows, length, device)
    with tempfile.TemporaryDirectory() as temporary:
        models, origin, ids = made(
            folder or Path(temporary), config, dtype, sources, base, rows, length, device
        )
        plain = {} if cap else plain_steps(models[0], torch.cat(ids), dtype, device)
        for where in offload:  # one at a time: the sources of two would not fit
            gc.collect()  # the last fit: its blocks and their model hold each other
            before = taken(device)
            fit = prepared(Path(temporary), models, origin, ids, dtype, device, where)
            own = steps_of(fit, Path(temporary), device, cap)
            own = {name: step for name, step in own.items() if only in name}
            print(measured(fit, plain, own, repeat, device, before))
            del fit, own


def measured(
    fit: Fit,
    plain: dict[str, Step],
    own: dict[str, Step],
    repeat: int,
    device: str,
    before: int = 0,  # bytes that others have on the device
) -> str:
    """The table of plain steps and the fit's. A fit that fetches its sources to a GPU has some of
    their blocks there, which count with its step; the others' sources do not."""
    is_fetched = device != "cpu" and fit.place.offload != "none"
    since = before if is_fetched else None
    sources = fit.place.sources - fit.place.waiting if is_fetched else 0
    peaks = {name: peak_of(step, device) for name, step in plain.items()}
    peaks |= {name: peak_of(step, device, since) for name, step in own.items()}
    predicted = {name: sources + fit.needs.with_code(mode_of(name)) for name in own}
    seconds = alternate(plain | own, repeat, device)
    return (
        f"{table(seconds, peaks, next(iter(seconds)), predicted)}\n"
        f"all sources in one pass: {fit.merged.mixes()}"
    )


def chosen(device: str | None, cap: float | None = None) -> str:
    """The device, held to `cap` GB of its memory."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cap and device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total)
    return device


def told(shape, layers, sources, base, rows, length, device):
    """The config and the dtype of the models, after a line about what is measured."""
    config, dtype = (
        copy.deepcopy(SHAPES[shape]),
        torch.float32 if device == "cpu" else torch.bfloat16,
    )
    config.num_hidden_layers = layers or config.num_hidden_layers
    others = " and a base" if base else ""
    what = f"{sources} x {rows} rows of {length} tokens{others}, {dtype}"
    print(f"{machine(device)}; {config.num_hidden_layers} layers; {what}")
    return config, dtype


def made(folder: Path, config, dtype, sources, base, rows, length, device):
    """The sources' folders, the base's or None, and rows of each source [rows, length]."""
    models = [save(folder / f"m{n}", config, n, dtype, device) for n in range(sources)]
    origin = save(folder / "base", config, sources, dtype, device) if base else None
    return models, origin, [torch.randint(4, config.vocab_size, (rows, length)) for _ in models]


def save(folder: Path, config, seed: int, dtype: torch.dtype, device: str = "cpu") -> Path:
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(seed)
    with torch.device(device):  # a CPU takes minutes for the numbers of 7B
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def plain_steps(
    folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: str
) -> dict[str, Step]:
    """Of one model; ratios are to the first."""
    step = plain_step(folder, ids, dtype, device)

    def same() -> None:
        with products.fast_products(torch.device(device)):
            step()

    return {PLAIN: step} | ({SAME: same} if device == "cpu" and products.onednn_is_faster() else {})


def plain_step(folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    ids = ids.to(device)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def prepared(folder: Path, models, base, ids, dtype: torch.dtype, device: str, offload: str) -> Fit:
    document = {
        "merge_method": "dam",
        "models": [{"model": str(model)} for model in models],
        **({"base_model": str(base)} if base else {}),
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dtype": str(dtype).removeprefix("torch."),
        "dam": {
            "data": [{"source": str(m), "path": "unused.txt"} for m in models],
            "batch_size": len(ids[0]),
            "max_length": ids[0].shape[1],
            "recompute": "block",
            "offload": offload,
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    data = [SourceData([Row(row) for row in rows.tolist()], []) for rows in ids]
    options = MergeOptions(quiet=True, num_threads=torch.get_num_threads())
    return prepare(read_recipe(str(folder / "config.yml")), options, device=device, data=data)


def steps_of(fit: Fit, folder: Path, device: str, cap: float | None = None) -> dict[str, Step]:
    """Those that fit into what is free."""
    free = min(free_memory(device), cap * 1e9 - fit.place.sources if cap else math.inf)
    kept = KeptTeachers(fit.merged, folder / "teachers", "")
    kept.keep([source.train for source in fit.data])
    stepped = StepRows(fit.data)
    items = [stepped[(number,) * len(fit.data)] for number in range(len(stepped))]
    inputs = {key: value.to(device) for key, value in collate(items).items()}
    offload = fit.settings.offload
    return {
        f"recompute: {mode}, teacher: {teacher}, offload: {offload}": _step(
            fit, mode, teach, inputs
        )
        for mode in (("block", "weights", "none") if offload == "none" else ("block", "weights"))
        for teacher, teach in (("live", None), ("cached", kept))
        if fit.needs.with_code(mode) < free and (mode, teacher) != ("none", "cached")
    }


def mode_of(name: str) -> str:
    return name.partition("recompute: ")[2].partition(",")[0]


def _step(fit: Fit, mode: str, teach: KeptTeachers | None, inputs: dict) -> Step:
    distillation = Distillation(fit.merged, Objective(), teach=teach)

    def step() -> None:
        fit.merged.recompute = mode
        distillation(**inputs)["loss"].backward()
        distillation.zero_grad()

    return step


if __name__ == "__main__":
    main()
