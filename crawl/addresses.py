"""Which address a name is fetched from, and which addresses are never touched.

In: host name and port of a URL. Out: addresses to connect to. A name is resolved once, every address it has must be
public, and the connection goes to the very address that was judged, so that a second answer of the name server
changes nothing. The same holds at each redirect, which is a new fetch.

`resolver` maps a name ('a.example') or name and port ('a.example:8080') to 'address', 'address:port' or '[v6]:port',
for mirrors, tests and demonstrations. Its addresses are judged like all others: private ones need `allow_networks`.
Cost: one getaddrinfo per name and `CACHE_S`, in the thread pool of the event loop.
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import InputError, RetryableError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

CACHE_S = 300.0  # chosen, untested: longer than a host's run of pages, shorter than most DNS changes matter
CACHE_NAMES = 10_000
DNS_TIMEOUT_S = 10.0
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
WEB_PORTS = frozenset({80, 443})


class RefusedError(InputError):
    """A URL that must not or need not be fetched. `reason` is one of address, robots, type, length, ..."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"crawl: refused ({reason}): {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Target:
    """Where to connect: judged addresses in the order to try, and the port."""

    addresses: tuple[str, ...]
    port: int


@dataclass
class Addresses:
    """Resolves and judges. `allow` holds networks that are fetched from although they are not public."""

    resolver: Mapping[str, str] = field(default_factory=dict)
    allow: Sequence[Network] = ()
    _cache: dict[tuple[str, int], tuple[float, Target]] = field(default_factory=dict)

    async def target(self, host: str, port: int) -> Target:
        """Where to connect; `RefusedError` for an address or port out of bounds, `RetryableError` for no answer."""
        held = self._cache.get((host, port))
        if held and held[0] > time.monotonic():
            return held[1]
        found = await self._resolve(host, port)
        for address in found.addresses:
            if not self.is_allowed(ipaddress.ip_address(address)):
                raise RefusedError("address", f"{host} is at {address}, which is not public")
        if len(self._cache) >= CACHE_NAMES:
            self._cache.clear()
        self._cache[host, port] = (time.monotonic() + CACHE_S, found)
        return found

    async def _resolve(self, host: str, port: int) -> Target:
        entry = self.resolver.get(f"{host}:{port}")
        if entry is None:
            if port not in WEB_PORTS:
                raise RefusedError("address", f"port {port} of {host} is neither 80 nor 443")
            entry = self.resolver.get(host)
        if entry is not None:
            return parse_entry(entry, port)
        if literal := _literal(host):
            return Target((literal,), port)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DNS_TIMEOUT_S):
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError) as e:
            raise RetryableError(f"crawl: {host} has no address, got {e!r}; tried again later") from e
        return Target(tuple(dict.fromkeys(str(info[4][0]).partition("%")[0] for info in infos)), port)

    def is_allowed(self, address: Address) -> bool:
        """Public, or inside `allow`. An IPv6 address that carries an IPv4 one is judged by what it carries."""
        inner = unwrap(address)
        if any(inner in network for network in self.allow if inner.version == network.version):
            return True
        return inner.is_global and not inner.is_multicast and not inner.is_reserved


def unwrap(address: Address) -> Address:
    """The IPv4 address inside a mapped, NAT64, 6to4 or Teredo address; otherwise the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)


def _literal(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return None


def parse_entry(entry: str, port: int) -> Target:
    """'1.2.3.4', '1.2.3.4:80', '::1' or '[::1]:80' of the resolver table; ValueError for anything else."""
    if literal := _literal(entry):
        return Target((literal,), port)
    host, _, own_port = entry.rpartition(":")
    return Target((str(ipaddress.ip_address(host.strip("[]"))),), int(own_port))
