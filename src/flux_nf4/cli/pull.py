"""`flux-nf4 pull`: fetch a model from the Hugging Face Hub, and check every byte of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flux_nf4.cli.byte_progress import ByteProgress
from flux_nf4.cli.console import print_data, print_json, print_note, print_plain, printable
from flux_nf4.cli.findings import counted, num_bytes_text
from flux_nf4.cli.options import argument, option
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import InputError
from flux_nf4.pipeline.known_models import KNOWN_MODELS, find_source

if TYPE_CHECKING:
    from flux_nf4.pipeline.hub import PullPlan

_NAMES = [source.name for source in KNOWN_MODELS]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """The options of `pull`."""

    name: str | None = argument(
        "NAME", help="a known name (see below), OWNER/REPO or OWNER/REPO/FILE"
    )
    revision: str | None = option(
        "--revision", metavar="REV", help="branch, tag or commit of the repository [main]"
    )
    dry_run: bool = option(
        "--dry-run", default=False, help="only say what would be fetched, and how large it is"
    )
    quiet: bool = option(
        "-q", "--quiet", default=False, help="print nothing but the path and errors", group="Output"
    )
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: PullOptions) -> int:
    """Fetch a model into huggingface_hub's cache, and print where it is."""
    if not options.name:
        raise InputError("no model is named", hint=f"known names: {', '.join(_NAMES)}")
    source = find_source(options.name, revision=options.revision)
    from flux_nf4.pipeline import hub

    if not options.debug:
        _silence_the_library()
    plan = hub.plan_pull(source)
    if not options.quiet:
        _announce(plan)
    if options.dry_run:
        _print_plan(plan, is_json=options.json)
        return 0
    with ByteProgress("fetching", plan.num_missing_bytes, quiet=options.quiet) as progress:
        path = hub.fetch(plan, on_bytes=progress.advance)
    with ByteProgress("checking", plan.num_bytes, quiet=options.quiet) as progress:
        hub.check(plan, path, on_bytes=progress.advance)
    if options.json:
        print_json({**_as_json(plan), "path": str(path)}, indent=2)
    else:
        print_data(str(path))
    return 0


def _silence_the_library() -> None:
    # Importing it has given its logger a handler of its own, so a level is what keeps it quiet.
    import huggingface_hub  # noqa: F401

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _announce(plan: PullPlan) -> None:
    source = plan.source
    if plan.is_offline:
        print_note("the Hub was not asked: this is what the cache holds")
    num_files = counted(len(plan.files), "file")
    missing = num_bytes_text(plan.num_missing_bytes) if plan.num_missing_bytes else "nothing"
    print_plain(
        f"{source.repository}: {num_files}, {num_bytes_text(plan.num_bytes)}; {missing} to fetch"
    )
    if plan.licence:
        print_note(f"its licence: {plan.licence}")


def _print_plan(plan: PullPlan, *, is_json: bool) -> None:
    if is_json:
        print_json({**_as_json(plan), "path": None}, indent=2)
        return
    for file in plan.files:
        state = "here" if file.is_cached else "to fetch"
        print_data(f"{file.num_bytes:>16,}  {state:<8}  {printable(file.name)}")


def _as_json(plan: PullPlan) -> dict[str, Any]:
    return {
        "name": plan.source.name,
        "repository": plan.source.repository,
        "revision": plan.source.revision,
        "commit": plan.commit,
        "licence": plan.licence,
        "bytes": plan.num_bytes,
        "bytes_to_fetch": plan.num_missing_bytes,
        "is_offline": plan.is_offline,
        "files": [
            {
                "name": file.name,
                "bytes": file.num_bytes,
                "digest": file.digest,
                "was_cached": file.is_cached,
            }
            for file in plan.files
        ],
    }


VERB = Verb(
    name="pull",
    summary="Fetch a model from the Hub, and check every byte.",
    options=PullOptions,
    run=run,
    examples=("flux1-dev-bnb-nf4-v2", "black-forest-labs/FLUX.1-schnell --dry-run"),
    note=(
        f"Known names: {', '.join(_NAMES)}.\n"
        "Its cache, login and offline mode are huggingface_hub's: HF_HOME, HF_TOKEN ..."
    ),
)
