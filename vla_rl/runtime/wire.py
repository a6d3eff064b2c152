"""Messages between processes and machines: msgpack with arrays, never pickle; capped in size, greeted by version and token.

A frame is its length (8 bytes, big-endian) and a msgpack map of plain data and arrays; arrays are maps of dtype, shape and bytes, of the
dtypes below only. Nothing that arrives can name code to run. A server listens on loopback unless it is told otherwise, and then wants a
token. The token itself is never sent: each side proves by an HMAC over both sides' random numbers that it knows it, so that an address
that a checkpoint or a stranger names learns nothing. What follows is neither encrypted nor signed: between machines it belongs in a tunnel.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import math
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from vla_rl.runtime.errors import UserError

VERSION = 3
LARGEST_FRAME = 512 * 2**20  # bytes
LARGEST_GREETING = 4096  # bytes that a stranger may make us hold
# seconds of silence, between questions, and questions after which a peer that is waited for counts as gone; no TCP_USER_TIMEOUT, which
# ends connections to peers that do not read for a while
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
GREETING_S = 10.0  # that a stranger may take for each of its two messages
DTYPES = ("float32", "float64", "int64", "int32", "int16", "uint8", "bool")
ARRAY = "__array__"
NONCE = 32  # bytes
MOST_ENVS = 4096  # of a client
_LENGTH = struct.Struct(">Q")


class WireError(UserError):
    """What came is no message of this protocol, too large, or of another version; or the other side refused."""


class OversizeError(WireError):
    """A message is larger than what is read; it stays in the stream."""


class ConnectionLostError(WireError):
    """The other side is gone, or does not answer in time."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message of plain data, bytes and arrays as bytes."""
    return msgpack.packb(message, default=_pack_array, use_bin_type=True)


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        return {ARRAY: value.dtype.name, "shape": list(value.shape), "data": np.ascontiguousarray(value).tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a message holds plain data and arrays of {', '.join(DTYPES)}, got {type(value).__name__}")


def unpack(frame: bytes) -> dict[str, Any]:
    """Undo ``pack``; raise WireError for anything else."""
    try:
        message = msgpack.unpackb(frame, raw=False, strict_map_key=False, object_hook=_unpack_array)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"a message that cannot be read: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(message, dict):
        raise WireError(f"a message is a map, got {type(message).__name__}")
    return message


def _unpack_array(value: dict[str, Any]) -> Any:
    if ARRAY not in value:
        return value
    name, shape, data = value[ARRAY], value.get("shape"), value.get("data")
    if name not in DTYPES or not isinstance(data, bytes) or not isinstance(shape, list):
        raise ValueError(f"an array of dtype {name!r}; there are {', '.join(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    if len(data) != math.prod(shape) * np.dtype(name).itemsize:
        raise ValueError(f"{len(data)} bytes for an array of {name} and shape {shape}")
    return np.frombuffer(data, name).reshape(shape).copy()


class Connection:
    """One end of a socket that carries messages."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is gone says no farewell:
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # some systems lack one
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._socket = sock

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raise ConnectionLostError if nobody is there."""
        frame = pack(message)
        if len(frame) > LARGEST_FRAME:
            raise WireError(f"a message of {len(frame)} bytes; the largest is {LARGEST_FRAME}")
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise ConnectionLostError(f"the connection is lost: {error}") from error

    def receive(self, timeout_s: float | None = None, largest: int = LARGEST_FRAME) -> dict[str, Any]:
        """Wait for a message.

        Args:
            timeout_s: how long for all of it (None: for ever).
            largest: bytes that it may have.

        Raises:
            ConnectionLostError: the other side is gone, was cut off in the middle of a message, or too slow.
            OversizeError: what is announced is too large, and stays unread: the connection is of no more use.
            WireError: what came is no message; an ``error`` in it is raised as one.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if size > largest:
            raise OversizeError(f"a message of {size} bytes was announced; the largest is {largest}")
        frame = self._read(size, deadline)
        self._socket.settimeout(timeout_s)  # what is sent next has its time anew, not what this answer has left
        message = unpack(frame)
        if "error" in message:
            raise WireError(str(message["error"]))
        return message

    def ask(self, message: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Send a message and wait for the answer."""
        self.send(message)
        return self.receive(timeout_s)

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise ConnectionLostError("the other side does not answer in time")
            try:
                self._socket.settimeout(left)
                more = self._socket.recv(min(size - len(parts), 2**20))
            except TimeoutError as error:
                raise ConnectionLostError("the other side does not answer in time") from error
            except OSError as error:
                raise ConnectionLostError(f"the connection is lost: {error}") from error
            if not more:
                raise ConnectionLostError("the other side has closed the connection")
            parts += more
        return bytes(parts)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def parse_address(text: str) -> tuple[str, int]:
    """``tcp://host:port`` or ``host:port``; raises UserError for anything else."""
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"an address looks like tcp://host:port, got {text!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connect(address: str, token: str, timeout_s: float = 10.0) -> Connection:
    """Connect to a server and greet it; raises WireError (ConnectionLostError if nobody is there)."""
    host, port = parse_address(address)
    try:
        connection = Connection(socket.create_connection((host, port), timeout_s))
    except (OSError, UnicodeError) as error:
        raise ConnectionLostError(f"nobody answers at {address}: {error}") from error
    try:
        mine = secrets.token_bytes(NONCE)
        hello = connection.ask({"protocol": "vla-rl", "version": VERSION, "nonce": mine}, timeout_s)
        theirs, proof = hello.get("nonce"), hello.get("proof")
        if not isinstance(theirs, bytes) or not isinstance(proof, bytes):
            raise WireError(f"what answers at {address} is no server of this protocol")
        if not hmac.compare_digest(proof, _proof(token, b"server", mine, theirs)):
            raise WireError(f"the token is not the server's at {address}")
        connection.ask({"proof": _proof(token, b"client", mine, theirs)}, timeout_s)
    except WireError:
        connection.close()
        raise
    return connection


def _proof(token: str, side: bytes, client: bytes, server: bytes) -> bytes:
    """That a side knows the token."""
    return hmac.digest(token.encode(), side + client + server, "sha256")


def listen(host: str, port: int, token: str) -> socket.socket:
    """Open a server's socket (port 0: any that is free).

    Raises:
        UserError: others than this machine could reach it and there is no token, or the address is taken.
    """
    if not is_loopback(host) and not token:
        raise UserError(f"a server that listens on {host} can be reached by others and wants a token (--token-file)")
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from error


def serve_one(sock: socket.socket, token: str, answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> bool:
    """Serve the next client until it leaves; return whether it was let in. Errors that its requests cause are sent back to it.

    Args:
        sock: from ``listen``.
        token: that a client has to know.
        answer: of a request.
    """
    accepted, _ = sock.accept()
    connection = Connection(accepted)
    greeted = False
    try:
        _greet(connection, token)
        greeted = True
        while True:
            request = connection.receive()
            try:
                reply = answer(request)
            except (UserError, ValueError) as error:
                reply = {"error": " ".join(str(error).split())}
            connection.send(reply)
    except ConnectionLostError:
        pass  # it has left
    except WireError as error:
        _refuse(connection, str(error))
    finally:
        connection.close()
    return greeted


def _greet(connection: Connection, token: str) -> None:
    hello = connection.receive(GREETING_S, LARGEST_GREETING)
    said = hello.get("protocol"), hello.get("version")
    if [type(value) for value in said] != [str, int] or said != ("vla-rl", VERSION):  # a stranger may send anything
        raise WireError(f"this server speaks version {VERSION}, the client {hello.get('version')!r}")
    theirs, mine = hello.get("nonce"), secrets.token_bytes(NONCE)
    if not isinstance(theirs, bytes) or len(theirs) != NONCE:
        raise WireError(f"a greeting holds a nonce of {NONCE} bytes")
    connection.send({"version": VERSION, "nonce": mine, "proof": _proof(token, b"server", theirs, mine)})
    proof = connection.receive(GREETING_S, LARGEST_GREETING).get("proof")
    if not isinstance(proof, bytes) or not hmac.compare_digest(proof, _proof(token, b"client", theirs, mine)):
        raise WireError("the token is not the server's")
    connection.send({"version": VERSION})


def _refuse(connection: Connection, why: str) -> None:
    with contextlib.suppress(ConnectionLostError):
        connection.send({"error": why})


def read_token(path: Path | None) -> str:
    """The token in a file, or none."""
    if path is None:
        return ""
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(f"cannot read the token in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds no token: it is no text") from error
    if not token:
        raise UserError(f"{path} holds no token")
    return token
