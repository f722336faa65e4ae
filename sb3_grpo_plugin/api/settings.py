"""What the server can be told, by environment variables or by the arguments of ``sb3-grpo serve``."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# Shorter ones can be guessed
KEY_LENGTH = 16


def default_data_dir() -> Path:
    """
    :return: the folder of a user's data as the XDG specification names it
    """
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sb3-grpo"


def is_loopback(host: str) -> bool:
    """
    :param host: name or address
    :return: whether only this machine can reach it
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseSettings):
    """
    Every field has an environment variable: ``SB3_GRPO_`` and its name in capitals. Secrets are masked when shown.

    :param host: address to bind to; any but this machine's own needs an ``api_key``
    :param port: to bind to; 0 for any free one
    :param data_dir: everything the server keeps (mode 0700)
    :param database_url: of PostgreSQL, ``postgresql://user:password@host/name``; without it SQLite in the data folder
    :param api_key: that requests must carry, at least 16 characters
    :param allowed_hosts: names that a Host header may hold beside ``localhost``, this machine's name and addresses
        (comma-separated in the variable)
    :param executor: where jobs run: ``process`` (this machine) or ``ray`` (a cluster)
    :param ray_address: of the cluster; empty for the one that ``RAY_ADDRESS`` names, or else one of this machine alone
    :param workers: jobs that run at the same time
    :param device: what models are trained on: ``cpu``, ``cuda`` or ``auto``
    :param queue_limit: jobs that may wait
    :param max_total_timesteps: of one job
    :param max_body_bytes: of one request
    :param rate_limit: requests per second and client address, 0 for no limit
    :param job_memory_mb: that a job may take, in MiB
    :param checkpoint_seconds: between two checkpoints of a job
    """

    model_config = SettingsConfigDict(env_prefix="SB3_GRPO_", extra="ignore", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data_dir: Path = Field(default_factory=default_data_dir)
    database_url: SecretStr | None = None
    api_key: SecretStr | None = None
    allowed_hosts: Annotated[list[str], NoDecode] = []
    executor: Literal["process", "ray"] = "process"
    ray_address: str = ""
    workers: int = Field(default_factory=lambda: max(1, (os.cpu_count() or 2) // 2), ge=1, le=256)
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    queue_limit: int = Field(100, ge=1, le=100_000)
    max_total_timesteps: int = Field(10_000_000, ge=1, le=10**10)
    max_body_bytes: int = Field(8 * 2**20, ge=1024, le=2**30)
    rate_limit: float = Field(1000.0, ge=0, le=1e6)
    job_memory_mb: int = Field(4096, ge=512)
    checkpoint_seconds: float = Field(30.0, gt=0, le=86400)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip().lower() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("database_url", "api_key", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _check_key(self) -> "Settings":
        key = None if self.api_key is None else self.api_key.get_secret_value()
        if key is not None and (len(key) < KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
            raise ValueError(
                f"the API key has {len(key)} characters; it needs at least {KEY_LENGTH} printable ASCII ones without spaces. "
                """Make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`"""
            )
        if key is None and not is_loopback(self.host):
            raise ValueError(
                f"binding to {self.host} lets other machines in, which needs an API key: set SB3_GRPO_API_KEY, or bind to "
                "127.0.0.1"
            )
        return self

    def host_names(self) -> frozenset[str]:
        """
        :return: names, in lower case, that a request's Host header may hold. Addresses need no list: what an attacker's
            page sends after a DNS rebinding is the attacker's name
        """
        own = socket.gethostname().lower()
        return frozenset({"localhost", own, own.partition(".")[0], self.host.lower(), *self.allowed_hosts})
