"""A coefficient file on the Hub, with a card from which anybody rebuilds the merge."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mergekit_dam import card
from mergekit_dam.coefficients import CoefficientFile, Header, save
from mergekit_dam.errors import DamError, in_one_line
from mergekit_dam.hub import DEFAULT_NAME, parse
from mergekit_dam.output import MERGE_RECORD

README = "README.md"


@contextmanager
def staged(
    file: CoefficientFile, repository: str, names: Mapping[str, str]
) -> Iterator[tuple[Path, Header]]:
    """A folder with what will be published: coefficients, card and config.

    `names` says what models are called on the Hub. Every tensor is read, and so checked. Raises
    DamError for names that are none of the file's models.
    """
    require_name(repository)
    header = published(file.header, names)
    with tempfile.TemporaryDirectory(prefix="mergekit-dam-") as folder:
        path = Path(folder)
        save(path / DEFAULT_NAME, {name: file.get(name) for name in sorted(file.names)}, header)
        (path / README).write_text(card.of_file(header, repository), encoding="utf-8")
        config = yaml.safe_dump(card.rebuilding(header, repository), sort_keys=False)
        (path / MERGE_RECORD).write_text(config, encoding="utf-8")
        yield path, header


def require_name(repository: str) -> None:
    found = parse(repository)
    if found is None or found[0] != repository:
        raise DamError(
            f"{repository} is no name of a repository on the Hub: it has the form user/name."
        )


def published(header: Header, names: Mapping[str, str]) -> Header:
    """The header as others may see it: models by their names on the Hub, and of local files, of
    data and of the start, the name alone, since folders tell more than is needed."""
    models = [source.reference for source in (*header.sources, header.base) if source]
    models = list(dict.fromkeys([*models, *card.models_of_tokenizer(header)]))
    for name in names:
        if name not in (*models, header.merge.get("base_model")):
            raise DamError(f"{name} is none of the file's models: they are {', '.join(models)}.")
    fields = card.renamed(header.model_dump(mode="json"), names)
    for entry in fields["settings"].get("data") or ():
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and not card.is_hub_data(path):
            entry["path"] = os.path.basename(path.rstrip("/"))
    if isinstance(start := fields["settings"].get("start"), str):
        fields["settings"]["start"] = os.path.basename(start)
    return Header.model_validate(fields)


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository where there is none, and upload the folder; returns its address.

    Raises DamError where it holds a card that is not ours, and for whatever the Hub refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        _require_ours(api, repository)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Merge coefficients"
        )
    except DamError:
        raise
    except errors.LocalTokenNotFoundError:
        reason = "there is no token here: `hf auth login` stores one"
    except Exception as error:  # of the network, in whatever library it is met
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = in_one_line(error)
        if status in (401, 403):
            reason = "it refuses the token: `hf auth login` with one that may write there"
    else:
        return str(url)
    raise DamError(f"{repository} cannot be published ({reason}).")


def _require_ours(api: Any, repository: str) -> None:
    """A model's own card is not replaced by that of a coefficient file."""
    from huggingface_hub import ModelCard

    if not api.file_exists(repository, README):
        return
    tags = ModelCard.load(repository, ignore_metadata_errors=True).data.tags or []
    if card.FILE_TAG not in tags:
        raise DamError(
            f"{repository} has a README.md that is not of coefficients alone, so it is not "
            "replaced: give another repository."
        )
