"""A small rosbridge server for tests of our client's behaviour; that the two agree proves nothing about real servers.

It does what the protocol says and, where asked, what real servers do instead: complaints in ``/rosout``, fragments whose total is no whole
number, no word about strings in ROS 1's CBOR. ``Proxy`` stands for a network that can stop.
"""

from __future__ import annotations

import base64
import contextlib
import http
import json
import math
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import cbor2
import numpy as np
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.sync.server import ServerConnection, serve

from real_robot.messages import PRIMITIVES, conform, message_types

Says = Literal["log", "status", "nothing"]
LEVEL = {1: 8, 2: 40}  # of an error in /rosout


class Client:
    """A connection, and what it has on the server."""

    def __init__(self, connection: ServerConnection, number: int) -> None:
        self.connection, self.number = connection, number
        self.subscribed: dict[str, dict[str, Any]] = {}
        self.advertised: set[str] = set()
        self.parts: dict[str, dict[int, str]] = {}

    def send(self, frame: str | bytes) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            self.connection.send(frame)


class Server:
    """Serves on loopback within ``with``; ``ops`` is all that clients have sent.

    Args:
        ros: whose names and types it uses.
        says: how it complains.
        token: that the header must have.
        fragment: characters of a frame above which it sends fragments.
        services: what answers to their arguments, by name; a ValueError is a failure.
    """

    def __init__(
        self,
        ros: int = 2,
        says: Says = "log",
        *,
        port: int = 0,
        token: str = "",
        redirect: str = "",
        context: ssl.SSLContext | None = None,
        fragment: int = 10**7,
        largest: int = 2**20,
        services: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
    ) -> None:
        self.ros, self.says, self.fragment, self.services = ros, says, fragment, services or {}
        self.token, self.redirect = token, redirect
        self.ops: list[dict[str, Any]] = []
        self.headers: list[Headers] = []
        self.types: dict[str, str] = {}  # of topics, as this ROS writes them
        self.clients: list[Client] = []
        self._count = 0
        self._lock = threading.RLock()
        self._server = serve(
            self._serve,
            "127.0.0.1",
            port,
            ssl=context,
            process_request=self._admit,
            max_size=largest,
            compression=None,
            close_timeout=0.2,
        )
        self.port = self._server.socket.getsockname()[1]
        self.url = f"{'ws' if context is None else 'wss'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End as a crash would: no farewells."""
        with self._lock:
            clients = tuple(self.clients)
        for client in clients:
            client.connection.close_socket()
        self._server.shutdown()

    def _admit(self, connection: ServerConnection, request: Any) -> Response | None:
        self.headers.append(request.headers)
        if self.redirect:
            return Response(http.HTTPStatus.FOUND, "Found", Headers(Location=self.redirect, Content_Length="0"))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "no\n")
        return None

    def _serve(self, connection: ServerConnection) -> None:
        with self._lock:
            client = Client(connection, self._count)
            self._count += 1
            self.clients.append(client)
        try:
            for frame in connection:
                self._take(client, json.loads(frame))
        except ConnectionClosed:
            pass
        finally:
            with self._lock:
                self.clients.remove(client)

    def _take(self, client: Client, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "fragment":
            parts = client.parts.setdefault(message["id"], {})
            parts[message["num"]] = message["data"]
            if len(parts) == message["total"]:
                self._take(client, json.loads("".join(parts[i] for i in sorted(parts))))
            return
        with self._lock:
            self.ops.append(message)
            known = ["advertise", "unadvertise", "publish", "subscribe", "unsubscribe", "call_service"]
            known += ["set_level"] if self.says == "status" else []
            if op not in known:
                self._complain(client, message, f"Unknown operation: {op}.  Allowed operations: {known}")
                return
            try:
                getattr(self, f"_{op}", lambda *_: None)(client, message)
            except ValueError as error:
                self._complain(client, message, f"{op}: {error}")

    def _complain(self, client: Client, message: dict[str, Any], text: str) -> None:
        mark = message.get("id")
        if self.says == "status":
            client.send(json.dumps({"op": "status", "level": "error", "msg": text, "id": mark}))
        elif self.says == "log":
            self.log(f"[Client {client.number}] [id: {mark}] {text}")

    def log(self, text: str, level: int = 0, node: str = "rosbridge_websocket") -> None:
        """Write a line into ROS's log."""
        line: dict[str, Any] = {"level": level or LEVEL[self.ros], "name": node, "msg": text}
        line |= {"header": {"seq": 1}, "name": f"/{node}"} if self.ros == 1 else {"stamp": {"sec": 1, "nanosec": 0}}
        for other in self.clients:
            if "/rosout" in other.subscribed:
                other.send(json.dumps({"op": "publish", "topic": "/rosout", "msg": line}))

    def _settle(self, message: dict[str, Any]) -> None:
        topic, kind = message["topic"], message.get("type")
        if kind is not None and self._table(kind) not in message_types():
            raise ValueError(f"Unable to import {kind}")
        if kind is not None and self.types.setdefault(topic, kind) != kind:
            raise ValueError(
                f"Tried to register topic {topic} with type {kind} but it is already established with type {self.types[topic]}"
            )

    def _table(self, kind: str) -> str:
        return kind.replace("/", "/msg/") if self.ros == 1 else kind

    def _advertise(self, client: Client, message: dict[str, Any]) -> None:
        self._settle(message)
        client.advertised.add(message["topic"])

    def _unadvertise(self, client: Client, message: dict[str, Any]) -> None:
        client.advertised.discard(message["topic"])

    def _subscribe(self, client: Client, message: dict[str, Any]) -> None:
        if message["topic"] != "/rosout":
            self._settle(message)
        client.subscribed[message["topic"]] = message

    def _unsubscribe(self, client: Client, message: dict[str, Any]) -> None:
        client.subscribed.pop(message["topic"], None)

    def _publish(self, client: Client, message: dict[str, Any]) -> None:
        kind = self.types[message["topic"]]
        self.send(message["topic"], _plain(self._table(kind), message["msg"]))

    def _call_service(self, client: Client, message: dict[str, Any]) -> None:
        def answer() -> None:
            response = {"op": "service_response", "id": message["id"], "service": message["service"], "result": True}
            try:
                if message["service"] not in self.services:
                    raise ValueError(f"Service {message['service']} does not exist")
                response["values"] = self.services[message["service"]](message["args"])
            except ValueError as error:
                response |= {"values": str(error), "result": False}
            client.send(json.dumps(response))

        threading.Thread(target=answer, daemon=True).start()

    def send(self, topic: str, message: dict[str, Any]) -> None:
        """Publish a message (in our form) as a node of ROS would."""
        with self._lock:
            kind = self._table(self.types[topic])
            for client in self.clients:
                for frame in self._frames(client.subscribed.get(topic), kind, conform(kind, message)):
                    client.send(frame)

    def _frames(self, wanted: dict[str, Any] | None, kind: str, message: dict[str, Any]) -> Iterator[str | bytes]:
        if wanted is None:
            return
        told = {"op": "publish", "topic": wanted["topic"]}
        if wanted["compression"] == "cbor":
            with contextlib.suppress(ZeroDivisionError):  # a real server would only print it
                yield cbor2.dumps(told | {"msg": _wire(kind, message, self.ros, cbor=True)})
            return
        text = json.dumps(told | {"msg": _wire(kind, message, self.ros, cbor=False)}, allow_nan=False)
        if len(text) <= self.fragment:
            yield text
            return
        total = (len(text) - 1) / self.fragment + 1  # as real ones do
        for i in range(0, len(text), self.fragment):
            data = text[i : i + self.fragment]
            yield json.dumps({"op": "fragment", "id": 0, "data": data, "num": i // self.fragment, "total": total})

    def raw(self, frame: str | bytes) -> None:
        """Send a frame to all clients."""
        with self._lock:
            for client in self.clients:
                client.send(frame)

    def said(self, op: str, topic: str = "") -> list[dict[str, Any]]:
        """What clients have sent of an operation, for a topic."""
        with self._lock:
            return [m for m in self.ops if m["op"] == op and topic in ("", m.get("topic"))]


def _wire(kind: str, message: dict[str, Any], ros: int, *, cbor: bool) -> dict[str, Any]:
    if kind in ("builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration"):
        return {"secs": message["sec"], "nsecs": message["nanosec"]} if ros == 1 else dict(message)
    made: dict[str, Any] = {"seq": 7} if ros == 1 and kind == "std_msgs/msg/Header" else {}
    for field in message_types()[kind]:
        value = message[field.name]
        if field.kind not in PRIMITIVES:
            nested = [_wire(field.kind, item, ros, cbor=cbor) for item in (value if field.many else [value])]
            made[field.name] = nested if field.many else nested[0]
        elif field.many and field.kind == "uint8":
            made[field.name] = value if cbor else base64.b64encode(value).decode()
        elif field.many and field.kind == "string" and ros == 1 and cbor:
            raise ZeroDivisionError
        elif field.many and field.kind == "float64" and cbor:
            made[field.name] = cbor2.CBORTag(86, struct.pack(f"<{len(value)}d", *value))
        elif field.kind == "float64" and not cbor:
            numbers = [v if math.isfinite(v) else None for v in np.atleast_1d(value).tolist()]
            made[field.name] = numbers if field.many else numbers[0]
        else:
            made[field.name] = value
    return made


def _plain(kind: str, wire: dict[str, Any]) -> dict[str, Any]:
    made = {{"secs": "sec", "nsecs": "nanosec"}.get(key, key): value for key, value in wire.items()}
    for field in message_types()[kind]:
        if field.kind not in PRIMITIVES:
            nested = [_plain(field.kind, item) for item in (made[field.name] if field.many else [made[field.name]])]
            made[field.name] = nested if field.many else nested[0]
        elif field.many and field.kind == "uint8":
            made[field.name] = base64.b64decode(made[field.name])
    return made


class Proxy:
    """A network between client and server, which ``freeze`` stops without a word."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._flows.wait()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._flows.wait()
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Let nothing through any more."""
        self._flows.clear()

    def thaw(self) -> None:
        """Undo ``freeze``."""
        self._flows.set()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._flows.set()
        for sock in self._sockets:
            sock.close()
