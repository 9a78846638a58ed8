import sqlite3
import stat

import pytest
from engines import make_spec

from flux_nf4.errors import DiskError, FormatError, InputError
from flux_nf4.server.jobs import Job
from flux_nf4.server.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def make_job(**more):
    return Job(make_spec(**more), owner="somebody", api="openai")


def write(path, *jobs):
    journal = Journal(path)
    for job in jobs:
        journal.add(job)
    journal.close()


def read(path):
    journal = Journal(path)
    jobs = journal.jobs()
    journal.close()
    return jobs


def test_a_job_comes_back_as_it_was(path):
    job = make_job(image=b"\x89PNG", mask_image=b"\x00\xff", prompt="größer \U0001f600")
    write(path, job)

    (back,) = read(path)
    assert (back.id, back.owner, back.api, back.spec) == (job.id, job.owner, job.api, job.spec)
    assert (back.state, back.created_at) == ("queued", job.created_at)


def test_jobs_come_back_in_their_order(path):
    jobs = [make_job(seed=seed) for seed in range(5)]
    write(path, *jobs)

    assert [job.id for job in read(path)] == [job.id for job in jobs]


def test_a_removed_job_does_not_come_back(path):
    journal, job = Journal(path), make_job()
    journal.add(job)
    journal.note(job, None)
    journal.close()

    assert read(path) == []


def test_attempts_are_kept(path):
    journal, job = Journal(path), make_job()
    journal.add(job)
    journal.note(job, 1)
    journal.close()

    assert read(path)[0].num_attempts == 1


def test_others_may_not_read_it(path):
    write(path, make_job())

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("data", [b"no database at all", b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_file_is_named_and_left_alone(path, data):
    path.write_bytes(data)

    with pytest.raises(FormatError, match=str(path)):
        Journal(path)
    assert path.read_bytes() == data


def test_a_journal_cut_in_the_middle_is_named_and_left_alone(path):
    write(path, *(make_job(prompt="x" * 3000) for _ in range(10)))
    data = path.read_bytes()[:12_288]
    path.write_bytes(data)

    with pytest.raises(FormatError, match=str(path)):
        Journal(path)
    assert path.read_bytes() == data


def test_the_database_of_another_program_is_left_alone(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE jobs (id TEXT)")
    connection.close()
    data = path.read_bytes()

    with pytest.raises(FormatError, match="no journal of flux-nf4"):
        Journal(path)
    assert path.read_bytes() == data


def test_a_row_that_is_no_job_is_named(path):
    job = make_job()
    write(path, job)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE jobs SET spec = '{}'")
    connection.commit()
    connection.close()

    with pytest.raises(FormatError, match=job.id):
        read(path)


def test_a_second_server_is_refused(path):
    journal = Journal(path)
    with pytest.raises(InputError, match="in use by another server"):
        Journal(path)
    journal.close()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DiskError, match="nowhere"):
        Journal(tmp_path / "nowhere" / "journal.sqlite")


def test_a_folder_is_no_journal(tmp_path):
    with pytest.raises(DiskError, match=str(tmp_path)):
        Journal(tmp_path)


def test_a_note_that_cannot_be_written_is_logged(path, caplog):
    journal, job = Journal(path), make_job()
    journal.add(job)
    journal._connection.execute("PRAGMA query_only = 1")
    journal.note(job, None)
    journal.close()

    assert "readonly" in caplog.text
