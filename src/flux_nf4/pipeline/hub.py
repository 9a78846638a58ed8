"""Models from the Hugging Face Hub: what is to be fetched, fetching it, and checking every byte.

huggingface_hub does the fetching, with its cache, its environment variables and its offline mode.
Its own check is of the length alone; here every file's hash is compared as well: SHA-256 where the
Hub keeps large files, Git's own hash for the small ones.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from flux_nf4 import __version__
from flux_nf4.errors import (
    DiskError,
    FluxNF4Error,
    FormatError,
    InputError,
    ModelNotFoundError,
    NetworkError,
)
from flux_nf4.pipeline.hub_check import check_file
from flux_nf4.pipeline.hub_errors import endpoint, explained, not_a_hub_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from huggingface_hub import ModelInfo

    from flux_nf4.pipeline.known_models import ModelSource

_INDEX = "model_index.json"
_WEIGHTS = ".safetensors"
# Folders of a Diffusers model that are of use here, and files in them; never a pickle.
_TEXT_FOLDERS = {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
_FOLDERS = _TEXT_FOLDERS | {"scheduler", "transformer", "vae"}
_SUFFIXES = frozenset({_WEIGHTS, ".json", ".txt", ".model"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file: `digest` is its SHA-256 (64 hexadecimal digits) or Git's hash of it (40)."""

    name: str
    num_bytes: int
    digest: str | None
    is_cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPlan:
    """What makes up a model at one commit, and which of it is here already.

    Offline, `files` are those of the cache, and nothing was asked of the Hub.
    """

    source: ModelSource
    commit: str
    files: tuple[RemoteFile, ...]
    licence: str = ""
    is_offline: bool = False

    @property
    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def num_missing_bytes(self) -> int:
        """The bytes of those files that are to be fetched."""
        return sum(file.num_bytes for file in self.files if not file.is_cached)


def plan_pull(source: ModelSource) -> PullPlan:
    """Ask the Hub what `source` is made of; without a network, the cache.

    Raises:
        InputError: the repository holds several models, or HF_ENDPOINT is no address.
        LicenceError: a licence must be accepted, or a login is needed.
        ModelNotFoundError: there is no such model.
        FormatError: the Hub's file is not the one that is known by this name.
        NetworkError: the Hub cannot be reached, and the cache does not hold the model.
    """
    _check_endpoint()
    try:
        info = _model_info(source)
    except NetworkError:
        plan = _plan_from_cache(source)
        if plan is None:
            raise
        return plan
    siblings = {each.rfilename: each for each in info.siblings or ()}
    names = _choose(list(siblings), source)
    files = []
    for name in names:
        lfs = siblings[name].lfs
        with explained(source):
            seen = _hub_download(source, name, dry_run=True)
        size = siblings[name].size
        files.append(
            RemoteFile(
                name=name,
                num_bytes=(seen.file_size or 0) if size is None else size,
                digest=lfs.sha256 if lfs else siblings[name].blob_id,
                is_cached=not seen.will_download,
            )
        )
    plan = PullPlan(
        source=source,
        commit=info.sha or "",
        files=tuple(files),
        licence=source.licence or _licence(info),
    )
    _check_known(plan)
    return plan


def fetch(plan: PullPlan, *, on_bytes: Callable[[int], None] = lambda _num_bytes: None) -> Path:
    """Fetch what is missing, and return the file, or the model's folder; `check` comes next.

    `on_bytes` is told of bytes as they arrive. What is complete stays in the cache, whatever
    happens to the rest.

    Raises:
        DiskError: the cache cannot hold or take it.
        LicenceError, ModelNotFoundError, NetworkError: as for `plan_pull`.
    """
    _check_free_space(plan)
    folder = Path()
    for file in plan.files:
        with explained(plan.source):
            found = _hub_download(
                plan.source, file.name, is_offline=plan.is_offline, on_bytes=on_bytes
            )
        folder = _folder_of(Path(found), file.name)
        if folder.name != plan.commit:
            raise NetworkError(
                f"`{plan.source.repository}` changed while it was being fetched",
                hint="run the same again",
            )
    return folder / plan.files[0].name if len(plan.files) == 1 else folder


def check(
    plan: PullPlan, path: Path, *, on_bytes: Callable[[int], None] = lambda _num_bytes: None
) -> None:
    """Compare every file of what `fetch` returned with its length and hash.

    `on_bytes` is told of bytes as they are read. A wrong file is removed from the cache.

    Raises:
        FormatError: a file is not what the Hub says it is.
        DiskError: a file cannot be read.
    """
    folder = _folder_of(path, plan.files[0].name) if len(plan.files) == 1 else path
    for file in plan.files:
        check_file(folder / file.name, file.name, file.num_bytes, file.digest, on_bytes=on_bytes)


class _Meter:
    """What huggingface_hub takes for a progress bar: it passes numbers of bytes on, and no more."""

    def __init__(self, on_bytes: Callable[[int], None], **settings: Any) -> None:
        self.on_bytes = on_bytes
        self.total = settings.get("total")
        self.n = 0
        self.update(settings.get("initial") or 0)

    def update(self, num_bytes: float | None = 1) -> None:
        self.n += int(num_bytes or 0)
        self.on_bytes(int(num_bytes or 0))

    def update_transfer(self, _num_bytes: float) -> None:
        # With it, the Xet client makes one bar of this kind, not a second for the raw transfer.
        pass

    def set_postfix_str(self, *_arguments: object, **_settings: object) -> None:
        pass

    set_transfer_postfix_str = refresh = close = set_postfix_str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass


def _hub_download(
    source: ModelSource,
    name: str,
    *,
    dry_run: bool = False,
    is_offline: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Any:
    from huggingface_hub import hf_hub_download

    class Meter(_Meter):
        def __init__(self, *_arguments: object, **settings: Any) -> None:
            super().__init__(on_bytes or (lambda _num_bytes: None), **settings)

    return hf_hub_download(
        source.repository,
        name,
        # The name of the revision, not its commit: so other programs find it in the cache too.
        revision=source.revision,
        dry_run=dry_run,
        local_files_only=is_offline,
        tqdm_class=Meter,
        library_name="flux-nf4",
        library_version=__version__,
    )


def _check_endpoint() -> None:
    try:
        parts = urlsplit(endpoint())
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(
            f"HF_ENDPOINT is no address: `{endpoint()[:80]}`",
            hint="unset it, or set it to something like https://huggingface.co",
        )


def _model_info(source: ModelSource) -> ModelInfo:
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=endpoint(), library_name="flux-nf4", library_version=__version__)
    try:
        with explained(source):
            return api.model_info(
                source.repository,
                revision=source.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
    except FluxNF4Error:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_a_hub_error() from error


def _choose(names: Sequence[str], source: ModelSource) -> list[str]:
    """The files that make up the model.

    Raises:
        ModelNotFoundError: there are none.
        InputError: there are several models.
    """
    if source.file is not None:
        if source.file in names:
            return [source.file]
        raise ModelNotFoundError(
            f"`{source.repository}` has no file `{source.file}`",
            hint=f"its checkpoints: {_listed(_weights_at_root(names))}",
        )
    if _INDEX in names:
        return [name for name in names if _belongs_to_diffusers(name)]
    weights = _weights_at_root(names)
    if not weights:
        raise ModelNotFoundError(
            f"`{source.repository}` holds no .safetensors file and no Diffusers folder",
            hint="only these two can be opened, never a pickle",
        )
    if len(weights) > 1:
        raise InputError(
            f"`{source.repository}` holds {len(weights)} checkpoints: {_listed(weights)}",
            hint=f"name one: `flux-nf4 pull {source.repository}/{weights[0]}`",
        )
    return weights


def _belongs_to_diffusers(name: str) -> bool:
    folder, slash, file = name.partition("/")
    is_of_use = PurePosixPath(file).suffix in _SUFFIXES and "/" not in file
    return name == _INDEX or (bool(slash) and folder in _FOLDERS and is_of_use)


def _weights_at_root(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_WEIGHTS) and "/" not in name)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"


def _licence(info: ModelInfo) -> str:
    card = info.card_data
    return str((card and (card.get("license_name") or card.get("license"))) or "")


def _check_known(plan: PullPlan) -> None:
    source, file = plan.source, plan.files[0]
    if source.sha256 is None or (file.num_bytes, file.digest) == (source.num_bytes, source.sha256):
        return
    raise FormatError(
        f"`{file.name}` on the Hub is not the file that is known by this name: "
        f"{file.num_bytes:,} bytes, not {source.num_bytes:,}; sha256 {file.digest}",
        hint=f"nothing was fetched; if you trust it, name its commit: `--revision {plan.commit}`",
    )


def _plan_from_cache(source: ModelSource) -> PullPlan | None:
    """The plan where all of the model is in the cache; None where it is not."""
    from huggingface_hub import try_to_load_from_cache

    name = source.file or _INDEX
    found = try_to_load_from_cache(source.repository, name, revision=source.revision)
    if not isinstance(found, str):
        return None
    first = Path(found)
    folder = _folder_of(first, name)
    if source.file is None and not _is_complete(folder):
        return None
    names = [name] if source.file else _files_in(folder)
    return PullPlan(
        source=source,
        commit=folder.name,
        files=tuple(
            RemoteFile(
                name=each,
                num_bytes=source.num_bytes or (folder / each).stat().st_size,
                digest=source.sha256,
                is_cached=True,
            )
            for each in names
        ),
        licence=source.licence,
        is_offline=True,
    )


def _files_in(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return [name for name in names if _belongs_to_diffusers(name)]


def _is_complete(folder: Path) -> bool:
    """Whether a folder of the cache holds a whole model: it may be what a broken-off pull left."""
    from flux_nf4.formats.checkpoint import open_checkpoint

    try:
        open_checkpoint(folder).require_complete()
    except FluxNF4Error:
        return False
    return True


def _folder_of(path: Path, name: str) -> Path:
    """The snapshot that `path` lies in, being its file `name`."""
    return path.parents[name.count("/")]


def _check_free_space(plan: PullPlan) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    nearest = next(each for each in (cache, *cache.parents) if each.exists())
    num_free = shutil.disk_usage(nearest).free
    if num_free < plan.num_missing_bytes:
        raise DiskError(
            f"`{nearest}` has {num_free / 1e9:,.1f} GB free; the download needs "
            f"{plan.num_missing_bytes / 1e9:,.1f} GB",
            hint="free some space there, or set HF_HOME to a folder on another disk",
        )
