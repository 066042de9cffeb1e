"""The parts of a config that belong to no stage: the engine, and the lines of a policy."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from core.stage import ConfigPath


class EngineConfig(BaseModel):
    """How to run: nothing here changes a byte of the output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="local", pattern="^(local|ray|spark)$", description="local, ray or spark")
    workers: int = Field(default=0, ge=0, description="worker processes; 0: one per core")
    memory_gb: float = Field(default=4.0, gt=0, description="memory shared by all workers")
    partition_mb: float = Field(
        default=128.0, gt=0, description="MiB of rows in one partition of a shuffle; smaller ones take less memory each"
    )
    batch_mb: float = Field(default=64.0, gt=0, description="MiB of text that a kernel is given at once, at most")
    stall_s: float = Field(default=600.0, gt=0, description="a worker that gives no sign for so long is replaced")
    scratch: ConfigPath | None = Field(
        default=None, description="local folder for spills; default: exchange/ below a local root"
    )
    address: str | None = Field(
        default=None, description="cluster to join (Ray address, Spark master); default: start one here"
    )


class Rule(BaseModel):
    """One line of a policy: either a predicate that drops, or a preset of such lines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: str | None = Field(default=None, description="documents for which this predicate holds fall")
    reason: str | None = Field(default=None, description="the reason recorded; required with `drop`")
    use: str | None = Field(default=None, description="a preset: gopher_quality, gopher_repetition, c4, fineweb")
    thresholds: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's thresholds")
    datasets: tuple[str, ...] | None = Field(default=None, description="only documents of these datasets")
