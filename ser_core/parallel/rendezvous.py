"""How the processes of a team find each other: a store at the leader, on a port that the kernel gives, known by a token of its own.

No port is fixed, so that two jobs on one node cannot meet, and an address that leads to another job's store (every node has a loopback,
many have the same bridge) is told by the token.
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

from ser_core.parallel.team import Team

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
CONNECT_SECONDS = 10.0  # seconds to try one address of the leader
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def rendezvous(team: Team, seconds: float) -> tuple[TCPStore, str]:
    """The store that all processes of the team share, and this machine's address on the network that leads there.

    Raises ConnectionError where the leader or one of the others cannot be reached within `seconds`.
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
        raise ConnectionError(f"process {team.rank} of {team.size}: {str(error).splitlines()[0]}") from error
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
            refused.append(f"{address}: {str(error).splitlines()[0]}")
            continue
        store.set_timeout(limit)
        store.set(f"reached/{team.rank}", theirs)
        return store, own
    raise ConnectionError(f"process {team.rank} of {team.size}: no way to the leader at port {port} ({'; '.join(refused)})")


def addresses() -> list[str]:
    """Addresses of this machine: of the interface that gloo is told to use, that of the default route, the others, its name, loopback."""
    by_interface = interfaces()
    preferred = [os.environ.get(GLOO_INTERFACE, ""), _default_interface()]
    ordered = sorted(by_interface, key=lambda name: preferred.index(name) if name in preferred else len(preferred))
    outside = [by_interface[name] for name in ordered if not _is_loopback(by_interface[name])]
    return list(dict.fromkeys([*outside, socket.gethostname(), "127.0.0.1"]))


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of the network interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # it has no address
                found[name] = socket.inet_ntoa(fcntl.ioctl(control.fileno(), SIOCGIFADDR, request)[20:24])
    return found


@contextlib.contextmanager
def interface_for_gloo(address: str) -> Iterator[None]:
    """Have gloo use the interface of an address of ours, where nobody has told it otherwise.

    By itself it takes what the machine's own name stands for, which on many is a loopback that no other node can reach.
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
