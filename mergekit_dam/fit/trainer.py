"""transformers' Trainer around the objective: schedule, accumulation, clipping, checkpoints,
logging integrations and data parallelism come from there."""

import json
import math
import re
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from mergekit_dam.coefficients import Point
from mergekit_dam.config.settings import Settings
from mergekit_dam.errors import DamError, NotFiniteError, in_one_line
from mergekit_dam.fingerprint import is_sound
from mergekit_dam.fit.batches import ByLength, StepRows, collate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.optimizer import STEP, DifferencesAdamW, parameter_groups

SCHEDULES = {"constant": "constant_with_warmup"}  # the Trainer's `constant` has none
KEPT = 2  # checkpoints: the one before stays until the next is whole
POINTS = 100  # at most, of the loss curve that the file keeps
CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


class CoefficientTrainer(Trainer):
    """Logs every term of the loss beside the loss, and the tokens."""

    def __init__(
        self,
        *args,
        sources: Sequence[str],
        groups: Sequence[dict],  # of parameters, for the optimiser
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._groups = groups
        self._labels = labels(sources)
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens, self._since = 0, None

    def create_optimizer(self, model=None):
        """A schedule scales the learning rates of all groups."""
        if self.optimizer is None:
            _, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = DifferencesAdamW(self._groups, **arguments)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """A warm-up begins at 0, so that one of a single step would waste it."""
        if self.args.warmup_steps < 1:
            steps = int(self.args.warmup_steps * num_training_steps)
            self.args.warmup_steps = steps if steps > 1 else 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset=None):
        step = self.args.per_device_train_batch_size * self.args.world_size
        return ByLength(self.train_dataset.lengths, step, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._since = self._since or time.perf_counter()
        self._tokens += inputs["lengths"].sum()
        terms = model(**inputs)
        loss = terms.pop("loss")
        for name, value in terms.items():
            self._terms[name].append(value)
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            _require_finite(logs["loss"], self.state.global_step)
            logs = {**logs, **self._means(), **self._speed()}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Of each term since the last call, over all processes."""
        means = torch.stack([torch.stack(values).mean() for values in self._terms.values()])
        means = self.accelerator.gather(means[None]).mean(0)
        names = [self._labels.get(name.rpartition("_")[2]) for name in self._terms]
        names = [
            f"{name.rpartition('_')[0]}/{label}" if label else name
            for name, label in zip(self._terms, names, strict=True)
        ]
        self._terms.clear()
        return dict(zip(names, means.tolist(), strict=True))

    def _speed(self) -> dict[str, float]:
        """Real tokens so far, which a checkpoint keeps, and those of a second since the last
        call; over all processes."""
        now = time.perf_counter()
        tokens = int(self.accelerator.gather(self._tokens).sum())
        self.state.num_input_tokens_seen += tokens
        speed = tokens / (now - self._since)
        self._tokens, self._since = 0, now
        return {"tokens": self.state.num_input_tokens_seen, "tokens_per_second": speed}


def labels(sources: Sequence[str]) -> dict[str, str]:
    """The number that ends the name of a source's term -> the last part of the source's name,
    with its number where another source has the same."""
    short = [source.rstrip("/").rpartition("/")[2] for source in sources]
    return {
        str(number): name if short.count(name) == 1 else f"{name}-{number}"
        for number, name in enumerate(short, 1)
    }


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"The loss became {loss} at step {step}: lower `dam.learning_rate`, or look for NaN in "
            "the sources' weights. No coefficients were written."
        )


class _Bar(TrainerCallback):
    """A progress bar with the loss and the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Fitting")

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar.close()


def build_trainer(
    distillation: Distillation,
    rows: StepRows,
    settings: Settings,
    folder: Path,
    *,
    device: str,
    quiet: bool,
    sources: Sequence[str],
) -> CoefficientTrainer:
    """`folder` holds the checkpoints; `device` is "cpu" or "cuda"; `sources` are the names that
    the logs show. Raises DamError where the Trainer would take another device than the model's."""
    arguments, own = _arguments(settings, folder, device), distillation.merged.device
    # Under torchrun accelerate numbers the CPU, too.
    if arguments.device != own and not arguments.device.type == own.type == "cpu":
        raise DamError(
            f"The fit computes on {own}, and accelerate chose {arguments.device} for its Trainer: "
            "leave ACCELERATE_TORCH_DEVICE out, and start one process for each GPU."
        )
    trainer = CoefficientTrainer(
        model=distillation,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        sources=sources,
        groups=parameter_groups(distillation.merged, settings.learning_rate, settings.basis),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not quiet:
        trainer.add_callback(_Bar())
    return trainer


def integration_problems(names: Sequence[str]) -> Iterator[str]:
    """A sentence part for each of `dam.report_to` that the Trainer cannot log to."""
    if tuple(names) in (("all",), ("none",)):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            yield f"`dam.report_to` has {name!r}, which is none of {known}"
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            reason = in_one_line(error)
            yield f"`dam.report_to` has {name!r}, which is not installed ({reason}): install it"


def _arguments(settings: Settings, folder: Path, device: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.max_steps,
        num_train_epochs=settings.epochs or 1.0,
        learning_rate=settings.learning_rate or STEP,  # see `parameter_groups`
        lr_scheduler_type=SCHEDULES.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup,  # below 1: a share of all steps
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=KEPT,
        logging_steps=1,  # a mean over several steps would not survive a resumed fit
        logging_nan_inf_filter=False,  # it would show a NaN as zero
        ddp_find_unused_parameters=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )
    arguments.mixed_precision = "no"  # whatever `accelerate launch` says: see `compute_dtype`
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs by torchrun, not by DataParallel
    return arguments


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. Raises DamError where that cannot be seen."""
    try:
        whole = [path for path in checkpoints(folder) if is_whole(path)]
    except OSError as error:
        raise DamError(
            f"{error.filename or folder} cannot be read ({error.strerror}), from which a fit may "
            "go on: see to that, or remove the folder to start over."
        ) from error
    return str(whole[-1]) if whole else None


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones and others, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if match := CHECKPOINT.search(path.name):
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Whether all is there that a fit goes on with, and no half of it. The Trainer writes its state
    last, so a killed writer leaves a folder without it or with half of it; but a disk may have been
    full, and of several processes each writes its own random numbers, and may be killed alone (no
    step draws any, so those of one process are enough). Raises OSError where that cannot be seen.
    """
    numbers = list(checkpoint.glob("rng_state*.pth"))
    archives = [checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME, *numbers]
    return (
        _is_json(checkpoint / TRAINER_STATE_NAME)
        and is_sound(checkpoint / SAFE_WEIGHTS_NAME)
        and bool(numbers)
        and all(map(_is_zip, archives))
    )


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (FileNotFoundError, ValueError):
        return False


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return zipfile.is_zipfile(file)
    except FileNotFoundError:
        return False


def history(trainer: Trainer) -> tuple[Point, ...]:
    """The loss curve: means over at most `POINTS` windows of steps. Without the timings, since
    the same fit shall write the same file."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    width = max(1, -(-len(logs) // POINTS))
    windows = [logs[start : start + width] for start in range(0, len(logs), width)]
    return tuple(
        Point(step=window[-1]["step"], loss=sum(e["loss"] for e in window) / len(window))
        for window in windows
    )
