"""The study on disk: every step of the engine is one transaction.

SQLite (`study.sqlite` in the study's folder, write-ahead log) by default; any database that
SQLAlchemy knows by URL. There is one writer. A killed process leaves the last transaction.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, update
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from loralab.errors import UserError
from loralab.study import records, schema
from loralab.study.records import StoredPack
from loralab.study.results import MethodChoice, StudyResults, TrialResult
from loralab.study.search import Planned

FILE = "study.sqlite"
URL_FILE = "store.url"


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Store:
    """One study's database; a context manager.

    Raises:
        UserError: from every method, if the database refuses (permission, disk full, damage).
    """

    def __init__(self, engine: Engine, place: str) -> None:
        self.engine = engine
        self.place = place

    @classmethod
    def create(cls, folder: Path, url: str | None = None) -> "Store":
        """Open the store of the study in `folder`, making folder and tables if needed."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if url is not None:
                (folder / URL_FILE).write_text(url + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}") from None
        store = cls(_engine(url or _sqlite(folder)), url or str(folder / FILE))
        with store._transaction() as connection:
            schema.metadata.create_all(connection)
        return store

    @classmethod
    def open(cls, place: str | Path) -> "Store":
        """Open an existing study by folder, by its study.sqlite or by database URL."""
        if "://" in str(place):
            return cls(_engine(str(place)), str(place))
        folder = Path(place)
        folder = folder.parent if folder.name == FILE else folder
        if (folder / URL_FILE).exists():
            url = (folder / URL_FILE).read_text(encoding="utf-8").strip()
            return cls(_engine(url), url)
        if not (folder / FILE).exists():
            raise UserError(f"there is no study in {folder}: it has no {FILE}")
        return cls(_engine(_sqlite(folder)), str(folder / FILE))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except (IntegrityError, ProgrammingError):
            raise  # a fault of this program, not of the place
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise UserError(
                f"the store {self.place} cannot be used ({cause}); "
                "what is stored already stays: mend the cause and run again"
            ) from error

    def begin(self, spec: Mapping[str, Any], hash_: str, environment: Mapping[str, Any]) -> bool:
        """Record the study if it is new; return whether it was.

        Raises:
            UserError: the store holds a study with another spec; the sentence names the keys.
        """
        with self._transaction() as c:
            row = c.execute(select(schema.study)).first()
            if row is None:
                c.execute(
                    insert(schema.study).values(
                        id=1,
                        spec=json.dumps(spec),
                        hash=hash_,
                        created=now(),
                        environment=json.dumps(environment),
                    )
                )
                return True
        if row.hash != hash_:
            old = json.loads(row.spec)
            keys = sorted(k for k in {*old, *spec} if old.get(k) != spec.get(k))
            raise UserError(
                f"{self.place} holds a study with other values of {', '.join(keys)}; "
                "give the new study a folder of its own with --out, or restore the spec"
            )
        return False

    def describe(self, metric: str, higher_is_better: bool, n_train: int) -> None:
        """Record what the task says about itself."""
        values = {
            "metric": metric,
            "higher_is_better": int(higher_is_better),
            "n_train": n_train,
        }
        with self._transaction() as c:
            c.execute(update(schema.study).values(**values))

    def finish(self, choices: Sequence[MethodChoice]) -> None:
        """Record the choices and that the study is complete."""
        with self._transaction() as c:
            records.replace_choices(c, choices)
            c.execute(update(schema.study).values(finished=now()))

    def set_choices(self, choices: Sequence[MethodChoice]) -> None:
        """Replace the choices."""
        with self._transaction() as c:
            records.replace_choices(c, choices)

    def study(self) -> dict[str, Any]:
        """Return the study's row: spec and environment as dictionaries.

        Raises:
            UserError: there is none.
        """
        with self._transaction() as c:
            row = c.execute(select(schema.study)).mappings().first()
        if row is None:
            raise UserError(f"{self.place} holds no study yet")
        texts = {name: json.loads(row[name]) for name in ("spec", "environment")}
        return dict(row) | texts

    def add_packs(
        self, stage: str, planned: Sequence[Planned], packs: Sequence[Sequence[Planned]]
    ) -> None:
        """Record trials (in their order) and the packs that cover them, all or nothing."""
        with self._transaction() as c:
            known = set(c.execute(select(schema.trials.c.id)).scalars())
            number = c.execute(select(func.max(schema.trials.c.number))).scalar()
            fresh = [p for p in planned if p.trial.id not in known]
            if fresh:
                c.execute(
                    insert(schema.trials),
                    [
                        {
                            "id": p.trial.id,
                            "number": (-1 if number is None else number) + 1 + i,
                            "label": p.label,
                            "stage": p.stage,
                            "trial": json.dumps(p.trial.to_dict()),
                            "status": "waiting",
                        }
                        for i, p in enumerate(fresh)
                    ],
                )
            for pack in packs:
                ids = json.dumps([p.trial.id for p in pack])
                c.execute(insert(schema.packs).values(stage=stage, trials=ids, state="waiting"))

    def unfinished_packs(self) -> list[StoredPack]:
        """Return the packs that are left, in the order in which they were planned."""
        with self._transaction() as c:
            return records.unfinished_packs(c)

    def start_pack(self, pack_id: int) -> None:
        """Record that a pack runs, and since when if it did not run before."""
        table = schema.packs
        with self._transaction() as c:
            where = table.c.id == pack_id
            started = func.coalesce(table.c.started, now())
            c.execute(update(table).where(where).values(state="running", started=started))

    def split_pack(
        self, pack: StoredPack, parts: Sequence[Sequence[str]], why: str = "out of memory"
    ) -> list[StoredPack]:
        """Replace a pack by parts of it that wait, record why and return the parts."""
        planned = {p.trial.id: p for p in pack.planned}
        found = []
        with self._transaction() as c:
            where = schema.packs.c.id == pack.id
            c.execute(update(schema.packs).where(where).values(state="split"))
            for ids in parts:
                values = {"stage": pack.stage, "trials": json.dumps(ids), "state": "waiting"}
                done = c.execute(insert(schema.packs).values(**values))
                number = cast(tuple[Any, ...], done.inserted_primary_key)[0]
                found.append(StoredPack(number, pack.stage, [planned[i] for i in ids], "waiting"))
            detail = {"pack": pack.id, "trials": len(pack.planned), "into": [len(p) for p in parts]}
            records.add_event(c, now(), why, detail)
        return found

    def finish_pack(self, pack_id: int, results: Sequence[TrialResult]) -> None:
        """Store a pack's results and that it is done, in one transaction."""
        with self._transaction() as c:
            for result in results:
                records.write(c, result)
            where = schema.packs.c.id == pack_id
            c.execute(update(schema.packs).where(where).values(state="done"))

    def add_curvature(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append curvature rows."""
        with self._transaction() as c:
            for row in rows:
                c.execute(insert(schema.curvature).values(row=json.dumps(row)))

    def add_event(self, kind: str, **detail: Any) -> None:
        """Record something that happened beside the plan."""
        with self._transaction() as c:
            records.add_event(c, now(), kind, detail)

    def has_event(self, kind: str) -> bool:
        """Return whether an event of this kind is recorded."""
        with self._transaction() as c:
            where = schema.events.c.kind == kind
            return c.execute(select(schema.events.c.id).where(where)).first() is not None

    def known(self) -> set[str]:
        """Return the ids of all recorded trials, finished or waiting."""
        with self._transaction() as c:
            return set(c.execute(select(schema.trials.c.id)).scalars())

    def slot_steps_waiting(self) -> int:
        """Return the optimizer steps of all trials that wait, summed."""
        query = select(schema.trials.c.trial).where(schema.trials.c.status == "waiting")
        with self._transaction() as c:
            return sum(records.trial_of(text).steps for text in c.execute(query).scalars())

    def counts(self) -> dict[str, dict[str, int]]:
        """Return {stage: {status: number of trials}}."""
        t = schema.trials.c
        query = select(t.stage, t.status, func.count()).group_by(t.stage, t.status)
        found: dict[str, dict[str, int]] = {}
        with self._transaction() as c:
            for stage, status, n in c.execute(query):
                found.setdefault(stage, {})[status] = n
        return found

    def results(self, with_items: bool = True) -> StudyResults:
        """Return all that is finished; the score of each item only if wanted."""
        row = self.study()
        with self._transaction() as c:
            return records.read(c, row, with_items)


def _sqlite(folder: Path) -> str:
    return f"sqlite:///{(folder / FILE).absolute()}"


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, poolclass=NullPool)
    except (SQLAlchemyError, ImportError) as error:
        raise UserError(f"cannot use the store {url}: {error}") from None
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _prepare(connection: Any, record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA busy_timeout=30000")

    return engine
