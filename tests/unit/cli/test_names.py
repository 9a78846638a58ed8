from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.cli.names import plan_destination, slug, store
from flux_nf4.errors import DiskError, InputError

VALUES = {"prompt": "a-dog", "seed": 7, "index": 2, "date": "2026-11-23", "model": "flux"}


def path_for(output, num_images=1):
    return str(plan_destination(output, num_images).path(VALUES))


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (None, "outputs/a-dog-7.png"),
        ("cat.png", "cat.png"),
        ("CAT.PNG", "CAT.PNG"),
        ("new/cat.png", "new/cat.png"),
        ("pictures", "pictures/a-dog-7.png"),
        ("pictures/", "pictures/a-dog-7.png"),
        ("v1.5", "v1.5/a-dog-7.png"),
        ("{index}", "2.png"),
        ("{index:04}.png", "0002.png"),
        ("{date}/{model}-{prompt}-{seed}.png", "2026-11-23/flux-a-dog-7.png"),
        ("{prompt}/", "a-dog/a-dog-7.png"),
        ("{{{seed}}}.png", "{7}.png"),
    ],
)
def test_an_output_names_this_file(output, path):
    assert path_for(output) == path


def test_a_folder_that_is_there_may_end_like_a_file(folder):
    (folder / "odd.png").mkdir()

    assert path_for("odd.png") == "odd.png/a-dog-7.png"


def test_only_an_exact_name_is_replaced():
    assert [plan_destination(each, 1).replaces for each in ("cat.png", "cats", "{seed}.png")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "`--output` is empty"),
        ("a\0b", "no path at all"),
        ("cat.jpg", "written as PNG, not as `.jpg`"),
        ("{seed}.webp", "written as PNG, not as `.webp`"),
        ("{sead}.png", "unknown field `{sead}`"),
        ("-", "not written to standard output"),
        ("{}.png", "unknown field `{}`"),
        ("{seed.png", "is not a template"),
        ("{prompt.__class__}.png", "unknown field"),
        ("{prompt!r}.png", "does not suit"),
        ("{prompt:>99}.png", "does not suit"),
        ("{seed:999999999}.png", "does not suit"),
        ("{index:{seed}}.png", "does not suit"),
    ],
)
def test_an_output_that_cannot_be_is_refused(output, said):
    with pytest.raises(InputError) as caught:
        plan_destination(output, 1)

    assert said in caught.value.message


def test_an_unknown_field_is_told_the_nearest():
    with pytest.raises(InputError) as caught:
        plan_destination("{sead}.png", 1)

    assert "`{seed}`" in str(caught.value.hint)


def test_one_file_cannot_take_several_images():
    with pytest.raises(InputError, match="is one file, but 4 images") as caught:
        plan_destination("cat.png", 4)

    assert "cat-{index}.png" in str(caught.value.hint)


def test_a_file_in_a_folders_place_is_a_disk_error(folder):
    (folder / "taken").write_text("")

    with pytest.raises(DiskError, match="`taken` is not a folder"):
        plan_destination("taken/cat.png", 1)


def test_a_device_in_a_files_place_is_refused_before_drawing(folder):
    (folder / "cat.png").symlink_to("/dev/null")

    with pytest.raises(InputError, match=r"`cat\.png` is not a regular file"):
        plan_destination("cat.png", 1)


def test_a_folder_that_cannot_be_written_is_a_disk_error(folder, monkeypatch):
    (folder / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere

    with pytest.raises(DiskError, match="no permission to write to `locked`"):
        plan_destination("locked/cat.png", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red  Apple, 4k!", "a-red-apple-4k"),
        ("../../etc/passwd", "etc-passwd"),
        ("..\\..\\windows", "windows"),
        ("", "image"),
        ("???", "image"),
        ("红苹果", "红苹果"),
        ("a_b", "a-b"),
        ("x" * 500, "x" * 60),
        ("fin" + "\ufb01", "finfi"),
    ],
)
def test_a_slug_is_safe_and_legible(text, expected):
    assert slug(text) == expected


@given(st.text(max_size=300))
def test_no_prompt_leads_to_another_folder(text):
    name = slug(text)

    assert Path(name).name == name
    assert name not in {"", ".", ".."}
    assert len(name.encode()) <= 150


def write_text(text):
    return lambda path: path.write_text(text)


def test_a_name_that_is_taken_gets_a_number(folder):
    names = [store(write_text(str(n)), folder / "a.png", replaces=False) for n in range(3)]

    assert [name.name for name in names] == ["a.png", "a-2.png", "a-3.png"]
    assert [name.read_text() for name in names] == ["0", "1", "2"]


def test_a_dangling_link_is_a_name_that_is_taken(folder):
    (folder / "a.png").symlink_to(folder / "nowhere")

    assert store(write_text("1"), folder / "a.png", replaces=False).name == "a-2.png"


def test_a_disk_without_links_works_too(folder, monkeypatch):
    def no_links(source, target):
        raise PermissionError(1, "not here")

    monkeypatch.setattr("os.link", no_links)
    names = [store(write_text(str(n)), folder / "a.png", replaces=False) for n in range(2)]

    assert [name.read_text() for name in names] == ["0", "1"]


def test_an_exact_name_is_replaced(folder):
    store(write_text("1"), folder / "a.png", replaces=True)
    store(write_text("2"), folder / "a.png", replaces=True)

    assert [path.read_text() for path in folder.iterdir()] == ["2"]


def test_what_could_not_be_written_leaves_nothing(folder):
    def fail(path):
        path.write_text("half")
        raise DiskError(f"could not write `{path}`: no space")

    with pytest.raises(DiskError, match=r"a\.png`: no space$") as caught:
        store(fail, folder / "a.png", replaces=False)

    assert ".tmp" not in caught.value.message
    assert list(folder.iterdir()) == []
