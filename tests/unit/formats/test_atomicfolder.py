import pytest

from flux_nf4.errors import DiskError
from flux_nf4.formats.atomicfolder import atomic_folder


def test_a_folder_appears_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "new").exists()

    assert [each.name for each in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "1"


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old").write_text("0")
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")

    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a"]
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_and_nothing_is_lost_by_an_error(tmp_path, error):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old").write_text("0")

    def fail():
        with atomic_folder(tmp_path / "new") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()

    assert [each.name for each in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "old").read_text() == "0"


def test_a_missing_parent_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="could not write"), atomic_folder(tmp_path / "no" / "new"):
        pass
