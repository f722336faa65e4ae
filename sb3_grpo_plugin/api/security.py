"""
What every request passes before it reaches a route: Host and Origin, rate, key, size and type of the body.

Plain ASGI, because it is on the way of every inference.
"""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sb3_grpo_plugin.api.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "sb3_grpo_session"
SESSION_SECONDS = 12 * 3600
# What can be read without a key: no data of the server's, only what a person needs to log in
PUBLIC = frozenset({"/", "/health", "/session", "/login", "/docs", "/redoc", "/openapi.json", "/dashboard", "/favicon.ico"})
PUBLIC_FOLDERS = ("/dashboard/", "/static/", "/vendor/")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
HOST = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::\d{1,5})?", re.IGNORECASE)
# Wrong keys that one address may send in a minute
KEY_FAILURES, KEY_FAILURE_SECONDS = 20, 60.0
# Addresses and sessions that are remembered
REMEMBERED = 10_000
SESSIONS = 1000
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
POLICY = (
    b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    b"frame-ancestors 'none'"
)
# Swagger UI and ReDoc are started by a script inside the page; neither page shows what a user wrote
DOCS_POLICY = POLICY + b"; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; worker-src 'self' blob:"


class Refusal(Exception):
    """
    Ends a request before it reaches a route.

    :param status: of the answer
    :param detail: one sentence
    :param headers: more headers of the answer
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


class Sessions:
    """
    Browser sessions, in memory: a restart logs out. Only digests of their tokens are kept.
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[str, float] = OrderedDict()

    @staticmethod
    def _digest(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    def open(self) -> str:
        """
        :return: the token of a new session
        """
        token = secrets.token_urlsafe(32)
        self._ends[self._digest(token)] = time.monotonic() + SESSION_SECONDS
        while len(self._ends) > SESSIONS:
            self._ends.popitem(last=False)
        return token

    def valid(self, token: str) -> bool:
        """
        :param token: from a cookie
        :return: whether its session is open
        """
        return self._ends.get(self._digest(token), 0.0) > time.monotonic()

    def close(self, token: str) -> None:
        """
        :param token: from a cookie
        """
        self._ends.pop(self._digest(token), None)


class RateLimit:
    """
    A bucket per client address: ``rate`` requests per second, as many at once.

    :param rate: requests per second, 0 for no limit
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> bool:
        """
        :param address: of the client
        :return: whether it may go on
        """
        if not self.rate:
            return True
        now = time.monotonic()
        left, at = self._buckets.pop(address, (max(self.rate, 1.0), now))
        left = min(max(self.rate, 1.0), left + (now - at) * self.rate)
        allowed = left >= 1
        self._buckets[address] = (left - allowed, now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return allowed


class KeyCheck:
    """
    The API key, compared in constant time, and the wrong guesses of each address.

    :param key: the key, ``None`` when none is needed
    """

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else key.encode()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def required(self) -> bool:
        return self._key is not None

    def check(self, given: str, address: str) -> bool:
        """
        :param given: what the client sent
        :param address: of the client
        :return: whether it is the key
        :raises Refusal: 429, that address has guessed too often
        """
        if self._key is None:
            return True
        now = time.monotonic()
        failures = self._failures.setdefault(address, deque(maxlen=KEY_FAILURES))
        if len(failures) == KEY_FAILURES and now - failures[0] < KEY_FAILURE_SECONDS:
            wait = int(KEY_FAILURE_SECONDS - (now - failures[0])) + 1
            raise Refusal(429, f"Too many wrong keys; wait {wait} seconds.", {"Retry-After": str(wait)})
        # Equal lengths for a comparison that takes the same time whatever was sent
        right = hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(self._key).digest())
        if right:
            self._failures.pop(address, None)
        else:
            failures.append(now)
            while len(self._failures) > REMEMBERED:
                self._failures.popitem(last=False)
        return right


def header(scope: Scope, name: bytes) -> str:
    """
    :param scope: of a request
    :param name: in lower case
    :return: the header's value, empty when it is not there
    """
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


def cookie(scope: Scope) -> str:
    """
    :param scope: of a request
    :return: the token of the session cookie, empty when there is none
    """
    for part in header(scope, b"cookie").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def address_of(scope: Scope) -> str:
    """
    :param scope: of a request
    :return: the client's address, without its port
    """
    return (scope.get("client") or ("",))[0]


class Guard:
    """
    The middleware.

    :param app: what comes behind
    :param settings: of the server
    :param sessions: of browsers
    :param keys: check of the API key
    """

    def __init__(self, app: Any, settings: Settings, sessions: Sessions, keys: KeyCheck) -> None:
        self.app = app
        self.sessions = sessions
        self.keys = keys
        self.names = settings.host_names()
        self.rate = RateLimit(settings.rate_limit)
        self.max_body = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # There is no websocket here
            await send({"type": "websocket.close", "code": 1008})
            return
        policy = DOCS_POLICY if scope["path"] in ("/docs", "/redoc") else POLICY

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(pair for pair in HEADERS if pair[0] not in names),
                    (b"content-security-policy", policy),
                ]
            await send(message)

        try:
            self.check_head(scope)
            if scope["method"] not in SAFE_METHODS:
                receive = await self.read_body(scope, receive)
        except Refusal as refusal:
            await respond(refusal, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def check_head(self, scope: Scope) -> None:
        """
        :param scope: of a request
        :raises Refusal: of its Host, rate, Origin or key
        """
        host = header(scope, b"host")
        if not self.host_allowed(host):
            raise Refusal(400, "The Host header names another machine; SB3_GRPO_ALLOWED_HOSTS lists further names.")
        address = address_of(scope)
        if not self.rate.take(address):
            raise Refusal(429, "Too many requests from this address; slow down.", {"Retry-After": "1"})
        origin = header(scope, b"origin")
        if scope["method"] not in SAFE_METHODS:
            if origin and origin.partition("://")[2].lower() != host.lower():
                raise Refusal(400, "The request comes from a page of another origin.")
            if not origin and header(scope, b"sec-fetch-site") not in ("", "same-origin", "none"):
                raise Refusal(400, "The request comes from a page of another site.")
        path = scope["path"]
        if self.keys.required and path not in PUBLIC and not path.startswith(PUBLIC_FOLDERS):
            self.check_key(scope, address)

    def host_allowed(self, host: str) -> bool:
        """
        :param host: a Host header
        :return: whether it is this machine, and no name that somebody else can let point here
        """
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["six"] or match["name"]).lower()
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def check_key(self, scope: Scope, address: str) -> None:
        """
        :param scope: of a request
        :param address: of the client
        :raises Refusal: it carries neither the key nor an open session
        """
        kind, _, given = header(scope, b"authorization").partition(" ")
        if kind.lower() == "bearer" and given:
            if self.keys.check(given.strip(), address):
                return
            raise Refusal(401, "The API key is wrong.", {"WWW-Authenticate": "Bearer"})
        if not self.sessions.valid(cookie(scope)):
            raise Refusal(
                401, "This needs the API key: send `Authorization: Bearer KEY`, or log in.", {"WWW-Authenticate": "Bearer"}
            )

    async def read_body(self, scope: Scope, receive: Receive) -> Receive:
        """
        :param scope: of a request
        :param receive: its channel
        :return: a channel that gives the body in one piece
        :raises Refusal: it is too large, or not JSON
        """
        length = header(scope, b"content-length")
        if length.isdigit() and int(length) > self.max_body:
            raise Refusal(413, f"The body has {int(length)} bytes; at most {self.max_body} are taken.")
        chunks, size = [], 0
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return receive_again([message], receive)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.max_body:
                raise Refusal(413, f"The body is larger than {self.max_body} bytes.")
            chunks.append(chunk)
            more = message.get("more_body", False)
        if size and header(scope, b"content-type").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The body must be JSON, with Content-Type: application/json.")
        return receive_again([{"type": "http.request", "body": b"".join(chunks), "more_body": False}], receive)


def receive_again(messages: list[Message], receive: Receive) -> Receive:
    """
    :param messages: that were read already
    :param receive: where more come from
    :return: a channel that gives them first
    """

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again


async def respond(refusal: Refusal, send: Send) -> None:
    """
    :param refusal: to answer with
    :param send: channel of the request
    """
    body = json.dumps({"detail": refusal.detail}).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
