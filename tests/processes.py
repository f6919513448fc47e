"""What the processes of a cluster show to others: listening sockets and command lines, from /proc."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

LISTEN = "0A"
PROC = Path("/proc")


def descendants(pid: int) -> list[int]:
    """A process and everything below it."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may itself hold spaces and brackets.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found.extend(children.get(one, []))
    return found


def listening(pids: list[int]) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """Address and port of every TCP or UDP socket on which the processes wait for others."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in (PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(descriptor.readlink()))
    return [(address, port) for inode, address, port in _sockets() if f"socket:[{inode}]" in inodes]


def _sockets() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if table.startswith("tcp") and fields[3] != LISTEN:
                continue
            digits, port = fields[1].split(":")
            # The kernel prints words of 32 bits in the machine's order.
            words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
            packed = b"".join(socket.htonl(word).to_bytes(4, "big") for word in words)
            address = ipaddress.ip_address(packed)
            if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
                address = address.ipv4_mapped
            yield fields[9], address, int(port, 16)


def command_lines(pids: list[int]) -> str:
    """What ``ps`` shows of the processes to every user of the machine."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found.append((PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return "\n".join(found)
