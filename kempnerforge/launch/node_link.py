"""Connections between the launchers of a run on several nodes.

The launcher of node 0, the head, listens. Those of the other nodes connect to it and stay
connected, so that each side notices at once when the other ends. Messages are lines of JSON, each
after an HMAC with a key that both sides know and neither sends. Other programs and other users may
listen at the ports, or connect to them: without the key they can only end a connection.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kempnerforge.errors import KempnerForgeError

Message = list[Any]
"""The kind of the message, and its value."""

JOIN_TIMEOUT_S = 600.0
"""How long to wait for the launchers of other nodes. Nodes of a large job start minutes apart."""
_ANSWER_TIMEOUT_S = 5.0
"""How long the first messages of a new connection may take together."""
_RETRY_S = 0.2
_SEND_TIMEOUT_S = 30.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""A node that loses power sends nothing: its connection is closed after about 30 s."""
_MAX_LINE_BYTES = 1 << 20


class NodesError(KempnerForgeError):
    """The launchers of all nodes did not find each other, or lost each other."""


@dataclass(frozen=True)
class Meeting:
    """Where and how the launchers of one job step meet."""

    address: str
    """The head."""
    ports: Sequence[int]
    """Ports to try, in order, because any of them may be in use."""
    key: bytes
    """Known to the launchers of this step only, so that others are refused."""


class _Authenticator:
    """Signs or verifies the messages of one direction of one connection, which arrive in order.

    The nonces of both sides make messages of other connections useless here, so a program between
    two launchers can pass messages on, but not change, repeat or add any.
    """

    def __init__(self, key: bytes, sender: bytes, nonces: Sequence[bytes]) -> None:
        self._key = hmac.digest(key, b"\n".join([sender, *nonces]), "sha256")
        self._count = 0

    def sign(self, body: bytes) -> bytes:
        """Return the line of the next message."""
        return self._next_code(body) + b" " + body + b"\n"

    def verify(self, line: bytes) -> Message | None:
        """Return the next message; None if its sender does not know the key."""
        code, _, body = line.partition(b" ")
        return json.loads(body) if hmac.compare_digest(code, self._next_code(body)) else None

    def _next_code(self, body: bytes) -> bytes:
        self._count += 1
        return hmac.digest(self._key, b"%d %s" % (self._count, body), "sha256").hex().encode()


class Link:
    """A connection to another launcher. Raises nothing: a connection that fails is closed.

    Args:
        connection: a connected socket.
        key: ``Meeting.key``. Without it, the other side's first message ends the connection.
        is_head: whether this is the side of node 0.
    """

    def __init__(self, connection: socket.socket, key: bytes, *, is_head: bool) -> None:
        self._connection = connection
        self._rest = b""
        self._deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        self._selector: selectors.BaseSelector | None = None
        self._received: Callable[[Message], None] = lambda _message: None
        self._closed: Callable[[], None] = lambda: None
        own, other = secrets.token_hex(32).encode(), b""
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            connection.settimeout(_SEND_TIMEOUT_S)
            connection.sendall(own + b"\n")
            other = self._first_line()
        except OSError:
            connection.close()
        nonces = [own, other] if is_head else [other, own]
        sides = [b"head", b"node"] if is_head else [b"node", b"head"]
        self._sent, self._arrived = (_Authenticator(key, side, nonces) for side in sides)

    def first_message(self) -> Message | None:
        """Wait for the first message. Return None if it does not come in time, or without the key."""
        try:
            message = self._arrived.verify(self._first_line())
        except OSError:
            message = None
        if message is None:
            self.close()
        return message

    def _first_line(self) -> bytes:
        """Return the next line of a new connection. Raises OSError if it does not come in time."""
        while b"\n" not in self._rest:
            remaining_s = self._deadline - time.monotonic()
            if remaining_s <= 0 or len(self._rest) > _MAX_LINE_BYTES:
                raise TimeoutError
            self._connection.settimeout(remaining_s)
            received = self._connection.recv(4096)
            if not received:
                raise ConnectionError
            self._rest += received
        self._connection.settimeout(_SEND_TIMEOUT_S)
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def watch(
        self,
        selector: selectors.BaseSelector,
        received: Callable[[Message], None],
        closed: Callable[[], None],
    ) -> None:
        """Call ``received`` with each message, and ``closed`` once when the connection ends."""
        self._selector, self._received, self._closed = selector, received, closed
        selector.register(self._connection, selectors.EVENT_READ, self._read)
        self._take(b"")

    def send(self, *message: Any) -> None:
        """Send a message."""
        if self._connection.fileno() < 0:
            return
        try:
            self._connection.sendall(self._sent.sign(json.dumps(message).encode()))
        except OSError:
            self._end()

    def close(self) -> None:
        """Close the connection without calling ``closed``."""
        if self._selector is not None and self._connection.fileno() >= 0:
            self._selector.unregister(self._connection)
        self._connection.close()

    def _read(self) -> None:
        try:
            data = self._connection.recv(_MAX_LINE_BYTES)
        except OSError:
            data = b""
        if not data or len(self._rest) > _MAX_LINE_BYTES:
            self._end()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._connection.fileno() < 0:
                return
            message = self._arrived.verify(line)
            if message is None:
                self._end()
            else:
                self._received(message)

    def _end(self) -> None:
        self.close()
        self._closed()


def accept_nodes(meeting: Meeting, num_nodes: int, ranks_per_node: int) -> dict[int, Link]:
    """Wait, on the head, until the launchers of all other nodes have connected. Return node -> link.

    Raises NodesError.
    """
    links: dict[int, Link] = {}
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    with _listen(meeting.ports) as server:
        while len(links) < num_nodes - 1:
            connection = _accept(server, deadline)
            if connection is None:
                missing = [str(node) for node in range(1, num_nodes) if node not in links]
                where = f"{meeting.address}:{server.getsockname()[1]}"
                raise NodesError(
                    f"nodes {', '.join(missing)} did not connect to {where} within {JOIN_TIMEOUT_S:g} s. "
                    "Look for errors that they printed, and check that kempnerforge train was started on "
                    "every node. Then start the same command again"
                )
            link = Link(connection, meeting.key, is_head=True)
            joined = link.first_message()
            if joined is None:
                continue
            node, ranks = joined
            links[node] = link
            if ranks != ranks_per_node:
                problem = (
                    f"node {node} starts {ranks} processes, and node 0 starts {ranks_per_node}. "
                    "Give --processes N to start as many on each node"
                )
                link.send("refused", problem)
                raise NodesError(problem)
            link.send("welcome")
    return links


def join_head(meeting: Meeting, node_rank: int, ranks_per_node: int) -> Link:
    """Connect to the head, which may not have started yet. Raises NodesError."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while time.monotonic() < deadline:
        for port in meeting.ports:
            try:
                connection = socket.create_connection((meeting.address, port), timeout=_ANSWER_TIMEOUT_S)
            except OSError:
                continue
            link = Link(connection, meeting.key, is_head=False)
            link.send(node_rank, ranks_per_node)
            answer = link.first_message()  # None if another program listens there
            if answer == ["welcome"]:
                return link
            if answer is not None:
                raise NodesError(str(answer[-1]))
        time.sleep(_RETRY_S)
    raise NodesError(
        f"the launcher of node 0 did not answer at {meeting.address} within {JOIN_TIMEOUT_S:g} s. "
        "Check that kempnerforge train was started on every node, then start the same command again"
    )


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server(("", port), backlog=65535)
        except OSError:  # in use
            continue
    raise NodesError(f"all ports from {min(ports)} to {max(ports)} that were tried are in use")


def _accept(server: socket.socket, deadline: float) -> socket.socket | None:
    """Return the next connection; None if there is none before the deadline."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        return None
    server.settimeout(remaining_s)
    try:
        return server.accept()[0]
    except TimeoutError:
        return None
