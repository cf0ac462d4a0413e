"""Going on with a fit that was killed, and never with another one's checkpoints."""

import json
from pathlib import Path
from typing import Any

from mergekit_dam.errors import DamError
from mergekit_dam.fit.trainer import is_main_process, last_checkpoint


def find_checkpoint(folder: Path, identity: dict[str, Any], *, resume: bool) -> str | None:
    """The checkpoint to go on from. Raises DamError rather than lose or mix up an earlier fit."""
    record = folder / "fit.json"
    last = last_checkpoint(folder)
    if last is not None and not resume:
        raise DamError(
            f"{folder} holds checkpoints of a fit that was interrupted: continue it with "
            "--resume, or remove the folder to start over."
        )
    if last is not None:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = sorted(key for key in identity if identity[key] != earlier.get(key))
        if changed:
            raise DamError(
                f"{folder} was begun with other settings ({', '.join(changed)}): restore them to "
                "resume, or remove the folder to start over."
            )
        return last
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(identity), encoding="utf-8")
    return None
