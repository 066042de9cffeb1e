"""Which addresses are fetched from."""

import asyncio
import ipaddress

import pytest

from core.errors import RetryableError
from crawl.addresses import Addresses, RefusedError, Target, parse_entry, unwrap

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


def target(addresses: Addresses, host: str, port: int = 80) -> Target:
    return asyncio.run(addresses.target(host, port))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.1.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(RefusedError, match="not public"):
        target(Addresses(), host)
    with pytest.raises(RefusedError, match="not public"):
        target(Addresses(resolver={"name": address}), "name")


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"])
def test_public_addresses_pass(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert target(Addresses(), host) == Target((str(ipaddress.ip_address(address)),), 80)


def test_allowed_networks_open_their_addresses_only() -> None:
    addresses = Addresses(allow=LOOPBACK)
    assert target(addresses, "127.0.0.9").addresses == ("127.0.0.9",)
    assert target(addresses, "[::ffff:127.0.0.9]").addresses == ("::ffff:7f00:9",)
    with pytest.raises(RefusedError):
        target(addresses, "[::1]")


def test_a_name_with_one_private_address_is_refused() -> None:
    with pytest.raises(RefusedError) as error:
        target(Addresses(), "localhost")  # the system's own resolver
    assert error.value.reason == "address"


def test_a_name_without_addresses_may_have_some_later() -> None:
    with pytest.raises(RetryableError, match="no address"):
        target(Addresses(), "no-such-name.invalid")
    with pytest.raises(RetryableError, match="no address"):
        target(Addresses(), "a" * 70 + ".test")  # no label is that long


@pytest.mark.parametrize("port", [22, 25, 6379, 8080])
def test_ports_other_than_the_webs_need_a_line_in_the_resolver(port: int) -> None:
    with pytest.raises(RefusedError, match="neither 80 nor 443"):
        target(Addresses(resolver={"h": "1.1.1.1:99"}), "h", port)
    assert target(Addresses(resolver={f"h:{port}": "1.1.1.1"}), "h", port) == Target(("1.1.1.1",), port)


def test_a_judged_answer_is_kept_and_a_refusal_is_not() -> None:
    table = {"h": "1.1.1.1"}
    addresses = Addresses(resolver=table)
    assert target(addresses, "h") == Target(("1.1.1.1",), 80)
    table["h"] = "127.0.0.1"  # a name that is bound anew must not move a connection
    assert target(addresses, "h") == Target(("1.1.1.1",), 80)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("1.2.3.4", Target(("1.2.3.4",), 80)),
        ("1.2.3.4:8000", Target(("1.2.3.4",), 8000)),
        ("::1", Target(("::1",), 80)),
        ("[::1]", Target(("::1",), 80)),
        ("[::1]:8000", Target(("::1",), 8000)),
    ],
)
def test_resolver_entries(entry: str, expected: Target) -> None:
    assert parse_entry(entry, 80) == expected


@pytest.mark.parametrize("entry", ["", "name", "name:80", "1.2.3.4:x", "1.2.3:80"])
def test_bad_resolver_entries(entry: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of ipaddress or int
        parse_entry(entry, 80)


def test_unwrap() -> None:
    wrapped = {"2001:0:0:0:0:0:80ff:fffe": "127.0.0.1", "2002:102:304::": "1.2.3.4", "64:ff9b::1.2.3.4": "1.2.3.4"}
    for outer, inner in wrapped.items():
        assert str(unwrap(ipaddress.ip_address(outer))) == inner
