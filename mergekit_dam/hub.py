"""Coefficient files on the Hugging Face Hub: `user/repo[@revision][/file]` instead of a path."""

import functools
import os
import re

from mergekit_dam.coefficients import CoefficientFile, open_file
from mergekit_dam.errors import DamError, in_one_line

DEFAULT_NAME = "dam.safetensors"
# A repository's name is two words; a path that begins with a dot, a slash or ~ is none.
REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^/\s]+))?(/(?P<file>\S+))?"
)


def parse(reference: str) -> tuple[str, str | None, str] | None:
    """(repository, revision, file), or None for what can be a local path alone.

    `runs/dam.safetensors` is a path: no repository is called after a file.
    """
    found = REFERENCE.fullmatch(reference)
    if found is None or found["repo"].endswith(".safetensors") or ".." in reference:
        return None
    return found["repo"], found["revision"], found["file"] or DEFAULT_NAME


def local_file(reference: str) -> str:
    """The path of a coefficient file: the reference itself where it is one, since a local path
    always wins; else the file is fetched from the Hub, once for each process.

    Raises DamError where the Hub has no such file, or cannot be asked.
    """
    if os.path.exists(reference) or (found := parse(reference)) is None:
        return reference
    return _fetch(reference, *found)


def open_coefficients(reference: str) -> CoefficientFile:
    """The reader of a local file or one on the Hub. Raises DamError for whatever is wrong."""
    return open_file(local_file(reference))


@functools.lru_cache(maxsize=8)
def _fetch(reference: str, repository: str, revision: str | None, name: str) -> str:
    from huggingface_hub import errors, hf_hub_download

    def refusal(reason: str) -> DamError:
        return DamError(
            f"The coefficient file {reference} does not exist here, and the Hub gives none "
            f"({reason}): check its name, or write it with `mergekit-dam fit CONFIG`."
        )

    try:
        return hf_hub_download(repository, name, revision=revision)
    except errors.LocalEntryNotFoundError:
        reason = "it cannot be reached, or this process is offline, and the cache has no copy"
    except errors.GatedRepoError:
        reason = f"{repository} is gated; ask for access there, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"no repository {repository}, or a private one; `hf auth login` shows yours"
    except errors.RevisionNotFoundError:
        reason = f"{repository} has no revision {revision}"
    except errors.EntryNotFoundError:
        reason = f"{repository} has no file {name}"
    except Exception as error:  # of the network, in whatever library it is met
        reason = in_one_line(error)
    raise refusal(reason) from None
