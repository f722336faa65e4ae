"""What requests may hold, and what answers hold. Requests have typed, bounded scalars, and observations."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STATUSES = ("queued", "running", "stopping", "completed", "stopped", "failed", "interrupted")
Status = Literal["queued", "running", "stopping", "completed", "stopped", "failed", "interrupted"]
ENDED = ("completed", "stopped", "failed", "interrupted")

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
JOB_ID = r"^[0-9a-f]{32}$"
# Without a colon: `module:Env-v0` would make gymnasium import the module
ENV_NAME = r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$"
REWARD_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
# One rollout: n_steps times the number of environments in grpo.yml
MAX_ROLLOUT = 2**17
BATCH_LIMIT = 4096

ModelName = Annotated[str, Field(pattern=MODEL_NAME, examples=["cartpole"])]


class Request(BaseModel):
    """Nothing but the declared fields, and no conversion of strings to numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, protected_namespaces=())


class Answer(BaseModel):
    """Base of the answers."""

    model_config = ConfigDict(protected_namespaces=())


class TrainRequest(Request):
    """A training job. What is left out comes from ``grpo.yml`` for the environment."""

    env_name: str = Field(pattern=ENV_NAME, max_length=128, description="a registered gymnasium ID", examples=["CartPole-v1"])
    total_timesteps: int | None = Field(None, ge=1, le=10**10, description="of all environments together")
    model_name: ModelName | None = Field(None, description="by default made from the environment and the job")
    learning_rate: float | None = Field(None, gt=0, le=1)
    n_steps: int | None = Field(None, ge=2, le=65536, description="steps of each environment between two updates")
    batch_size: int | None = Field(None, ge=2, le=65536)
    n_epochs: int | None = Field(None, ge=1, le=100)
    reward_function_type: str | None = Field(
        None, pattern=REWARD_NAME, max_length=128, description="a name of `GET /rewards`; null: the environment's own reward"
    )
    seed: int | None = Field(None, ge=0, lt=2**31)


class TrainAnswer(Answer):
    job_id: str
    message: str


class JobStatus(Answer):
    job_id: str
    status: Status
    progress: float = Field(description="0 to 1")
    current_timesteps: int
    total_timesteps: int
    start_time: datetime | None
    end_time: datetime | None
    error_message: str | None
    metrics: dict[str, float | None] = Field(
        description="episode_reward, episode_length, fps, frac_reward_zero_std, reward_std, explained_variance, ..."
    )
    env_name: str
    model_name: str
    reward_function_type: str | None
    created: datetime


class Jobs(Answer):
    jobs: list[JobStatus]
    total: int


class Curve(Answer):
    timesteps: list[int]
    episode_reward: list[float | None]
    fps: list[float | None]
    frac_reward_zero_std: list[float | None]


class StopAnswer(Answer):
    job_id: str
    status: Status
    message: str


class InferenceRequest(Request):
    model_name: ModelName
    observation: Any = Field(description="one observation: a number, nested lists, or an object for Dict spaces")
    deterministic: bool = True


class InferenceAnswer(Answer):
    action: Any = Field(description="a number for Discrete, else a list")
    action_probs: list[float] | None = Field(description="of each action of a Discrete space, else null")
    value: None = Field(None, description="always null: there is no critic")


class BatchRequest(Request):
    model_name: ModelName
    observations: list[Any] = Field(min_length=1, max_length=BATCH_LIMIT)
    deterministic: bool = True


class BatchAnswer(Answer):
    actions: list[Any]
    action_probs: list[list[float]] | None
    values: None = None


class ModelInfo(Answer):
    name: str
    env_name: str
    total_timesteps: int = Field(description="that it was trained for")
    created: datetime
    size: int = Field(description="bytes")
    sha256: str
    mean_reward: float | None = Field(description="mean return of the last training episodes, in the environment's own reward")
    reward: str | None
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    versions: dict[str, str]
    job_id: str


class Models(Answer):
    models: list[ModelInfo]


class Deleted(Answer):
    name: str
    message: str


class Rollout(Answer):
    frames: list[str] = Field(description="JPEG, base64")
    rewards: list[float]
    return_: float = Field(serialization_alias="return")
    fps: int
    terminated: bool


class RewardInfo(Answer):
    name: str
    distribution: str
    envs: list[str]
    description: str


class Rewards(Answer):
    rewards: list[RewardInfo]


class EnvironmentInfo(Answer):
    id: str
    group: str
    renderable: bool = Field(description="whether `GET /models/{name}/rollout` can show it")
    tuned: bool = Field(description="whether grpo.yml has an entry for it")
    observation_space: dict[str, Any] | None = None
    action_space: dict[str, Any] | None = None


class Environments(Answer):
    environments: list[EnvironmentInfo]


class Queue(Answer):
    queued: int | None
    running: int | None
    limit: int


class Health(Answer):
    status: Literal["ok", "degraded"]
    version: str
    queue: Queue
    database: Literal["ok", "down"]


class Root(Answer):
    name: str
    version: str
    docs: str
    dashboard: str
    health: str


class Login(Request):
    api_key: str = Field(max_length=1024)


class Session(Answer):
    authenticated: bool
    key_required: bool


class Problem(Answer):
    detail: str
