"""Rendezvous of a team: what gloo and NCCL exchange to connect its processes travels over the team's own authenticated connections.

A TCPStore of torch listens on all interfaces and serves whatever process connects, so that a stranger could read and change the addresses
that the processes connect to. `TeamStore` listens nowhere. The processes of one machine connect over its loopback interface.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from ser_core.parallel.team import Team

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class TeamStore(Store):
    """The store of `torch.distributed` over a team: the operations that gloo and NCCL use to form a group of a fixed size.

    Each key is set once. The methods raise ConnectionError if a process of the team is lost, or does not answer within `seconds`.
    """

    def __init__(self, team: Team, seconds: float) -> None:
        super().__init__()
        self._team = team
        self._seconds = seconds
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._known[key] = data
        self._team.post(key, base64.b64encode(data).decode())

    def get(self, key: str) -> bytes:
        return self._found(key, self._seconds)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._found(key, self._seconds if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        try:
            self.wait(keys, timedelta(0))
        except ConnectionError:
            return False
        return True

    def clone(self) -> TeamStore:
        return self

    def _found(self, key: str, seconds: float) -> bytes:
        if key not in self._known:
            self._known[key] = base64.b64decode(self._team.find(key, seconds))
        return self._known[key]


def rendezvous(team: Team, seconds: float) -> tuple[TeamStore, str]:
    """Return the store shared by all processes of the team, and this machine's IPv4 address on the network that connects them.

    A process on the leader's machine reaches the leader over loopback: if the team has other machines too, its address is the leader's.
    """
    leaders = team.share(team.address)
    return TeamStore(team, seconds), leaders if is_loopback(team.address) else team.address


def interfaces() -> dict[str, str]:
    """Return interface name -> IPv4 address of the interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                found[name] = socket.inet_ntoa(fcntl.ioctl(control.fileno(), SIOCGIFADDR, request)[20:24])
    return found


@contextlib.contextmanager
def interface_for_gloo(address: str) -> Iterator[None]:
    """Context in which gloo uses the interface of `address`, unless GLOO_SOCKET_IFNAME is already set.

    By default gloo uses the address of the host name, which on many nodes is a loopback address that no other node can reach.
    """
    by_interface = interfaces()
    name = next((name for name, own in by_interface.items() if own == address), "")
    if not name and is_loopback(address):  # any address of 127.0.0.0/8 belongs to the loopback interface
        name = next((name for name, own in by_interface.items() if is_loopback(own)), "")
    if not name or GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[GLOO_INTERFACE] = name
    try:
        yield
    finally:
        os.environ.pop(GLOO_INTERFACE, None)


def is_loopback(address: str) -> bool:
    """Whether an IPv4 address leads to the machine that uses it."""
    return address.startswith("127.")
