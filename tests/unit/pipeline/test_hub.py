import errno
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
from checkpoints import save_diffusers_folder
from hub_server import OTHER_COMMIT, Repository, serving, sha256

from flux_nf4.errors import (
    DiskError,
    FluxNF4Error,
    FormatError,
    InputError,
    LicenceError,
    ModelNotFoundError,
    NetworkError,
)
from flux_nf4.pipeline import hub as hub_module
from flux_nf4.pipeline.hub import check, fetch, plan_pull
from flux_nf4.pipeline.hub_errors import explain
from flux_nf4.pipeline.known_models import KNOWN_MODELS, ModelSource, find_source

DATA = bytes(range(256)) * 400
FILE = "model.safetensors"
CONFIG = b'{"a": 1}'
DIFFUSERS = {
    "model_index.json": CONFIG,
    "vae/config.json": b'{"b": 1}',
    "vae/diffusion_pytorch_model.safetensors": DATA,
    "tokenizer_2/spiece.model": b"words",
}
NOT_WANTED = {
    "flux1-dev.safetensors": DATA,
    "vae/weights.bin": b"pickle",
    "vae/deeper/config.json": CONFIG,
    "picture/config.json": CONFIG,
    "README.md": b"# a",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub with one repository, which holds one checkpoint."""
    # The library waits between its attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(monkeypatch, tmp_path) as server:
        server.repositories["owner/repo"] = Repository({FILE: DATA, "README.md": b"# a"})
        yield server


@pytest.fixture
def cache(tmp_path):
    """Where huggingface_hub keeps what it fetches."""
    return tmp_path / "cache"


def pull(name="owner/repo", **settings):
    plan = plan_pull(find_source(name, **settings) if isinstance(name, str) else name)
    path = fetch(plan)
    check(plan, path)
    return path


def contents(cache):
    """The files that pass for whole ones; some versions keep parts, under a name that says so."""
    return [path.name for path in cache.rglob("blobs/*") if path.suffix != ".incomplete"]


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.name)
def test_a_known_model_is_found_by_its_name_and_by_its_address(known):
    address = "/".join(filter(None, (known.repository, known.file)))

    assert find_source(known.name) == find_source(known.name.upper()) == known
    assert find_source(address) == known


def test_the_suffix_of_a_known_file_may_be_there():
    assert find_source("flux1-dev-bnb-nf4-v2.safetensors").num_bytes == 12_044_280_207


def test_known_hashes_are_not_asked_of_another_revision():
    source = find_source("flux1-dev-bnb-nf4", revision="old")

    assert (source.revision, source.num_bytes, source.sha256) == ("old", None, None)


def test_any_file_of_a_known_repository_has_its_licence():
    source = find_source("black-forest-labs/FLUX.1-dev/flux1-dev.safetensors")

    assert source.licence == find_source("flux1-dev").licence


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(InputError, match="`flux-dev-nf4-v2`") as caught:
        find_source("flux-dev-nf4-v2")

    assert "`flux1-dev-bnb-nf4-v2`" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "a/", "/etc/passwd", "./a.safetensors", "a/b/", "a/b//c", "a/../b", "a/b/../c"),
        *(
            "a/b/..",
            "a b/c",
            "a/b\0",
            "a/b/c\nd",
            "-a/b",
            "a--b/c",
            "a/b.git",
            "~/model",
            "a/b/c:d",
        ),
        *("https://huggingface.co/a/b", "ä/b", "a" * 97 + "/b"),
    ],
)
def test_what_can_be_no_name_is_refused(name):
    with pytest.raises(InputError):
        find_source(name)


@pytest.mark.parametrize("revision", ["", "a/b", "a\0b"])
def test_what_can_be_no_revision_is_refused(revision):
    with pytest.raises(InputError, match="revision"):
        find_source("owner/repo", revision=revision)


# ---- fetching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/repo", f"owner/repo/{FILE}"])
def test_a_checkpoint_arrives_byte_for_byte(hub, name):
    path = pull(name)

    assert (path.name, path.read_bytes()) == (FILE, DATA)


def test_nothing_is_fetched_twice(hub):
    first = pull()
    num_transfers = len(hub.transfers())

    assert pull() == first
    assert len(hub.transfers()) == num_transfers


def test_a_plan_fetches_nothing_and_says_how_large_it_is(hub, cache):
    plan = plan_pull(find_source("owner/repo"))

    assert (plan.num_bytes, plan.num_missing_bytes) == (len(DATA), len(DATA))
    assert (hub.transfers(), contents(cache)) == ([], [])


def test_a_plan_knows_what_is_here(hub):
    pull()
    plan = plan_pull(find_source("owner/repo"))

    assert (plan.num_bytes, plan.num_missing_bytes) == (len(DATA), 0)


def test_the_licence_is_read_from_the_card(hub):
    hub.repositories["owner/repo"].card = {"license": "other", "license_name": "flux-1"}

    assert plan_pull(find_source("owner/repo")).licence == "flux-1"


def test_every_byte_is_reported_once(hub):
    fetched, checked = [], []
    plan = plan_pull(find_source("owner/repo"))
    path = fetch(plan, on_bytes=fetched.append)
    check(plan, path, on_bytes=checked.append)

    assert (sum(fetched), sum(checked)) == (len(DATA), len(DATA))


def test_the_bytes_of_the_xet_client_are_reported_once():
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    reported = []

    class Meter(hub_module._Meter):
        def __init__(self, **settings):
            super().__init__(reported.append, **settings)

    with XetDownloadProgressReporter(
        reconstruction_desc="", total=10, log_level=30, tqdm_class=Meter
    ) as reporter:
        for done in (4, 10):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes_completed=done,
                    total_transfer_bytes_completed=done // 2,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                    total_bytes=10,
                )
            )

    assert sum(reported) == 10


def test_a_diffusers_model_comes_without_what_is_of_no_use(hub):
    hub.repositories["owner/repo"] = Repository(DIFFUSERS | NOT_WANTED)
    folder = pull()
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}

    assert files == DIFFUSERS


def test_a_repository_of_several_checkpoints_asks_for_one(hub):
    hub.repositories["owner/repo"].files["other.safetensors"] = DATA

    with pytest.raises(InputError, match=r"`model\.safetensors`, `other\.safetensors`") as caught:
        plan_pull(find_source("owner/repo"))
    assert "flux-nf4 pull owner/repo/model.safetensors" in caught.value.hint


def test_a_pickle_is_no_model(hub):
    hub.repositories["owner/repo"] = Repository({"model.ckpt": DATA})

    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors"):
        plan_pull(find_source("owner/repo"))


def test_the_cache_is_of_use_to_other_programs(hub):
    from huggingface_hub import hf_hub_download

    path = pull()

    assert hf_hub_download("owner/repo", FILE, local_files_only=True) == str(path)


# ---- a line that breaks -------------------------------------------------------------------------


def test_a_transfer_that_breaks_goes_on_where_it_was(hub, monkeypatch):
    # Of what arrived, the library keeps whole chunks; its own are of 10 MB.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after = [50_000]
    path = pull()
    ranges = [each.range for each in hub.transfers()]

    assert path.read_bytes() == DATA
    assert ranges == [None, "bytes=50000-"]


def test_a_line_that_keeps_breaking_is_a_network_error_and_leaves_nothing(hub, cache):
    hub.break_after = [0] * 9

    with pytest.raises(NetworkError, match="could not fetch"):
        pull()
    assert contents(cache) == []


def test_what_is_complete_is_kept_when_the_rest_fails(hub):
    hub.repositories["owner/repo"] = Repository(DIFFUSERS)
    hub.break_after = [0] * 9
    with pytest.raises(NetworkError):
        pull()
    plan = plan_pull(find_source("owner/repo"))

    assert 0 < plan.num_missing_bytes < plan.num_bytes


# ---- bytes that are not right -------------------------------------------------------------------


def test_a_flipped_bit_is_found_and_its_file_removed(hub, cache):
    hub.corrupts = True
    with pytest.raises(FormatError, match=f"`{FILE}` is damaged"):
        pull()

    assert contents(cache) == []


def test_after_a_flipped_bit_the_next_attempt_is_whole(hub):
    hub.corrupts = True
    with pytest.raises(FormatError):
        pull()
    hub.corrupts = False

    assert pull().read_bytes() == DATA


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:-1] + b"x", b""])
def test_damage_in_the_cache_is_found(hub, data):
    pull().resolve().write_bytes(data)

    with pytest.raises(FormatError, match="removed from the cache") as caught:
        pull()
    assert caught.value.message.startswith(f"`{FILE}` is damaged")


def test_small_files_are_checked_too(hub):
    hub.repositories["owner/repo"] = Repository(DIFFUSERS)
    (pull() / "vae/config.json").resolve().write_bytes(b'{"b": 2}')

    with pytest.raises(FormatError, match=r"`vae/config\.json` is damaged"):
        pull()


def known(**changes):
    values = {"num_bytes": len(DATA), "sha256": sha256(DATA)} | changes
    return ModelSource(name="known", repository="owner/repo", file=FILE, **values)


def test_the_file_that_is_known_by_a_name_is_taken(hub):
    assert pull(known()).read_bytes() == DATA


@pytest.mark.parametrize("changes", [{"num_bytes": 7}, {"sha256": "0" * 64}])
def test_another_file_under_a_known_name_is_not_fetched(hub, changes):
    with pytest.raises(FormatError, match="not the file that is known"):
        pull(known(**changes))

    assert hub.transfers() == []


def test_a_repository_that_changes_meanwhile_is_noticed(hub):
    plan = plan_pull(find_source("owner/repo"))
    hub.repositories["owner/repo"].commit = OTHER_COMMIT

    with pytest.raises(NetworkError, match="changed"):
        fetch(plan)


# ---- access -------------------------------------------------------------------------------------


def test_a_gated_model_without_a_login_says_both_steps(hub):
    hub.repositories["owner/repo"].is_gated = True

    with pytest.raises(LicenceError, match="licence") as caught:
        plan_pull(find_source("owner/repo"))
    assert f"{hub.url}/owner/repo" in caught.value.hint
    assert "`hf auth login`" in caught.value.hint


def test_a_gated_model_with_a_login_says_the_step_that_is_left(hub, monkeypatch):
    hub.repositories["owner/repo"].is_gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")

    with pytest.raises(LicenceError, match="licence") as caught:
        plan_pull(find_source("owner/repo"))
    assert f"{hub.url}/owner/repo" in caught.value.hint
    assert "login" not in caught.value.hint


@pytest.mark.parametrize("kind", ["is_gated", "is_private"])
def test_who_may_read_a_model_gets_it(hub, monkeypatch, kind):
    hub.repositories["owner/repo"].accepted = {"hf_me"}
    setattr(hub.repositories["owner/repo"], kind, True)
    monkeypatch.setenv("HF_TOKEN", "hf_me")

    assert pull().read_bytes() == DATA


def test_the_token_does_not_go_to_the_storage(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    pull()

    assert {each.token for each in hub.transfers()} == {None}
    assert "hf_me" in {each.token for each in hub.requests}


def test_a_known_repository_that_is_not_shown_needs_a_login(hub):
    with pytest.raises(LicenceError, match="refuses") as caught:
        plan_pull(find_source("flux1-dev"))

    assert "`hf auth login`" in caught.value.hint


@pytest.mark.parametrize("token", ["hf_somebody", None])
def test_a_repository_that_is_not_shown_is_not_found(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(ModelNotFoundError, match="`owner/other`") as caught:
        plan_pull(find_source("owner/other"))
    assert "private" in caught.value.hint


def test_a_file_that_is_not_there_is_told_what_is(hub):
    with pytest.raises(ModelNotFoundError, match=r"no file `modle\.safetensors`") as caught:
        plan_pull(find_source("owner/repo/modle.safetensors"))

    assert f"`{FILE}`" in caught.value.hint


def test_a_revision_that_is_not_there_is_not_found(hub):
    with pytest.raises(ModelNotFoundError, match="no revision `v9`"):
        plan_pull(find_source("owner/repo", revision="v9"))


def test_a_commit_can_be_named(hub):
    commit = hub.repositories["owner/repo"].commit

    assert pull("owner/repo", revision=commit).read_bytes() == DATA


# ---- no network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, NetworkError), (429, NetworkError), (500, NetworkError), (503, NetworkError)),
        *((401, LicenceError), (403, LicenceError), (404, ModelNotFoundError)),
    ],
)
def test_a_refusal_is_an_error_of_its_kind(hub, status, kind):
    hub.status = status

    with pytest.raises(FluxNF4Error) as caught:
        plan_pull(find_source("owner/repo"))
    assert type(caught.value) is kind


def test_a_login_page_is_no_hub(hub):
    hub.says_html = True

    with pytest.raises(NetworkError, match="not a Hugging Face Hub"):
        plan_pull(find_source("owner/repo"))


def go_away(hub, monkeypatch, how):
    from huggingface_hub import constants

    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        # A port on which nobody listens.
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
        )


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_without_a_network_the_cache_is_enough(hub, monkeypatch, how):
    first = pull(f"owner/repo/{FILE}")
    go_away(hub, monkeypatch, how)

    assert plan_pull(find_source(f"owner/repo/{FILE}")).is_offline
    assert pull(f"owner/repo/{FILE}") == first


@pytest.mark.parametrize(
    ("how", "said"), [("offline", "set to be offline"), ("unreachable", "could not fetch from")]
)
def test_without_network_and_cache_it_is_a_network_error(hub, monkeypatch, how, said):
    go_away(hub, monkeypatch, how)

    with pytest.raises(NetworkError, match=said):
        plan_pull(find_source("owner/repo"))


def test_without_a_network_damage_is_found_by_the_name_in_the_cache(hub, monkeypatch):
    pull().resolve().write_bytes(DATA[:-1] + b"x")
    go_away(hub, monkeypatch, "offline")

    with pytest.raises(FormatError, match="is damaged"):
        pull(f"owner/repo/{FILE}")


@pytest.fixture(scope="module")
def diffusers_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    save_diffusers_folder(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_without_a_network_a_whole_diffusers_model_is_found(hub, monkeypatch, diffusers_files):
    hub.repositories["owner/repo"] = Repository(diffusers_files)
    first = pull()
    go_away(hub, monkeypatch, "offline")

    assert pull() == first


def test_without_a_network_part_of_a_diffusers_model_is_not_taken_for_it(
    hub, monkeypatch, diffusers_files
):
    hub.repositories["owner/repo"] = Repository(diffusers_files)
    (pull() / "vae/diffusion_pytorch_model.safetensors").unlink()
    go_away(hub, monkeypatch, "offline")

    with pytest.raises(NetworkError, match="not in the cache"):
        pull()


@pytest.mark.parametrize("address", ["", "hub", "ftp://hub", "http://", "http://[", "http://a:b"])
def test_an_endpoint_that_is_no_address_is_refused(hub, monkeypatch, address):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)

    with pytest.raises(InputError, match="HF_ENDPOINT"):
        plan_pull(find_source("owner/repo"))


# ---- the disk -----------------------------------------------------------------------------------


def test_too_little_space_is_noticed_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))

    with pytest.raises(DiskError, match="GB free") as caught:
        pull()
    assert "HF_HOME" in caught.value.hint
    assert hub.transfers() == []


def test_a_disk_that_takes_no_more_is_a_disk_error_and_leaves_nothing(hub, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plan = plan_pull(find_source("owner/repo"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError, match="could not write"):
            fetch(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(cache) == []


def test_a_cache_that_is_no_folder_is_a_disk_error(hub, cache):
    cache.write_text("a file")

    with pytest.raises(DiskError, match="could not write"):
        pull()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_fault_of_the_disk_is_told_with_a_remedy(number):
    error = explain(OSError(number, os.strerror(number)), find_source("owner/repo"))

    assert type(error) is DiskError
    assert os.strerror(number) in error.message
    assert "HF_HOME" in error.hint
