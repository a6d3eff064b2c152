"""One websocket to a rosbridge server: how it is made, and how it is seen to be dead.

A link is alive as long as anything arrives on it: pings go out all the time, and a server answers them. One that is given up is reset,
not closed, so that what the system still holds of it is thrown away: a command that a dead network kept must not come out of it later.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import secrets
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from real_robot.transports._rosbridge_wire import fragments
from real_robot.transports.base import TransportError
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import is_loopback, read_token

if TYPE_CHECKING:
    from real_robot.transports.rosbridge import RosbridgeConfig

PINGS = 5  # within link_timeout_s
CLOSE_S = 0.5  # that a server may take for its part of the farewell
TOO_BIG = 1009  # close code of RFC 6455
_numbers = itertools.count()


class LostError(TransportError):
    """The link is no more; the message says why."""


class OversizeError(LostError):
    """A message was larger than this side, or the server, takes."""


def require_url(text: str, token: bool, certificates: bool) -> None:
    """Raise ValueError for what is no address of a server, or one that a token or certificates must not, or cannot, go with."""
    try:
        url = urlsplit(text)
        fits = url.scheme in ("ws", "wss") and url.hostname and url.port != 0 and not url.fragment
    except ValueError:
        fits = False
    if not fits or any(c.isspace() for c in text):
        raise ValueError(f"url wants ws://HOST:PORT or wss://HOST:PORT, got {text!r}")
    if url.username is not None or url.password is not None:
        raise ValueError("url wants no name or password in it; a token goes into token_file")
    if certificates and url.scheme != "wss":
        raise ValueError(f"ca_file is for wss://, the url is {text!r}")
    if token and url.scheme != "wss" and not is_loopback(url.hostname or ""):
        raise ValueError(f"token_file wants wss:// to another machine, or all can read the token; got {text!r}")


def header_token(path: Path | None) -> str:
    """The token in a file, if there is one; raises UserError for an empty file, or a token that fits in no header."""
    token = read_token(path)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{path} wants one token of printable ASCII, without spaces")
    return token


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Whom to trust: who has a certificate of the file's, or of the system's authorities; the host's name is checked too."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # of ssl too
        raise UserError(f"cannot read certificates in {ca_file}: {error.strerror or error}") from error


class Link:
    """An open websocket.

    Attributes:
        heard_s: when anything last arrived, of ``time.monotonic``.
        patience_s: how long nothing may come; what connecting may take, until somebody relies on the link.
    """

    def __init__(self, config: RosbridgeConfig, token: str, context: ssl.SSLContext | None) -> None:
        """Connect; raises TransportError where nobody answers, or the answer is no."""
        self._config = config
        self._gone = threading.Event()
        self._stack = contextlib.ExitStack()
        self._handle: socket.socket | None = None
        try:
            self._connection = self._connect(token, context)
        except TransportError:
            self.reset()
            raise
        self.heard_s, self.patience_s = time.monotonic(), max(config.connect_timeout_s, config.link_timeout_s)
        self._pinger = threading.Thread(target=self._ping, name="rosbridge-ping", daemon=True)
        self._pinger.start()

    def _connect(self, token: str, context: ssl.SSLContext | None) -> Any:
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        config, url = self._config, urlsplit(self._config.url)
        port = url.port or (443 if url.scheme == "wss" else 80)
        try:
            sock = socket.create_connection((url.hostname, port), config.connect_timeout_s)
            self._handle = sock.dup()  # the websocket closes its own
            _limit_sending(sock, config.link_timeout_s)
            return self._stack.enter_context(
                connect(  # a socket that is there already goes through no proxy and follows no redirect, which may leak the token
                    config.url,
                    sock=sock,
                    ssl=context,
                    compression=None,  # costs more than it saves on what robots send
                    additional_headers={"Authorization": f"Bearer {token}"} if token else None,
                    open_timeout=config.connect_timeout_s,
                    ping_interval=None,
                    close_timeout=CLOSE_S,
                    max_size=config.max_message_bytes,
                )
            )
        except InvalidStatus as error:
            status = error.response.status_code
            wanted = "; does it want another token_file?" if status in (401, 403) else ""
            raise TransportError(f"{config.url} refuses the websocket with HTTP status {status}{wanted}") from error
        except OSError as error:
            raise TransportError(f"no rosbridge server answers at {config.url}: {str(error) or 'timed out'}") from error
        except (WebSocketException, ValueError) as error:
            raise TransportError(f"what answers at {config.url} is no rosbridge server: {error}") from error

    def _ping(self) -> None:
        from websockets.exceptions import ConnectionClosed

        period_s = self._config.link_timeout_s / PINGS
        while not self._gone.wait(period_s):
            try:
                pong = self._connection.ping(ack_on_close=True)
            except (ConnectionClosed, OSError):
                return  # ``receive`` says why
            while not pong.wait(period_s):
                if self._gone.is_set():
                    return
            self.heard_s = time.monotonic()

    def receive(self, wait_s: float) -> tuple[str | bytes, float] | None:
        """The next frame and when it came, or None where none comes within ``wait_s`` (or less).

        Raises:
            LostError: the link is no more, or nothing at all has come for ``patience_s``.
            OversizeError: a message was too large for either side.
        """
        from websockets.exceptions import ConnectionClosed

        period_s = self._config.link_timeout_s / PINGS
        begun_s, wait_s = time.monotonic(), min(wait_s, period_s)
        try:
            frame = self._connection.recv(timeout=wait_s)
        except TimeoutError:
            now_s = time.monotonic()
            held_up = now_s - begun_s > wait_s + period_s  # this process, so it cannot judge
            if now_s - self.heard_s > self.patience_s - period_s and not held_up:
                raise LostError(f"nothing has come from it for {now_s - self.heard_s:.1f} s") from None
            return None
        except ConnectionClosed as error:
            raise self._why(error) from error
        self.heard_s = time.monotonic()
        return frame, self.heard_s

    def _why(self, error: Any) -> LostError:
        closed = error.rcvd if error.rcvd_then_sent else error.sent  # by who began; the other side repeats it
        if closed is not None and closed.code == TOO_BIG:
            if error.rcvd_then_sent:
                return OversizeError("the server takes no message as large as ours; lower fragment_bytes")
            return OversizeError(
                f"the server sent a message of more than {self._config.max_message_bytes} bytes; subscribe to compressed "
                "pictures, or raise max_message_bytes"
            )
        return LostError(" ".join(f"{error.__cause__ or error}".split()))

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, in fragments where it is large; raises LostError where the link is no more, or takes nothing in time."""
        from websockets.exceptions import ConnectionClosed

        try:
            text = json.dumps(message, separators=(",", ":"), allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise UserError(f"rosbridge carries plain data and finite numbers only: {error}") from error
        # a server keeps fragments of all its clients in one table
        name = f"{secrets.token_hex(4)}:{next(_numbers)}" if len(text) > self._config.fragment_bytes else ""
        try:
            for frame in fragments(text, name, self._config.fragment_bytes):
                self._connection.send(frame)
        except (ConnectionClosed, OSError) as error:
            raise LostError(" ".join(f"{error.__cause__ or error}".split())) from error

    def ask(self, request: dict[str, Any], timeout_s: float, read: Any) -> dict[str, Any]:
        """Call a service on a link where nobody else receives, and wait for its response; raises TransportError where none comes."""
        self.send(request)
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            got = self.receive(until_s - time.monotonic())
            response = None if got is None else read(got[0])
            if (
                response is not None
                and response.get("op") == "service_response"
                and response.get("id") == request["id"]
            ):
                return response
        raise TransportError(f"service {request['service']} did not answer within {timeout_s:g} s")

    def close(self) -> None:
        """Say farewell for no longer than ``CLOSE_S`` or so, then reset."""
        self._gone.set()
        farewell = threading.Thread(target=self._stack.close, name="rosbridge-farewell", daemon=True)
        farewell.start()  # it may have to wait for one that is sending
        farewell.join(2 * CLOSE_S)
        self.reset()
        farewell.join(CLOSE_S)
        self._pinger.join(CLOSE_S)

    def reset(self) -> None:
        """End the link at once; who sends or receives on it gets LostError."""
        self._gone.set()
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with contextlib.suppress(OSError):  # the other side may have ended it already
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handle.shutdown(socket.SHUT_RDWR)
        handle.close()


def _limit_sending(sock: socket.socket, seconds: float) -> None:
    """Make the system give up what it cannot deliver in time, and a sender not wait for longer."""
    whole = math.floor(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole, int((seconds - whole) * 1e6)))
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1e3))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")
