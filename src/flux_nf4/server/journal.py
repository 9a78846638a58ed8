"""The jobs that are not finished, in a file, so that a server that comes back goes on with them.

SQLite in WAL mode. Each change is on the disk before the call returns: a job that was accepted is
not lost with the power. One server at a time: the file is locked as long as it is open.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from typing import TYPE_CHECKING, TypeVar

from flux_nf4.errors import DiskError, FluxNF4Error, FormatError, InputError
from flux_nf4.server.jobs import UPLOADS, Job, JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_APPLICATION_ID = 0x464E4634  # "FNF4", in the file's header
# Uploads apart: a change in a row writes all of it.
_TABLES = """
CREATE TABLE IF NOT EXISTS uploads (
    job_id TEXT NOT NULL,
    name TEXT NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job_id, name)
);
CREATE TABLE IF NOT EXISTS jobs (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    api TEXT NOT NULL,
    created_at REAL NOT NULL,
    num_attempts INTEGER NOT NULL,
    spec TEXT NOT NULL
);
"""


class Journal:
    """An open journal.

    Raises:
        FormatError: the file is no journal, or damaged; it stays as it is.
        InputError: another server has it open.
        DiskError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_failed = False
        try:
            if not path.exists():
                path.touch(mode=0o600)  # it will hold prompts
            self._connection = sqlite3.connect(
                path, isolation_level=None, timeout=0, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise DiskError(f"the journal `{path}` cannot be opened: {error}") from error
        try:
            self._guarded(self._open)
        except FluxNF4Error:
            self._connection.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    def add(self, job: Job) -> None:
        """Keep a new job.

        Raises:
            DiskError: it could not be written.
        """
        spec = json.dumps(job.spec.to_dict())
        row = (job.id, job.owner, job.api, job.created_at, job.num_attempts, spec)
        columns = "(id, owner, api, created_at, num_attempts, spec)"
        self._write(
            (f"INSERT INTO jobs {columns} VALUES (?, ?, ?, ?, ?, ?)", row),
            *(
                ("INSERT INTO uploads (job_id, name, data) VALUES (?, ?, ?)", (job.id, name, data))
                for name, data in job.spec.uploads.items()
            ),
        )

    def note(self, job: Job, num_attempts: int | None) -> None:
        """Write down how often a job was begun, or (None) that it is finished.

        Where that fails it is logged: at worst a job is drawn again after a restart.
        """
        try:
            if num_attempts is None:
                self._write(
                    ("DELETE FROM jobs WHERE id = ?", (job.id,)),
                    ("DELETE FROM uploads WHERE job_id = ?", (job.id,)),
                )
            else:
                change = "UPDATE jobs SET num_attempts = ? WHERE id = ?"
                self._write((change, (num_attempts, job.id)))
        except DiskError:
            _log.exception("job %s cannot be noted", job.id)

    def is_writable(self) -> bool:
        """Whether the last write went well; where it did not, whether one does now."""
        if self._has_failed:
            insert = "INSERT INTO uploads (job_id, name, data) VALUES ('', '', zeroblob(8192))"
            with contextlib.suppress(DiskError):
                self._write((insert, ()), ("DELETE FROM uploads WHERE job_id = ''", ()))
        return not self._has_failed

    def jobs(self) -> list[Job]:
        """All jobs, in the order in which they came; to be asked for in the event loop.

        Raises:
            FormatError: a row is not a job.
        """
        return self._guarded(self._read)

    def _read(self) -> list[Job]:
        found = []
        columns = "id, owner, api, created_at, num_attempts, spec"
        for job_id, owner, api, created_at, num_attempts, text in self._connection.execute(
            f"SELECT {columns} FROM jobs ORDER BY place"
        ):
            try:
                uploads = {name: self._upload(job_id, name) for name in UPLOADS}
                spec = JobSpec.from_dict(json.loads(text), uploads)
            except (ValueError, TypeError, FormatError) as error:
                raise FormatError(
                    f"the journal `{self._path}` is damaged: job `{job_id}`: {error}"
                ) from error
            job = Job(spec, owner=owner, api=api, job_id=job_id, created_at=created_at)
            job.num_attempts = num_attempts
            found.append(job)
        return found

    def _upload(self, job_id: str, name: str) -> bytes | None:
        statement = "SELECT data FROM uploads WHERE job_id = ? AND name = ?"
        row = self._connection.execute(statement, (job_id, name)).fetchone()
        return None if row is None else row[0]

    def _open(self) -> None:
        execute = self._connection.execute
        # Asked before anything is written: a file that is not ours stays as it is.
        (application_id,) = execute("PRAGMA application_id").fetchone()
        (num_tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id != _APPLICATION_ID and num_tables:
            raise FormatError(f"`{self._path}` is a database, and no journal of flux-nf4")
        (verdict,) = execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise FormatError(self._damage(verdict))
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._connection.executescript(_TABLES)

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        def write_all() -> None:
            with self._connection as connection:  # all of them or none
                connection.execute("BEGIN")
                for statement, values in statements:
                    connection.execute(statement, values)

        self._has_failed = True
        try:
            self._guarded(write_all)
        except (FormatError, InputError) as error:  # of the file, which is no client's fault
            raise DiskError(error.message) from error
        self._has_failed = False

    def _guarded(self, action: Callable[[], _Result]) -> _Result:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(
                    f"the journal `{self._path}` is in use by another server",
                    hint="give each server a journal of its own",
                ) from error
            raise DiskError(f"the journal `{self._path}`: {error}") from error
        except sqlite3.DatabaseError as error:
            raise FormatError(self._damage(str(error))) from error

    def _damage(self, why: str) -> str:
        return f"the journal `{self._path}` is damaged: {why}"
