"""Connections between the launchers of a run on several nodes.

The launcher of node 0, the head, listens. Those of the other nodes connect to it and stay
connected, so that each side notices at once when the other ends. Messages are lines of JSON.
"""

from __future__ import annotations

import json
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
    token: str
    """Identifies the step, so that launchers of other jobs are refused."""


class Link:
    """A connection to another launcher. Raises nothing: a connection that fails is closed.

    Args:
        connection: a connected socket.
        unread: bytes that were received already.
    """

    def __init__(self, connection: socket.socket, unread: bytes = b"") -> None:
        self._connection = connection
        self._rest = unread
        self._selector: selectors.BaseSelector | None = None
        self._received: Callable[[Message], None] = lambda _message: None
        self._closed: Callable[[], None] = lambda: None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.settimeout(_SEND_TIMEOUT_S)

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
            self._connection.sendall(_encode(message))
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
            message = _decode(line)
            if message is not None and self._connection.fileno() >= 0:
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
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(node) for node in range(1, num_nodes) if node not in links]
                where = f"{meeting.address}:{server.getsockname()[1]}"
                raise NodesError(
                    f"nodes {', '.join(missing)} did not connect to {where} within {JOIN_TIMEOUT_S:g} s. "
                    "Check that kempnerforge train was started on every node, "
                    "then start the same command again"
                ) from None
            hello, rest = _first_message(connection)
            if hello is None or len(hello) != 4 or hello[:2] != ["join", meeting.token]:
                connection.close()
                continue
            node, ranks = hello[2:]
            links[node] = Link(connection, rest)
            if ranks != ranks_per_node:
                problem = (
                    f"node {node} starts {ranks} processes, and node 0 starts {ranks_per_node}. "
                    "Give --processes N to start as many on each node"
                )
                links[node].send("refused", problem)
                raise NodesError(problem)
            links[node].send("welcome", meeting.token)
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
            try:
                connection.sendall(_encode(["join", meeting.token, node_rank, ranks_per_node]))
            except OSError:
                connection.close()
                continue
            answer, rest = _first_message(connection)
            if answer == ["welcome", meeting.token]:
                return Link(connection, rest)
            if answer is not None and answer[0] == "refused":
                raise NodesError(str(answer[-1]))
            connection.close()  # another program listens there
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


def _first_message(connection: socket.socket) -> tuple[Message | None, bytes]:
    """Return the first message of a new connection, if it comes in time, and bytes after it."""
    connection.settimeout(_ANSWER_TIMEOUT_S)
    data = b""
    try:
        while b"\n" not in data and len(data) < _MAX_LINE_BYTES:
            received = connection.recv(4096)
            if not received:
                return None, b""
            data += received
    except OSError:
        return None, b""
    line, _, rest = data.partition(b"\n")
    return _decode(line), rest


def _encode(message: Sequence[Any]) -> bytes:
    return json.dumps(list(message)).encode() + b"\n"


def _decode(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, list) and message else None
