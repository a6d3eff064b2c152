"""Messages over a socket: what goes in comes out, and what is no message is refused without harm."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla_rl.runtime import wire
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import (
    ARRAY,
    DTYPES,
    LARGEST_FRAME,
    VERSION,
    Connection,
    ConnectionLostError,
    WireError,
    connect,
    is_loopback,
    listen,
    pack,
    parse_address,
    serve_one,
    unpack,
)

ANY_ARRAY = st.sampled_from(DTYPES).flatmap(
    lambda name: arrays.arrays(np.dtype(name), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | ANY_ARRAY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@given(content=PLAIN)
@settings(max_examples=80, deadline=None)
def test_what_is_packed_comes_out_again(content: Any) -> None:
    assert same({"content": content}, unpack(pack({"content": content})))


def test_objects_are_no_data() -> None:
    with pytest.raises(TypeError, match="plain data and arrays of float32"):
        pack({"x": object()})
    with pytest.raises(TypeError, match="float32"):
        pack({"x": np.array([object()], dtype=object)})


def array(name: Any, shape: Any, data: Any) -> bytes:
    return msgpack.packb({"x": {ARRAY: name, "shape": shape, "data": data}})


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"\xc1", "cannot be read"),
        (pack({"x": 1})[:-1], "cannot be read"),
        (msgpack.packb([1, 2]), "a message is a map, got list"),
        (array("object", [1], b"12345678"), "dtype 'object'"),
        (array("float32", [2], b"1234"), "4 bytes for an array of float32"),
        (array("float32", [-1], b""), "shape"),
        (array("float32", 1, b"1234"), "dtype 'float32'"),
        (array("float32", [10**12], b"1234"), "4 bytes for an array"),
        (array(["float32"], [1], b"1234"), "dtype"),
    ],
)
def test_what_is_no_message_is_refused(frame: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        unpack(frame)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server for one client; returns its address."""
    opened: list[tuple[socket.socket, threading.Thread]] = []

    def start(answer: Callable[[dict[str, Any]], Mapping[str, Any]], token: str = "") -> str:
        sock = listen("127.0.0.1", 0, token)
        thread = threading.Thread(target=serve_one, args=(sock, token, answer), daemon=True)
        thread.start()
        opened.append((sock, thread))
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"

    yield start
    for sock, thread in opened:
        thread.join(5)
        assert not thread.is_alive(), "the server has not noticed that its client left"
        sock.close()


def test_requests_are_answered_and_errors_reach_the_client(serve: Callable[..., str]) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["x"] < 0:
            raise UserError("x wants a number >= 0")
        return {"twice": 2 * request["x"]}

    connection = connect(serve(answer), "")
    assert connection.ask({"x": 4})["twice"] == 8
    with pytest.raises(WireError, match="x wants a number >= 0"):
        connection.ask({"x": -1})
    assert connection.ask({"x": 5})["twice"] == 10
    connection.close()


def test_an_answer_that_came_late_leaves_the_next_message_its_time(serve: Callable[..., str]) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        return {}

    connection = connect(serve(answer), "")
    connection.ask({}, 2.0)
    assert connection._socket.gettimeout() == 2.0
    connection.close()


@pytest.mark.parametrize("mine", ["", "wrong"])
def test_a_client_without_the_token_is_refused(serve: Callable[..., str], mine: str) -> None:
    with pytest.raises(WireError, match="token is not the server's"):
        connect(serve(lambda request: {}, token="secret"), mine)


def test_a_client_with_the_token_is_let_in(serve: Callable[..., str]) -> None:
    connection = connect(serve(lambda request: {"well": True}, token="secret"), "secret")
    assert connection.ask({})["well"]
    connection.close()


def test_the_token_is_proved_and_never_sent_and_a_server_that_does_not_know_it_is_left() -> None:
    sock = listen("127.0.0.1", 0, "")
    heard: list[bytes] = []

    def impostor() -> None:
        accepted, _ = sock.accept()
        with accepted:
            heard.append(accepted.recv(65536))
            frame = pack({"version": VERSION, "nonce": bytes(32), "proof": bytes(32)})
            accepted.sendall(struct.pack(">Q", len(frame)) + frame)
            heard.append(accepted.recv(65536))

    thread = threading.Thread(target=impostor, daemon=True)
    thread.start()
    with pytest.raises(WireError, match="token is not the server's"):
        connect(f"tcp://127.0.0.1:{sock.getsockname()[1]}", "TOP-SECRET")
    thread.join(5)
    sock.close()
    assert heard[0]
    assert heard[1] == b"", "nothing more is said to it"
    assert b"TOP-SECRET" not in heard[0]


def test_a_proof_is_of_this_greeting_and_of_this_side(serve: Callable[..., str]) -> None:
    """What the server itself proved, sent back to it, opens nothing."""
    stranger = Connection(raw(serve(lambda request: {}, token="secret")))
    hello = stranger.ask({"protocol": "vla-rl", "version": VERSION, "nonce": bytes(32)}, 5.0)
    with pytest.raises(WireError, match="token is not the server's"):
        stranger.ask({"proof": hello["proof"]}, 5.0)
    stranger.close()


def test_a_peer_that_vanishes_is_missed_after_a_minute() -> None:
    """Both ends ask a silent peer whether it is there: a machine that lost its power says no farewell."""
    ends = socket.create_server(("127.0.0.1", 0))
    mine = Connection(socket.create_connection(ends.getsockname()))
    theirs = Connection(ends.accept()[0])
    for connection in (mine, theirs):
        sock = connection._socket
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        found = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in wire.KEEPALIVE]
        assert found[0] + found[1] * found[2] == 60
        connection.close()
    ends.close()


def test_a_stranger_who_trickles_is_left(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on the greeting, not on each of its bytes."""
    monkeypatch.setattr(wire, "GREETING_S", 0.4)
    stranger = raw(serve(lambda request: {}))
    stranger.settimeout(5)
    stranger.sendall(struct.pack(">Q", 4000))
    started = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - started < 5:
            stranger.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - started < 3
    stranger.close()


def test_it_says_whether_a_client_was_let_in() -> None:
    sock = listen("127.0.0.1", 0, "")
    address = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    found: list[bool] = []
    for stranger in (True, False):
        thread = threading.Thread(target=lambda: found.append(serve_one(sock, "", lambda request: {})), daemon=True)
        thread.start()
        (raw(address) if stranger else connect(address, "")).close()
        thread.join(5)
    sock.close()
    assert found == [False, True]


def raw(address: str) -> socket.socket:
    return socket.create_connection(parse_address(address), 5)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (pack({"protocol": "vla-rl", "version": 99, "nonce": bytes(32)}), f"speaks version {VERSION}, the client 99"),
        (pack({"protocol": "other", "version": VERSION}), f"speaks version {VERSION}"),
        (pack({"protocol": "vla-rl", "version": VERSION, "nonce": b"short"}), "nonce of 32 bytes"),
        (b"\xc1\xc1", "cannot be read"),
    ],
)
def test_a_stranger_is_told_why_it_is_refused(serve: Callable[..., str], sent: bytes, words: str) -> None:
    stranger = Connection(raw(serve(lambda request: {})))
    stranger._socket.sendall(struct.pack(">Q", len(sent)) + sent)
    with pytest.raises(WireError, match=words):
        stranger.receive(5.0)
    stranger.close()


@pytest.mark.parametrize("size", [LARGEST_FRAME + 1, 5000])
def test_a_stranger_cannot_make_the_server_hold_much(serve: Callable[..., str], size: int) -> None:
    stranger = Connection(raw(serve(lambda request: {})))
    stranger._socket.sendall(struct.pack(">Q", size))
    with pytest.raises(WireError, match=f"{size} bytes was announced; the largest is 4096"):
        stranger.receive(5.0)
    stranger.close()


def test_a_message_that_is_cut_short_ends_the_connection(serve: Callable[..., str]) -> None:
    heard: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        heard.append(request)
        return {}

    connection = connect(serve(answer), "")
    connection._socket.sendall(struct.pack(">Q", 100) + b"half")
    connection.close()
    assert not heard


def test_a_server_that_is_silent_or_gone_is_an_error() -> None:
    ours, theirs = socket.create_server(("127.0.0.1", 0)), None
    address = f"tcp://127.0.0.1:{ours.getsockname()[1]}"
    with pytest.raises(ConnectionLostError, match="does not answer in time"):
        connect(address, "", timeout_s=0.2)
    theirs, _ = ours.accept()
    theirs.close()
    ours.close()
    with pytest.raises(ConnectionLostError, match="nobody answers"):
        connect(address, "", timeout_s=0.5)


def test_others_are_let_in_with_a_token_only() -> None:
    with pytest.raises(UserError, match="wants a token"):
        listen("0.0.0.0", 0, "")
    listen("0.0.0.0", 0, "token").close()
    for port in (70000, -1):
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port, "")
    with pytest.raises(ConnectionLostError, match=r"nobody answers at tcp://a\.\.b:7"):
        connect("tcp://a..b:7", "")
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example")


@pytest.mark.parametrize("text", ["nowhere", "host:", ":7", "tcp://host:port", "host:70000"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="an address looks like"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("tcp://127.0.0.1:70") == ("127.0.0.1", 70)
    assert parse_address("[::1]:70") == ("::1", 70)
