"""What huggingface_hub raises, as errors of ours: each with the next step.

Several of its classes inherit from `OSError`, and the one for "not in the cache" hides the reason
that it was not fetched; the order of the questions below is what keeps them apart.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flux_nf4.errors import (
    DiskError,
    FluxNF4Error,
    InputError,
    LicenceError,
    ModelNotFoundError,
    NetworkError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flux_nf4.pipeline.known_models import ModelSource

_AGAIN = "check the network (behind a proxy: set HTTPS_PROXY) and run the same again"


@contextlib.contextmanager
def explained(source: ModelSource) -> Iterator[None]:
    """A block that talks to the Hub about `source`, and raises errors of ours alone.

    Raises:
        InputError: huggingface_hub does not accept the name.
        LicenceError: a licence must be accepted, or a login is needed.
        ModelNotFoundError: no such repository, revision or file.
        NetworkError: the Hub could not be reached, or broke off, or is no Hub.
        DiskError: the cache could not be written.
    """
    from huggingface_hub import errors

    # The base of what the HTTP library raises: httpx's class, or in later versions httpx2's.
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"`{source.name}` is no name of the Hub: {_first_line(error)}") from error
    except (OSError, errors.EntryNotFoundError, transport_error) as error:
        raise explain(error, source) from error
    except RuntimeError as error:  # what the Xet client, a native library, raises
        raise NetworkError(f"the download failed: {_first_line(error)}", hint=_AGAIN) from error


def explain(error: BaseException, source: ModelSource) -> FluxNF4Error:
    """What `error`, raised by huggingface_hub, means for who asked for `source`."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return explain(error.__cause__, source)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return offline_error(source)
    if isinstance(error, errors.GatedRepoError):
        return _gated(source)
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"`{source.repository}` has no revision `{source.revision}`",
            hint="name a branch, a tag or a commit that it has, or leave `--revision` out",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, source)
    if isinstance(error, errors.FileMetadataError):
        return not_a_hub_error()
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return DiskError(
            f"could not write to the cache of downloads: {error.strerror or error}",
            hint="free some space there, or set HF_HOME to a folder on another disk",
        )
    return NetworkError(f"could not fetch from {endpoint()}: {_first_line(error)}", hint=_AGAIN)


def _refused(error: Exception, source: ModelSource) -> FluxNF4Error:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, errors.DisabledRepoError):
        return ModelNotFoundError(f"`{source.repository}` has been disabled on the Hub")
    # To somebody unknown the Hub says 401 of a repository that is private or is not there.
    if isinstance(error, errors.RepositoryNotFoundError) and not source.is_known:
        return ModelNotFoundError(
            f"the Hub shows no repository `{source.repository}`",
            hint=f"check the name; if it is private, {_login_step()}",
        )
    if status in {401, 403} or isinstance(error, errors.RepositoryNotFoundError):
        return LicenceError(
            f"the Hub refuses access to `{source.repository}` ({status})", hint=_login_step()
        )
    if status == 404:
        return ModelNotFoundError(f"`{source.repository}` has no file `{source.file}`")
    if status == 429:
        return NetworkError(
            "the Hub has had too many requests from here", hint="wait some minutes, or log in"
        )
    return NetworkError(f"{endpoint()} answered with status {status}", hint="try again later")


def _gated(source: ModelSource) -> LicenceError:
    login = "" if _has_token() else ", then `hf auth login`"
    return LicenceError(
        f"`{source.repository}` is only for those who have accepted its licence",
        hint=f"accept it at {endpoint()}/{source.repository}{login}, and run the same again",
    )


def offline_error(source: ModelSource) -> NetworkError:
    """Not all of `source` is in the cache, and nothing may be fetched."""
    return NetworkError(
        f"`{source.name}` is not in the cache of downloads, and huggingface_hub is set to be "
        "offline",
        hint="unset HF_HUB_OFFLINE where there is a network, and run the same again",
    )


def not_a_hub_error() -> NetworkError:
    """What answers is no Hub: a proxy's login page, say."""
    return NetworkError(
        f"what answers at {endpoint()} is not a Hugging Face Hub",
        hint="check HF_ENDPOINT, and whether a proxy or a login page stands in between",
    )


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, as huggingface_hub has read it."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _login_step() -> str:
    if _has_token():
        return "check that your token may read it: `hf auth whoami`, `hf auth login`"
    return "log in with `hf auth login`, or set HF_TOKEN"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
