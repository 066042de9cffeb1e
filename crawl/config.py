"""The knobs of a crawl, each declared once. Times in seconds, sizes in bytes."""

import ipaddress
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from core.stage import ConfigPath, execution

from .addresses import Network, parse_entry
from .fetch import DOCUMENT_BYTES, TEXT_BYTES
from .robots import product_token
from .warc import ROLL_BYTES

BodyKind = Literal["html", "pdf", "epub", "txt"]


class CrawlConfig(BaseModel):
    """What to crawl, how politely, and where to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[str, ...] = Field(default=(), description="URLs to begin with")
    seeds_file: ConfigPath | None = execution(None, "a file of seed URLs, one a line, # for comments")
    user_agent: str = Field(
        description="`name/version (+contact)`: the product token of robots.txt files, and a URL or mail address"
    )
    scope: Literal["seeds", "listed", "any"] = Field(default="seeds", description="hosts that links may lead to")
    hosts: tuple[str, ...] = Field(default=(), description="for scope `listed`; `.example.org` stands for all below it")
    kinds: tuple[BodyKind, ...] = Field(
        default=("html", "pdf", "epub", "txt"), description="types whose bodies are kept"
    )

    max_pages: int = Field(default=1000, ge=1, description="answers kept, of any status, without robots.txt")
    max_bytes: int = Field(default=10_000_000_000, ge=1, description="bytes received, robots.txt included")
    max_s: float = Field(default=86_400.0, gt=0, description="running time, summed over restarts")
    max_depth: int = Field(default=16, ge=0, description="links away from a seed")
    max_pages_per_host: int = Field(default=1_000_000, ge=1, description="answers kept of one host")
    max_redirects: int = Field(default=5, ge=0, description="redirects in a row")
    text_bytes: int = Field(default=TEXT_BYTES, ge=1, description="cap of one html or txt body, received and decoded")
    document_bytes: int = Field(default=DOCUMENT_BYTES, ge=1, description="cap of one pdf or epub body")

    delay_s: float = Field(default=1.0, ge=0, description="between two requests to one host, from the end of the first")
    delay_factor: float = Field(
        default=2.0, ge=0, description="a host that answers in t seconds rests factor * t, at most 30 (Heritrix uses 5)"
    )
    max_crawl_delay_s: float = Field(default=300.0, ge=0, description="cap of Crawl-delay (Heritrix: 300)")
    address_delay_s: float = Field(
        default=0.1, ge=0, description="between two requests to one address; chosen, untested (BUbiNG: 0.5)"
    )
    max_tries: int = Field(default=5, ge=1, description="requests for one page that meets faults")
    retry_s: float = Field(default=30.0, gt=0, description="first wait after a fault; doubles, at most 3600")
    breaker_s: float = Field(default=900.0, ge=0, description="rest of a host after five faults in a row")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="to open a connection, TLS included")
    read_timeout_s: float = Field(default=20.0, gt=0, description="without a byte")
    total_timeout_s: float = Field(default=60.0, gt=0, description="of one exchange")

    warc_bytes: int = Field(default=ROLL_BYTES, ge=1, description="a WARC file that reached it is closed")
    allow_networks: tuple[str, ...] = Field(default=(), description="CIDR ranges to fetch from though not public")
    resolver: dict[str, str] = execution(
        {}, "name or name:port to `address` or `address:port`, asked before the name server"
    )
    resolver_file: ConfigPath | None = execution(None, "a JSON object that is added to `resolver`")
    concurrency: int = execution(64, "exchanges at once, each to another host")
    ca_file: str | None = execution(None, "PEM file of certificate authorities instead of the system's")

    @field_validator("user_agent")
    @classmethod
    def _names_a_contact(cls, value: str) -> str:
        if product_token(value) in ("", "mozilla") or not ("@" in value or "://" in value):
            raise ValueError(
                f"crawl: user_agent lacks a name or a contact, got {value!r}, expected e.g. mybot/1.0 (+https://example.org/bot)"
            )
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"crawl: user_agent must be printable ASCII, got {value!r}")
        return value

    @field_validator("allow_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value

    @field_validator("resolver")
    @classmethod
    def _are_addresses(cls, value: dict[str, str]) -> dict[str, str]:
        for entry in value.values():
            parse_entry(entry, 80)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.concurrency < 1:
            raise ValueError(f"crawl: concurrency is too small, got {self.concurrency}, expected at least 1; raise it")
        if not self.seeds and self.seeds_file is None:
            raise ValueError("crawl: nothing to begin with, got neither seeds nor seeds_file; name one")
        if (self.scope == "listed") != bool(self.hosts):
            raise ValueError(
                f"crawl: hosts go with scope 'listed', got scope {self.scope!r} and {len(self.hosts)} hosts"
            )
        return self

    @property
    def networks(self) -> tuple[Network, ...]:
        return tuple(ipaddress.ip_network(network) for network in self.allow_networks)
