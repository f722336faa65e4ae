"""The application: routes, and what lives as long as the server."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from sb3_grpo_plugin import __version__
from sb3_grpo_plugin.api import schemas
from sb3_grpo_plugin.api.environments import Catalogue, check_environment, join_registry, settings_of
from sb3_grpo_plugin.api.executors import Executor
from sb3_grpo_plugin.api.inference import Busy, Inference, UnusableModel
from sb3_grpo_plugin.api.jobs import Supervisor
from sb3_grpo_plugin.api.observations import ObservationError
from sb3_grpo_plugin.api.schemas import ENDED, JOB_ID, MODEL_NAME
from sb3_grpo_plugin.api.security import (
    COOKIE,
    SESSION_SECONDS,
    Guard,
    KeyCheck,
    Refusal,
    Sessions,
    address_of,
    cookie,
    header,
)
from sb3_grpo_plugin.api.settings import Settings
from sb3_grpo_plugin.api.store import CURVES, Conflict, DatabaseDown, Job, Model, QueueFull, Store, UnknownModel, new_job
from sb3_grpo_plugin.rewards import registries

logger = logging.getLogger("sb3_grpo_plugin.api")

STATIC = Path(__file__).parent / "static"
EVENT_SECONDS = 0.5
# A comment line from time to time shows both ends that the connection lives
KEEP_ALIVE_SECONDS = 15.0
STREAMS = 64
DESCRIPTION = (
    "Train GRPO agents and use them. Every route but `/`, `/health`, `/session`, `/login`, `/logout`, the documentation and "
    "the page itself needs the API key (`Authorization: Bearer KEY`, or the page's session cookie) when the server has one."
)


def problem(description: str) -> dict[str, Any]:
    return {"model": schemas.Problem, "description": description}


# What the guard in front of all routes may answer
COMMON: dict[int | str, dict[str, Any]] = {
    400: problem("the Host or Origin header names another machine, or the request makes no sense"),
    401: problem("the API key is missing or wrong"),
    429: problem("too many requests, wrong keys, or waiting jobs"),
}
DATABASE: dict[int | str, dict[str, Any]] = {503: problem("the database does not answer now")}
BODY: dict[int | str, dict[str, Any]] = {
    413: problem("the body is too large"),
    415: problem("the body is not application/json"),
}
MISSING: dict[int | str, dict[str, Any]] = {404: problem("there is none of that name")}
CONFLICT: dict[int | str, dict[str, Any]] = {409: problem("the state of the job or model does not allow it")}

JobId = Annotated[str, PathParameter(pattern=JOB_ID, examples=["0123456789abcdef0123456789abcdef"])]
Name = Annotated[str, PathParameter(pattern=MODEL_NAME, examples=["cartpole"])]


class State:
    """
    What the routes share.

    :param settings: of the server
    :param store: records
    :param executor: where jobs run
    """

    def __init__(self, settings: Settings, store: Store, executor: Executor) -> None:
        self.settings = settings
        self.store = store
        key = settings.api_key
        self.keys = KeyCheck(None if key is None else key.get_secret_value())
        self.sessions = Sessions()
        self.inference = Inference(store, settings.data_dir / "models")
        self.supervisor = Supervisor(store, settings, executor, self.inference.forget)
        self.catalogue = Catalogue()
        self.streams = 0
        self.closing = False


def state_of(request: Request) -> State:
    return request.app.state.server


Server = Annotated[State, Depends(state_of)]
router = APIRouter()


def moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)


def job_status(job: Job) -> schemas.JobStatus:
    """
    :param job: its record
    :return: what the API says of it
    """
    created = moment(job.created)
    assert created is not None
    progress = min(job.current_timesteps / job.total_timesteps, 1.0)
    return schemas.JobStatus(
        job_id=job.job_id,
        status=job.status,  # type: ignore[arg-type]
        progress=1.0 if job.status == "completed" else progress,
        current_timesteps=job.current_timesteps,
        total_timesteps=job.total_timesteps,
        start_time=moment(job.start_time),
        end_time=moment(job.end_time),
        error_message=job.error_message,
        metrics=job.metrics or {},
        env_name=job.env_name,
        model_name=job.model_name,
        reward_function_type=job.reward,
        created=created,
    )


def model_info(model: Model) -> schemas.ModelInfo:
    """
    :param model: its record
    :return: what the API says of it
    """
    return schemas.ModelInfo.model_validate(model, from_attributes=True)


def find_job(server: State, job_id: str) -> Job:
    job = server.store.job(job_id)
    if job is None:
        raise HTTPException(404, "There is no such job.")
    return job


def find_model(server: State, name: str) -> Model:
    model = server.store.model(name)
    if model is None:
        raise UnknownModel(name)
    return model


@router.get("/", responses=COMMON)
async def root() -> schemas.Root:
    return schemas.Root(name="sb3-grpo-plugin", version=__version__, docs="/docs", dashboard="/dashboard", health="/health")


@router.get("/health", responses=COMMON)
def health(server: Server) -> schemas.Health:
    """Whether the server and its database answer; needs no key."""
    limit = server.settings.queue_limit
    try:
        counts = server.store.counts()
    except DatabaseDown:
        queue = schemas.Queue(queued=None, running=None, limit=limit)
        return schemas.Health(status="degraded", version=__version__, queue=queue, database="down")
    running = counts.get("running", 0) + counts.get("stopping", 0)
    queue = schemas.Queue(queued=counts.get("queued", 0), running=running, limit=limit)
    return schemas.Health(status="ok", version=__version__, queue=queue, database="ok")


# Training


@router.post("/train", status_code=202, responses={**COMMON, **BODY, **CONFLICT, **DATABASE})
def train(order: schemas.TrainRequest, server: Server) -> schemas.TrainAnswer:
    """
    Queue a training job. Hyperparameters that are left out, and the number of environments, come from `grpo.yml`.
    """
    limit = server.settings.max_total_timesteps
    try:
        check_environment(order.env_name, server.catalogue)
        if order.reward_function_type is not None:
            check_reward(order.reward_function_type, order.env_name)
        defaults = settings_of(order.env_name)
        hyperparams = {
            name: value
            for name in ("learning_rate", "n_steps", "batch_size", "n_epochs")
            if (value := getattr(order, name)) is not None
        }
        n_envs = int(defaults.get("n_envs", 1))
        n_steps = order.n_steps or int(defaults.get("n_steps", 2048))
        if n_envs * n_steps > schemas.MAX_ROLLOUT:
            raise ValueError(
                f"n_steps={n_steps} of {n_envs} environments (grpo.yml) are {n_envs * n_steps} steps a rollout; at most "
                f"{schemas.MAX_ROLLOUT} are possible, so n_steps can be {schemas.MAX_ROLLOUT // n_envs}."
            )
        if order.total_timesteps is not None and order.total_timesteps > limit:
            raise ValueError(f"total_timesteps={order.total_timesteps} is more than the {limit} that a job may have.")
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    steps = order.total_timesteps or min(int(float(defaults["n_timesteps"])), limit)
    job = new_job(order.env_name, order.model_name, steps, order.reward_function_type, order.seed or 0, hyperparams)
    job_id, name = job.job_id, job.model_name
    server.supervisor.submit(job)
    return schemas.TrainAnswer(
        job_id=job_id, message=f"{order.env_name} is queued for {steps} timesteps; the model will be {name!r}."
    )


def check_reward(name: str, env_id: str) -> None:
    """
    :param name: of a reward
    :param env_id: that it is wanted for
    :raises ValueError: it is not registered (with the nearest name), or bound to other environments
    """
    spec = registries().rewards.get(name)
    if not spec.binds(env_id):
        raise ValueError(f"The reward {name!r} is for {', '.join(spec.env_ids)}, not for {env_id!r}.")


@router.get("/training/jobs", responses={**COMMON, **DATABASE})
def jobs(
    server: Server, limit: Annotated[int, Query(ge=1, le=1000)] = 100, offset: Annotated[int, Query(ge=0, lt=2**31)] = 0
) -> schemas.Jobs:
    """The newest first."""
    rows, total = server.store.jobs(limit, offset)
    return schemas.Jobs(jobs=[job_status(job) for job in rows], total=total)


@router.get("/training/{job_id}/status", responses={**COMMON, **MISSING, **DATABASE})
def status(job_id: JobId, server: Server) -> schemas.JobStatus:
    return job_status(find_job(server, job_id))


@router.get("/training/{job_id}/curve", responses={**COMMON, **MISSING, **DATABASE})
def curve(job_id: JobId, server: Server) -> schemas.Curve:
    """At most 500 points of the learning curve."""
    find_job(server, job_id)
    points = server.store.points(job_id)
    return schemas.Curve(
        timesteps=[point.timesteps for point in points],
        **{name: [getattr(point, name) for point in points] for name in CURVES},  # type: ignore[arg-type]
    )


@router.get(
    "/training/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        **COMMON,
        **MISSING,
        **DATABASE,
        200: {"description": "events `status`, `point` and at last `end`", "content": {"text/event-stream": {}}},
    },
)
async def events(job_id: JobId, server: Server) -> StreamingResponse:
    """
    Server-sent events: `status` (the body of the status route) whenever it changes, `point` for each new point of the curve,
    `end` when the job has ended.
    """
    await run_in_threadpool(find_job, server, job_id)
    if server.streams >= STREAMS:
        raise HTTPException(429, f"{server.streams} event streams are open already.")
    return StreamingResponse(stream(server, job_id), media_type="text/event-stream")


async def stream(server: State, job_id: str) -> AsyncIterator[str]:
    """
    :param server: state
    :param job_id: of the job
    :return: events as text
    """
    server.streams += 1
    try:
        last, after, silent = "", -1, 0.0
        while not server.closing:
            try:
                job = await run_in_threadpool(server.store.job, job_id)
                points = await run_in_threadpool(server.store.points, job_id, after)
            except DatabaseDown:
                job, points = None, []
            for point in points:
                after = point.timesteps
                values = {"timesteps": point.timesteps, **{name: getattr(point, name) for name in CURVES}}
                yield f"event: point\ndata: {json.dumps(values)}\n\n"
            text = last if job is None else job_status(job).model_dump_json()
            silent = 0.0 if text != last or points else silent + EVENT_SECONDS
            if text != last:
                last = text
                yield f"event: status\ndata: {text}\n\n"
            if job is not None and job.status in ENDED:
                yield f"event: end\ndata: {json.dumps({'status': job.status})}\n\n"
                return
            if silent >= KEEP_ALIVE_SECONDS:
                silent = 0.0
                yield ": waiting\n\n"
            await asyncio.sleep(EVENT_SECONDS)
    finally:
        server.streams -= 1


@router.post("/training/{job_id}/stop", responses={**COMMON, **BODY, **MISSING, **CONFLICT, **DATABASE})
def stop(job_id: JobId, server: Server) -> schemas.StopAnswer:
    """Stop within one rollout and keep the model so far."""
    try:
        job = server.supervisor.stop(job_id)
    except KeyError as error:
        raise HTTPException(404, "There is no such job.") from error
    message = "The job was waiting; it will not start." if job.status == "stopped" else "The job stops within one rollout."
    return schemas.StopAnswer(job_id=job_id, status=job.status, message=message)  # type: ignore[arg-type]


# Models


@router.post("/inference", responses={**COMMON, **BODY, **MISSING, **CONFLICT, **DATABASE})
async def inference(order: schemas.InferenceRequest, server: Server) -> schemas.InferenceAnswer:
    """
    An action for one observation, given as the environment gives it: not normalized, images as height x width x channels.
    """
    actions, probabilities = await server.inference.predict(order.model_name, [order.observation], order.deterministic)
    probs = None if probabilities is None else probabilities[0]
    return schemas.InferenceAnswer(action=actions[0], action_probs=probs, value=None)


@router.post("/inference/batch", responses={**COMMON, **BODY, **MISSING, **CONFLICT, **DATABASE})
async def inference_batch(order: schemas.BatchRequest, server: Server) -> schemas.BatchAnswer:
    """Actions for several observations."""
    actions, probabilities = await server.inference.predict(order.model_name, order.observations, order.deterministic)
    return schemas.BatchAnswer(actions=actions, action_probs=probabilities)


@router.get("/models", responses={**COMMON, **DATABASE})
def models(server: Server) -> schemas.Models:
    """Trained models and the last checkpoints of those in training, the newest first."""
    return schemas.Models(models=[model_info(model) for model in server.store.models()])


@router.get("/models/{name}", responses={**COMMON, **MISSING, **DATABASE})
def model(name: Name, server: Server) -> schemas.ModelInfo:
    return model_info(find_model(server, name))


@router.get(
    "/models/{name}/download",
    response_class=Response,
    responses={
        **COMMON,
        **MISSING,
        **CONFLICT,
        **DATABASE,
        200: {
            "description": "a file for `GRPO.load`, with `vecnormalize.pkl` inside when observations are normalized",
            "content": {"application/zip": {}},
        },
    },
)
def download(name: Name, server: Server) -> Response:
    _, data = server.inference.read(name)
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return Response(data, media_type="application/zip", headers=headers)


@router.delete("/models/{name}", responses={**COMMON, **BODY, **MISSING, **CONFLICT, **DATABASE})
def delete_model(name: Name, server: Server) -> schemas.Deleted:
    sha256 = server.store.delete_model(name)
    server.inference.forget(name)
    if sha256 is not None:
        (server.settings.data_dir / "models" / f"{sha256}.zip").unlink(missing_ok=True)
    return schemas.Deleted(name=name, message=f"The model {name!r} is deleted.")


@router.get("/models/{name}/rollout", responses={**COMMON, **MISSING, **CONFLICT, **DATABASE})
async def rollout(
    name: Name,
    server: Server,
    seed: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    max_steps: Annotated[int, Query(ge=1, le=1000)] = 500,
) -> schemas.Rollout:
    """One deterministic episode of a classic-control environment, as pictures."""
    try:
        return schemas.Rollout(**await server.inference.rollout(name, seed, max_steps))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


# What there is to train with


@router.get("/rewards", responses=COMMON)
def rewards(server: Server) -> schemas.Rewards:
    """What the installed plugins offer."""
    return schemas.Rewards(
        rewards=[
            schemas.RewardInfo(name=spec.name, distribution=source, envs=list(spec.env_ids), description=spec.description)
            for spec, source in registries().rewards
        ]
    )


@router.get("/environments", responses=COMMON)
def environments(server: Server) -> schemas.Environments:
    """Registered environments that can be made here."""
    return schemas.Environments(environments=[schemas.EnvironmentInfo(**found) for found in server.catalogue.list()])


# Logging in


@router.get("/session", responses=COMMON)
async def session(request: Request, server: Server) -> schemas.Session:
    """Whether this browser is logged in."""
    required = server.keys.required
    open_ = not required or server.sessions.valid(cookie(request.scope))
    return schemas.Session(authenticated=open_, key_required=required)


@router.post("/login", status_code=204, responses={**COMMON, **BODY})
async def login(order: schemas.Login, request: Request, server: Server) -> Response:
    """Trade the API key for a cookie, which scripts of a page cannot read and other sites cannot use."""
    if not server.keys.check(order.api_key, address_of(request.scope)):
        raise HTTPException(401, "The API key is wrong.")
    response = Response(status_code=204)
    # The browser says how it got here, also through a proxy that ends TLS
    secure = header(request.scope, b"origin").startswith("https://") or request.url.scheme == "https"
    response.set_cookie(
        COOKIE, server.sessions.open(), max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=secure
    )
    return response


@router.post("/logout", status_code=204, responses={**COMMON, **BODY})
async def logout(request: Request, server: Server) -> Response:
    """End this browser's session."""
    server.sessions.close(cookie(request.scope))
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


# Failures


def plain(value: Any) -> Any:
    """Text that any client can read, whatever a request put into it."""
    return value.encode("ascii", "backslashreplace").decode() if isinstance(value, str) else value


def answer(status_code: int, detail: Any, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code, headers=headers)


async def on_http_error(request: Request, error: Any) -> JSONResponse:
    return answer(error.status_code, plain(error.detail), error.headers)


async def on_invalid(request: Request, error: Any) -> JSONResponse:
    # Without what was sent: it may be huge, secret, or no JSON at all
    return answer(
        422,
        [
            {"loc": [plain(part) for part in item["loc"]], "msg": plain(item["msg"]), "type": item["type"]}
            for item in error.errors()[:20]
        ],
    )


async def on_bad_observation(request: Request, error: Any) -> JSONResponse:
    return answer(422, [{"loc": ["body", "observation"], "msg": plain(str(error)), "type": "observation"}])


async def on_refusal(request: Request, error: Any) -> JSONResponse:
    return answer(error.status, error.detail, error.headers)


async def on_database_down(request: Request, error: Any) -> JSONResponse:
    logger.warning("The database does not answer: %s", error)
    return answer(503, "The database does not answer; the server goes on when it does.", {"Retry-After": "5"})


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    return answer(500, "The server stumbled over this request; its log says more.")


def failure(status_code: int) -> Any:
    """A handler that answers with the exception's own text."""

    async def handle(request: Request, error: Any) -> JSONResponse:
        return answer(status_code, plain(str(error)), {"Retry-After": "5"} if status_code == 429 else None)

    return handle


async def on_unknown_model(request: Request, error: Any) -> JSONResponse:
    return answer(404, f"There is no model {error.args[0]!r}.")


def create_app(settings: Settings, store: Store, executor: Executor) -> FastAPI:
    """
    :param settings: of the server
    :param store: records
    :param executor: where jobs run
    :return: the application; what runs beside the requests starts and ends with its lifespan
    """
    server = State(settings, store, executor)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(join_registry)
        await run_in_threadpool(server.supervisor.start)
        server.inference.warm_up()
        server.catalogue.start()
        yield
        server.closing = True
        server.catalogue.stop()
        await run_in_threadpool(server.supervisor.close)
        server.inference.close()
        server.store.close()

    app = FastAPIOffline(
        title="sb3-grpo-plugin",
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        static_url="/vendor",
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.server = server
    app.include_router(router)
    handlers: dict[Any, Any] = {
        HTTPException: on_http_error,
        404: on_http_error,
        405: on_http_error,
        RequestValidationError: on_invalid,
        ObservationError: on_bad_observation,
        Refusal: on_refusal,
        DatabaseDown: on_database_down,
        UnknownModel: on_unknown_model,
        UnusableModel: failure(409),
        Conflict: failure(409),
        QueueFull: failure(429),
        Busy: failure(429),
        Exception: on_unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    if STATIC.is_dir():
        app.mount("/static", StaticFiles(directory=STATIC), name="static")

        @app.get("/dashboard", include_in_schema=False)
        async def dashboard() -> FileResponse:
            return FileResponse(STATIC / "dashboard.html")

        @app.get("/dashboard/", include_in_schema=False)
        async def dashboard_without_slash() -> RedirectResponse:
            return RedirectResponse("/dashboard")

    add_security_scheme(app)
    app.add_middleware(Guard, settings=settings, sessions=server.sessions, keys=server.keys)
    return app


def add_security_scheme(app: FastAPI) -> None:
    """Let the documentation's pages ask for the key."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
