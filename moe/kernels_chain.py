"""Kernels that follow each other in a chain: each is launched while the one before still runs, and loads its weights meanwhile.

Programmatic dependent launch, on NVIDIA GPUs from compute capability 9 on; elsewhere, and under Triton's interpreter, the same
kernels run one after the other. In: a kernel's constant CHAINED and a launch's arguments. A kernel of the chain

    1. calls `release`: the next one may begin as soon as every program of this one has come so far;
    2. loads what no kernel writes, weights and gains;
    3. calls `wait`: from here on whatever the one before wrote is seen.

All else, stores above all, stands behind the wait. Since every program of every kernel waits, whoever has waited knows that
all earlier kernels have ended, not only the last one. A kernel that is none of the chain begins when the last one has ended.
Results are those of unchained launches, bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe.kernels import dependents

CHAINS = True  # False: launches as everywhere else, for comparison


@triton.jit
def release(CHAINED: tl.constexpr) -> None:
    """The next kernel may begin once every program of this one has called it."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def wait(CHAINED: tl.constexpr) -> None:
    """Until all kernels before have ended."""
    if CHAINED:
        gdc_wait()


def chained(x: Tensor) -> dict[str, bool]:
    """A launch's arguments on the device of `x`."""
    return {"CHAINED": True, "launch_pdl": True} if CHAINS and dependents(x.device) else {"CHAINED": False}
