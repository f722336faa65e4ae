"""
Records of jobs, their learning curves and models, in SQLite or PostgreSQL.

Only the server writes here: workers tell it what happened, so that no training needs the database or its password.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    Integer,
    String,
    Text,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
    update,
)
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sb3_grpo_plugin.api.schemas import ENDED

FORMAT = "1"
DATABASE = "server.sqlite"
BUSY_SECONDS = 10
POINTS = 500
CURVES = ("episode_reward", "fps", "frac_reward_zero_std")
T = TypeVar("T")


class StoreError(Exception):
    """The database cannot be used at all; the text says why, without its password."""


class DatabaseDown(Exception):
    """The database does not answer now."""


class Conflict(Exception):
    """A name is taken, or a record is not in the state that was asked for; the text says which."""


class UnknownModel(KeyError):
    """There is no model of that name."""


class QueueFull(Exception):
    """No further job may wait."""


class Base(DeclarativeBase):
    """Of all tables."""


class Meta(Base):
    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(255))


class Job(Base):
    """
    One training job. Times are seconds since the epoch.

    ``attempts`` counts the starts since the job last got on; ``stop_requested`` outlives whoever was to be told.
    """

    __tablename__ = "jobs"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(32), unique=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    env_name: Mapped[str] = mapped_column(String(128))
    model_name: Mapped[str] = mapped_column(String(64), index=True)
    reward: Mapped[str | None] = mapped_column(String(128))
    total_timesteps: Mapped[int] = mapped_column(BigInteger)
    seed: Mapped[int] = mapped_column(Integer)
    hyperparams: Mapped[dict[str, Any]] = mapped_column(JSON)
    created: Mapped[float] = mapped_column(Float(53))
    start_time: Mapped[float | None] = mapped_column(Float(53))
    end_time: Mapped[float | None] = mapped_column(Float(53))
    current_timesteps: Mapped[int] = mapped_column(BigInteger, default=0)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    error_message: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    stop_requested: Mapped[bool] = mapped_column(default=False)


class Point(Base):
    """One update of a training, for the learning curve."""

    __tablename__ = "points"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(32), index=True)
    timesteps: Mapped[int] = mapped_column(BigInteger)
    episode_reward: Mapped[float | None] = mapped_column(Float(53))
    fps: Mapped[float | None] = mapped_column(Float(53))
    frac_reward_zero_std: Mapped[float | None] = mapped_column(Float(53))


class Model(Base):
    """A trained model, or the last checkpoint of one in training. Its file is named after its SHA-256."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(32), index=True)
    env_name: Mapped[str] = mapped_column(String(128))
    reward: Mapped[str | None] = mapped_column(String(128))
    total_timesteps: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[float] = mapped_column(Float(53))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    mean_reward: Mapped[float | None] = mapped_column(Float(53))
    observation_space: Mapped[dict[str, Any]] = mapped_column(JSON)
    action_space: Mapped[dict[str, Any]] = mapped_column(JSON)
    versions: Mapped[dict[str, str]] = mapped_column(JSON)


def database_url(text: str | None, data_dir: Path) -> URL:
    """
    :param text: what the user gave, ``None`` for SQLite in the data folder
    :param data_dir: the data folder
    :return: with the driver that we use
    :raises StoreError: it is no URL of SQLite or PostgreSQL
    """
    if text is None:
        return URL.create("sqlite", database=str(data_dir / DATABASE))
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise StoreError("The database URL cannot be read; it looks like postgresql://user:password@host/name.") from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"The database is {url.get_backend_name()!r}; SQLite and PostgreSQL can be used.")
    return url


class Store:
    """
    :param url: of the database
    :param data_id: of the data folder: a database belongs to one
    :raises StoreError: it cannot be used
    """

    def __init__(self, url: URL, data_id: str) -> None:
        self.shown = url.render_as_string(hide_password=True)
        try:
            self.engine = make_engine(url)
            Base.metadata.create_all(self.engine)
            self._adopt(data_id)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"The database {self.shown} needs the driver {error.name!r}: `pip install sb3-grpo-plugin[postgres]`."
            ) from error
        except (SQLAlchemyError, NoSuchModuleError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()
            raise StoreError(f"The database {self.shown} cannot be used: {reason[0] if reason else error!r}") from error
        # The server is the only writer; this makes check-then-write atomic between its threads
        self._write = threading.Lock()

    def _adopt(self, data_id: str) -> None:
        with Session(self.engine) as session, session.begin():
            found = {row.key: row.value for row in session.scalars(select(Meta))}
            if not found:
                session.add_all([Meta(key="format", value=FORMAT), Meta(key="data_id", value=data_id)])
            elif found.get("format") != FORMAT:
                raise StoreError(
                    f"The database {self.shown} was written by another version of this server (format {found.get('format')}, "
                    f"this one has {FORMAT})."
                )
            elif found.get("data_id") != data_id:
                raise StoreError(
                    f"The database {self.shown} belongs to another data folder (id {found.get('data_id')}, this one has "
                    f"{data_id}): its models would be missing here. Use that folder, or an empty database."
                )

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """
        :raises DatabaseDown: it does not answer
        """
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                yield session
        except (OperationalError, InterfaceError, InternalError) as error:
            raise DatabaseDown(str(error.orig).strip()) from error
        except PoolTimeout as error:
            raise DatabaseDown(str(error)) from error

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """
        One transaction, one at a time.

        :raises DatabaseDown: it does not answer, or is full
        """
        with self._write, self.reading() as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    # Jobs

    def add_job(self, job: Job, queue_limit: int) -> None:
        """
        :param job: new, queued
        :param queue_limit: how many may wait
        :raises QueueFull: so many wait already
        :raises Conflict: the name of its model is taken
        """
        with self.writing() as session:
            waiting = session.scalar(select(func.count()).where(Job.status == "queued")) or 0
            if waiting >= queue_limit:
                raise QueueFull(f"The queue is full: {waiting} jobs wait, and at most {queue_limit} may.")
            owner = session.scalar(select(Job).where(Job.model_name == job.model_name, Job.status.not_in(ENDED)).limit(1))
            if owner is not None:
                raise Conflict(f"The job {owner.job_id} is already making a model {job.model_name!r}; choose another name.")
            if session.get(Model, job.model_name) is not None:
                raise Conflict(f"There is a model {job.model_name!r}; delete it first, or choose another name.")
            session.add(job)

    def job(self, job_id: str) -> Job | None:
        with self.reading() as session:
            return session.scalar(select(Job).where(Job.job_id == job_id))

    def jobs(self, limit: int, offset: int) -> tuple[Sequence[Job], int]:
        """
        :return: the newest first, and how many there are in all
        """
        with self.reading() as session:
            rows = session.scalars(select(Job).order_by(Job.number.desc()).limit(limit).offset(offset)).all()
            return rows, session.scalar(select(func.count()).select_from(Job)) or 0

    def counts(self) -> dict[str, int]:
        """
        :return: status -> number of jobs
        """
        with self.reading() as session:
            return {status: count for status, count in session.execute(select(Job.status, func.count()).group_by(Job.status))}

    def unfinished(self) -> Sequence[Job]:
        """
        :return: jobs that have not ended, the oldest first
        """
        with self.reading() as session:
            return session.scalars(select(Job).where(Job.status.not_in(ENDED)).order_by(Job.number)).all()

    def change_job(self, job_id: str, change: Callable[[Job], T]) -> T | None:
        """
        :param job_id: of the job
        :param change: called with it inside a transaction
        :return: what that returned, ``None`` when there is no such job
        """
        with self.writing() as session:
            job = session.scalar(select(Job).where(Job.job_id == job_id))
            return None if job is None else change(job)

    def update_job(self, job_id: str, **values: Any) -> None:
        """
        :param job_id: of the job
        :param values: columns to set
        """
        with self.writing() as session:
            session.execute(update(Job).where(Job.job_id == job_id).values(**values))

    def add_point(self, job_id: str, timesteps: int, values: dict[str, Any], **job_values: Any) -> None:
        """
        :param job_id: of the job
        :param timesteps: of the update
        :param values: with the keys of ``CURVES``
        :param job_values: columns of the job to set in the same transaction
        """
        with self.writing() as session:
            # A job that goes on from its checkpoint passes some points again
            session.execute(delete(Point).where(Point.job_id == job_id, Point.timesteps >= timesteps))
            session.add(Point(job_id=job_id, timesteps=timesteps, **{key: values.get(key) for key in CURVES}))
            if job_values:
                session.execute(update(Job).where(Job.job_id == job_id).values(**job_values))

    def points(self, job_id: str, after: int = -1) -> Sequence[Point]:
        """
        :param job_id: of the job
        :param after: timesteps; only what lies behind
        :return: at most ``POINTS`` of them, evenly picked; the last one is among them
        """
        with self.reading() as session:
            rows = session.scalars(
                select(Point).where(Point.job_id == job_id, Point.timesteps > after).order_by(Point.timesteps)
            ).all()
        if len(rows) <= POINTS:
            return rows
        return [rows[round(index * (len(rows) - 1) / (POINTS - 1))] for index in range(POINTS)]

    # Models

    def put_model(self, model: Model) -> str | None:
        """
        Record a model or a newer checkpoint of it; the job has got on.

        :param model: whose file is in its place
        :return: SHA-256 of the file that it replaces, if nothing else refers to that
        """
        with self.writing() as session:
            old = session.get(Model, model.name)
            before = None if old is None else old.sha256
            session.merge(model)
            session.execute(
                update(Job).where(Job.job_id == model.job_id).values(attempts=0, current_timesteps=model.total_timesteps)
            )
            session.flush()
            return before if before is not None and not self._used(session, before) else None

    @staticmethod
    def _used(session: Session, sha256: str) -> bool:
        return session.scalar(select(Model.name).where(Model.sha256 == sha256).limit(1)) is not None

    def model(self, name: str) -> Model | None:
        with self.reading() as session:
            return session.get(Model, name)

    def models(self) -> Sequence[Model]:
        """
        :return: the newest first
        """
        with self.reading() as session:
            return session.scalars(select(Model).order_by(Model.created.desc(), Model.name)).all()

    def delete_model(self, name: str) -> str | None:
        """
        :param name: of the model
        :return: SHA-256 of its file when nothing else refers to that
        :raises UnknownModel: there is none
        :raises Conflict: its job has not ended
        """
        with self.writing() as session:
            model = session.get(Model, name)
            if model is None:
                raise UnknownModel(name)
            job = session.scalar(select(Job).where(Job.model_name == name, Job.status.not_in(ENDED)).limit(1))
            if job is not None:
                raise Conflict(f"The job {job.job_id} is still training the model {name!r}; stop it first.")
            sha256 = model.sha256
            session.delete(model)
            session.flush()
            return None if self._used(session, sha256) else sha256


def make_engine(url: URL) -> Engine:
    """
    :param url: of SQLite or PostgreSQL
    :return: that gives up on a silent server after seconds
    """
    if url.get_backend_name() != "sqlite":
        # Databases of the encoding SQL_ASCII give bytes unless asked for text
        connect = {"connect_timeout": 5, "client_encoding": "utf8"}
        return create_engine(url, pool_pre_ping=True, pool_size=10, pool_timeout=5, connect_args=connect)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        # Readers do not wait for the writer, and a power cut loses no commit of a model
        for line in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_SECONDS * 1000}"):
            connection.execute(f"PRAGMA {line}")

    return engine


def new_job(
    env_name: str, model_name: str | None, total_timesteps: int, reward: str | None, seed: int, hyperparams: dict[str, Any]
) -> Job:
    """
    :param env_name: a registered ID
    :param model_name: ``None`` to make one up
    :param total_timesteps: to train for
    :param reward: name of a registered reward
    :param seed: of the training
    :param hyperparams: that replace those of ``grpo.yml``
    :return: a queued job
    """
    job_id = uuid.uuid4().hex
    stem = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "_-") else "-" for sign in env_name)[:50]
    return Job(
        job_id=job_id,
        status="queued",
        env_name=env_name,
        model_name=model_name or f"{stem}-{job_id[:8]}",
        reward=reward,
        total_timesteps=total_timesteps,
        seed=seed,
        hyperparams=hyperparams,
        created=time.time(),
    )
