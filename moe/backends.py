"""What can run a model's decode steps where it lies: fused kernels, CUDA graphs.

In: a decoder. Out: whether, and if not why not; moe/decode.py chooses by it.
"""

import os

import torch

from moe.kernels import why_not
from moe.model import Decoder

# What one program of the kernels can hold: a router's weights, at 512 numbers a thread, and a head (chosen).
MOST_ROUTER, HEAD_DIMS = 2**17, range(16, 257)
SERVED = (torch.float32, torch.float16, torch.bfloat16)
GROUPED_BYTES = 16  # rows of grouped products are whole multiples, otherwise experts run one by one


def unserved(model: Decoder) -> str | None:
    """Why fused kernels cannot run this model where it is; None where they can."""
    config, weight = model.config, model.lm_head.weight
    router = (1 << (config.experts - 1).bit_length()) * (1 << (config.dim - 1).bit_length())
    if lacking := why_not(weight.device, interpreted=os.environ.get("TRITON_INTERPRET") == "1"):
        return lacking
    if {(p.dtype, p.is_contiguous()) for p in model.parameters()} != {
        (weight.dtype, True)
    } or weight.dtype not in SERVED:
        return f"its weights must be contiguous and of one dtype of 32 or 16 bits, got {weight.dtype}"
    if config.head_dim not in HEAD_DIMS or router > MOST_ROUTER:
        return f"a head of {config.head_dim} or a router of {config.experts} x {config.dim} is beyond them"
    if config.router_dtype != "float32" or any(m.exchange is not None for m in model.routed):
        return "the router must be in float32 and all experts here"
    return None


def capturable(model: Decoder) -> bool:
    """Whether the model's own layers can run in a CUDA graph, where nothing may be read back.

    Experts one by one read how many rows each has; so does torch's grouped product of 32 bits (2.11).
    """
    width, config = model.lm_head.weight.element_size(), model.config
    odd = any(n * width % GROUPED_BYTES for n in (config.dim, config.expert_dim))
    return not model.routed or (width == 2 and not odd and all(m.backend != "loop" for m in model.routed))
