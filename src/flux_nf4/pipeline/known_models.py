"""The models that `pull` knows by name, and what any other name means.

Lengths and hashes are those of the published files. No revision is pinned by its commit: a file is
taken from `main`, and is the right one where its length and SHA-256 are.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass

from flux_nf4.errors import InputError

DEFAULT_REVISION = "main"
_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"
_SUFFIX = ".safetensors"
# What the Hub allows in the name of an owner or a repository.
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_FILE_PART = re.compile(r"[^\\/:*?\"<>|\x00-\x1f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where on the Hub a model lies, and what is known of it beforehand.

    No `file`: the whole model of a repository. `num_bytes` and `sha256` are that file's.
    """

    name: str
    repository: str
    file: str | None = None
    revision: str = DEFAULT_REVISION
    licence: str = ""
    num_bytes: int | None = None
    sha256: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether it is one of ours, and so does exist."""
        return any(each.repository == self.repository for each in KNOWN_MODELS)


KNOWN_MODELS = (
    ModelSource(
        name="flux1-dev-bnb-nf4-v2",
        repository="lllyasviel/flux1-dev-bnb-nf4",
        file="flux1-dev-bnb-nf4-v2.safetensors",
        licence=_DEV_LICENCE,
        num_bytes=12_044_280_207,
        sha256="fef37763b8f2c8cc3463139bbb6d91aa517c605b654d4e5c540de52813f30306",
    ),
    ModelSource(
        name="flux1-dev-bnb-nf4",
        repository="lllyasviel/flux1-dev-bnb-nf4",
        file="flux1-dev-bnb-nf4.safetensors",
        licence=_DEV_LICENCE,
        num_bytes=11_489_884_113,
        sha256="c5e25d12d720e30a277598ce9ded9db406ee54f63419fe0c801b283d4ea146e2",
    ),
    ModelSource(name="flux1-dev", repository="black-forest-labs/FLUX.1-dev", licence=_DEV_LICENCE),
    ModelSource(
        name="flux1-schnell", repository="black-forest-labs/FLUX.1-schnell", licence="Apache-2.0"
    ),
)


def find_source(name: str, *, revision: str | None = None) -> ModelSource:
    """What `name` means: a known model, `OWNER/REPO`, or `OWNER/REPO/FILE`.

    Another `revision` may hold other files: then nothing is known of them beforehand.

    Raises:
        InputError: no known name, and no such form.
    """
    source = _known(name) or _spelt_out(name)
    if revision is None or revision == source.revision:
        return source
    if not _FILE_PART.fullmatch(revision):
        raise InputError(f"`{revision}` is no revision", hint="name a branch, a tag or a commit")
    return dataclasses.replace(source, revision=revision, num_bytes=None, sha256=None)


def _known(name: str) -> ModelSource | None:
    plain = name.casefold().removesuffix(_SUFFIX)
    for source in KNOWN_MODELS:
        address = "/".join(filter(None, (source.repository, source.file)))
        if plain == source.name or name == address:
            return source
    return None


def _spelt_out(name: str) -> ModelSource:
    owner, *rest = name.split("/")
    if not rest:
        known = [source.name for source in KNOWN_MODELS]
        nearest = difflib.get_close_matches(name.casefold(), known, n=2, cutoff=0.0)
        raise InputError(
            f"no model is known by the name `{name[:80]}`",
            hint=f"the nearest are {' and '.join(f'`{each}`' for each in nearest)}; "
            "any other model of the Hub: `OWNER/REPO` or `OWNER/REPO/FILE`",
        )
    repository, file = f"{owner}/{rest[0]}", rest[1:]
    is_name = all(_is_repository_part(part) for part in (owner, rest[0]))
    if not is_name or not all(_FILE_PART.fullmatch(part) and part.strip(".") for part in file):
        raise InputError(
            f"`{name[:80]}` is neither `OWNER/REPO` nor `OWNER/REPO/FILE`",
            hint="of an address on the Hub, only what follows `huggingface.co/` is meant; a file "
            "that is here already needs no pull: `flux-nf4 info PATH`",
        )
    licence = next((each.licence for each in KNOWN_MODELS if each.repository == repository), "")
    return ModelSource(
        name=name, repository=repository, file="/".join(file) or None, licence=licence
    )


def _is_repository_part(part: str) -> bool:
    is_odd = "--" in part or ".." in part or part.endswith(".git") or len(part) > 96
    return bool(_PART.fullmatch(part)) and not is_odd
