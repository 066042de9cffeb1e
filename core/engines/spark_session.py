"""Starts and ends the Spark of the `spark` engine: which master, which Python, and where its messages go.

In: scratch folder, workers, memory, and the master's address or none. Out: a session. What Java and Spark have to say, which is
much, goes to `spark.log` in the scratch folder: a terminal shows errors of ours only. Start-up takes about 10 s.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from core.engines.environment import environment
from core.errors import ConfigError, RetryableError, StageError, StepwellError

# Said at import already, of a package that nothing here uses: frames are Arrow.
warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)

try:
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession
except ImportError as e:
    raise ConfigError(
        f"spark: cannot be imported here ({e}); install this project with the extra `spark`, or use --engine local"
    ) from e

JAVA_ENDED = (Py4JError, OSError)  # among what py4j raises where Java has ended by itself
BATCH_PIECES = 10_000  # of one Arrow batch between Spark and Python, where they are small
BATCH_BYTES = 16 << 20  # and the bytes where they are not
DRIVER_SHARE = 0.5  # of memory_gb for Java; the Python workers live beside it
# of a task whose worker died; Spark's own default on clusters, its default of 1 on `local` finds no killer
ATTEMPTS = 4
END_S = 20.0  # for Java to end by itself
KNOCK_S = 5.0  # for a master to take a connection: chosen, untested
# Java moves pieces here and has no loop of its own that is worth C2: without it, start-up and the first frame take half the CPU.
JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC"
LOCAL = re.compile(r"local(?:\[(\d+|\*)\])?")


def start_session(scratch: Path, spills: Path, workers: int, memory_gb: float, address: str | None) -> SparkSession:
    """The running session, or a new one; `spills` is for a master of our own. ConfigError where there is no Java, RetryableError
    where the master does not answer."""
    if (running := SparkSession.getActiveSession()) is not None:
        return running
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit started Java and this process
    if not submitted and shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise ConfigError("spark: no Java found, expected 17 or newer; install a JRE (Debian: openjdk-17-jre-headless)")
    scratch.mkdir(parents=True, exist_ok=True)
    log = scratch / "spark.log"
    asked = submitted or "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    if address and not asked:
        _knock(address)
    conf = SparkConf().setAll(list(_settings(spills, memory_gb, asked, workers, address).items()))
    python = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}  # or workers start another Python
    elsewhere = asked or (address and not _is_here(address))
    place = {} if elsewhere else {"SPARK_LOCAL_IP": "127.0.0.1", "PYTHONPATH": _paths()}
    gateway = None
    try:
        with environment(**python, **place), log.open("wb") as out:
            gateway = launch_gateway(conf, {"stdout": out, "stderr": out})
            context = SparkContext(conf=_defaults(SparkConf(_jvm=gateway.jvm), conf), gateway=gateway)
    except Exception as e:
        if not isinstance(e, PySparkException | Py4JError | OSError):
            raise
        if gateway is not None:
            _end_java(gateway)  # or every later start in this process would speak to it
        reason = str(e).splitlines()[0][:300]
        raise ConfigError(
            f"spark: cannot start on {address or 'this machine'}: {reason}; its log is {log}; check Java (17 or newer) and "
            "`engine.address`"
        ) from e
    context.setLogLevel("ERROR")
    return SparkSession.builder.getOrCreate()


def end_session(session: SparkSession) -> None:
    """Stop the session, and the Java that `start_session` started for it: it would live as long as this process."""
    context: Any = session.sparkContext
    gateway = context._gateway
    with contextlib.suppress(*JAVA_ENDED):
        session.stop()
    _end_java(gateway)


def ended_early(error: Exception, label: str) -> StageError | None:
    """The error for a Java that is not there any more."""
    if not isinstance(error, Py4JNetworkError | OSError):
        return None
    return StageError(
        f"{label}: Java has ended; see `spark.log` in the scratch folder, and where memory is the cause give the engine more "
        "memory_gb, then run the same command again"
    )


def _end_java(gateway: Any) -> None:
    java: subprocess.Popen[bytes] | None = getattr(gateway, "proc", None)
    if java is None:
        return  # spark-submit's
    with contextlib.suppress(*JAVA_ENDED):
        gateway.shutdown()
    SparkContext._gateway = SparkContext._jvm = None
    assert java.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        java.stdin.close()  # Java ends at the end of its input
    try:
        java.wait(END_S)
    except subprocess.TimeoutExpired:
        java.kill()
        java.wait()


def _settings(spills: Path, memory_gb: float, asked: bool, workers: int, address: str | None) -> dict[str, str]:
    settings = {
        "spark.app.name": "stepwell",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.adaptive.enabled": "false",  # the partition count is ours
        # A frame has some hundred rows in Spark's eyes: to generate and compile code for them, or to compress them, costs more.
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.inMemoryColumnarStorage.compressed": "false",
        "spark.sql.inMemoryColumnarStorage.enableVectorizedReader": "false",
        # Pieces of some MB go through these between Java and Python.
        "spark.python.unix.domain.socket.enabled": "true",
        "spark.buffer.size": str(1 << 20),
        "spark.driver.defaultJavaOptions": JAVA,
        "spark.executor.defaultJavaOptions": JAVA,
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_PIECES),
        "spark.sql.execution.arrow.maxBytesPerBatch": str(BATCH_BYTES),
        # What `core.engines.worker` sets with mallopt for the workers of `local`, by its reasons and figures.
        "spark.executorEnv.MALLOC_MMAP_THRESHOLD_": str(4 << 20),
        "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    }
    if asked:
        return settings
    memory = {"spark.driver.memory": f"{max(512, round(memory_gb * 1024 * DRIVER_SHARE))}m"}
    here = {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    here["spark.executorEnv.PYTHONPATH"] = _paths()
    if address:
        return {**settings, **memory, **(here if _is_here(address) else {}), "spark.master": address}
    return {
        **settings,
        **memory,
        **here,
        "spark.master": f"local[{workers},{ATTEMPTS}]",
        "spark.local.dir": str(spills.resolve()),
    }


def _defaults(given: SparkConf, ours: SparkConf) -> SparkConf:
    """`ours` over what spark-submit and spark-defaults.conf gave, but for Java's options; a local master is told to try tasks
    again."""
    for key, value in ours.getAll():
        if not (key.endswith("defaultJavaOptions") and given.contains(key)):
            given.set(key, value)
    if local := LOCAL.fullmatch(given.get("spark.master") or ""):
        given.set("spark.master", f"local[{local[1] or 1},{ATTEMPTS}]")
    return given


def _knock(address: str) -> None:
    """RetryableError if no standalone master of `address` listens, for it may be starting: Spark would go on trying for minutes.
    ConfigError if there is none that could be asked."""
    if not address.startswith("spark://"):
        return
    reasons: list[str] = []
    kind: type[StepwellError] = ConfigError
    for one in address.removeprefix("spark://").split(","):
        host, _, port = one.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
            return
        except OSError as e:
            kind = RetryableError
            reasons.append(f"{one}: {e}")
        except (ValueError, OverflowError) as e:
            reasons.append(f"{one}: {e}")
    raise kind(
        f"spark: cannot reach a master at {address} ({'; '.join(reasons)}); check `engine.address`, as in spark://HOST:7077"
    )


def _is_here(address: str) -> bool:
    """Whether a master listens on loopback: then all of its cluster is this machine."""
    return address.startswith(("spark://127.0.0.1:", "spark://localhost:"))


def _paths() -> str:
    """Workers on this machine import what this process can."""
    return os.pathsep.join(p for p in sys.path if p)
