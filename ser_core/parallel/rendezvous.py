"""Rendezvous of a team: the leader opens a TCPStore on a free port and shares its addresses, port and a random token.

There is no fixed port, so two jobs on a node cannot collide. The token detects an address that leads to another job's store: every node has
a loopback address, and many have the same bridge address.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ser_core.errors import first_line
from ser_core.parallel.team import Team

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
CONNECT_SECONDS = 10.0  # timeout for one address of the leader
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def rendezvous(team: Team, seconds: float) -> tuple[TCPStore, str]:
    """Return the store shared by all processes of the team, and this node's address on the network that connects them.

    Raises ConnectionError if the leader or another process cannot be reached within `seconds`.
    """
    limit = timedelta(seconds=seconds)
    try:
        if team.rank:
            return _connect_to_leader(team, limit)
        store = TCPStore("127.0.0.1", 0, None, True, timeout=limit, wait_for_workers=False)
        token = secrets.token_hex(16)
        store.set(token, "")
        team.share(json.dumps({"addresses": addresses(), "port": store.port, "token": token}))
        reached = [store.get(f"reached/{rank}").decode() for rank in range(1, team.size)]
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        raise ConnectionError(f"process {team.rank} of {team.size}: {first_line(error)}") from error
    return store, next((address for address in reached if not _is_loopback(address)), reached[0])


def _connect_to_leader(team: Team, limit: timedelta) -> tuple[TCPStore, str]:
    leader = json.loads(team.share())
    port, refused = int(leader["port"]), []
    for address in leader["addresses"]:
        try:
            with socket.create_connection((address, port), CONNECT_SECONDS) as probe:
                own, theirs = str(probe.getsockname()[0]), str(probe.getpeername()[0])
            store = TCPStore(address, port, None, False, timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False)
            if not store.check([leader["token"]]):
                refused.append(f"{address}: the store of another job")
                continue
        except (OSError, RuntimeError) as error:
            refused.append(f"{address}: {first_line(error)}")
            continue
        store.set_timeout(limit)
        store.set(f"reached/{team.rank}", theirs)
        return store, own
    raise ConnectionError(f"process {team.rank} of {team.size}: no way to the leader at port {port} ({'; '.join(refused)})")


def addresses() -> list[str]:
    """Addresses of this node in order of preference: gloo's configured interface, default route, other interfaces, host name, loopback."""
    by_interface = interfaces()
    preferred = [os.environ.get(GLOO_INTERFACE, ""), _default_interface()]
    ordered = sorted(by_interface, key=lambda name: preferred.index(name) if name in preferred else len(preferred))
    outside = [by_interface[name] for name in ordered if not _is_loopback(by_interface[name])]
    return list(dict.fromkeys([*outside, socket.gethostname(), "127.0.0.1"]))


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
    name = next((name for name, own in interfaces().items() if own == address), "")
    if not name or GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[GLOO_INTERFACE] = name
    try:
        yield
    finally:
        os.environ.pop(GLOO_INTERFACE, None)


def _default_interface() -> str:
    try:
        routes = [line.split() for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]]
    except OSError:
        return ""
    return next((route[0] for route in routes if len(route) > 1 and route[1] == "00000000"), "")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
