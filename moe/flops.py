"""What the decoder computes: parameters, floating point operations a token, utilisation, and the paper's table.

In: a `ModelConfig` and a number of positions. Out: exact counts. A multiplication with an addition is two operations.
Counted are products with weight matrices and, in attention, scores and weighted values: for each query and each key that
it sees, 4 * heads * head_dim. A row of T positions is one document here: packed rows with shorter ones do less work than
is counted for their full layers, by the usual convention. Norms, rotations, softmax and activations are not counted.
Training is three times the forward pass (the backward pass makes two products for each of its own); recomputation does
not count, so the utilisation is that of the model, not of the hardware (MFU; PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from moe.config import ModelConfig
from moe.hub_config import ROUTER_BIAS, shapes

TRAINING_PASSES = 3  # forward, and twice as much backward
# Dense bfloat16 operations a second, by torch.cuda.get_device_name(). NVIDIA's data sheets of H100, H200 and A100; those
# of Hopper list the double of it, with sparsity.
PEAKS: Mapping[str, float] = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
# Table 6 and the released config.json; the shape that the table of relative cost compares layouts of.
STEP_35_FLASH = ModelConfig(
    vocab_size=128_896, eos=1, context=262_144, dim=4096, layers=45, dense_layers=3, heads=64, swa_heads=96, kv_heads=8,
    head_dim=128, dense_dim=11_264, experts=288, top_k=8, expert_dim=1280, shared_dim=1280, routed_scale=3.0,
    routed_clip=(0.0,) * 43 + (7.0, 7.0), shared_clip=(0.0,) * 44 + (16.0,), rope_theta=5e6, mtp_heads=3,
)  # fmt: skip
LAYOUTS: Mapping[str, tuple[int, int]] = {"S3F1": (4, 64), "S3F1+Head": (4, 96), "S1F1": (2, 64), "FFFF": (1, 64)}


def parameters(config: ModelConfig, *, mtp: bool = True) -> tuple[int, int]:
    """All parameters, and those that one token passes through on its way to the next token's logits.

    The second leaves out experts that are not chosen, other tokens' embedding rows, and MTP heads. `mtp` counts the
    heads in the first; router biases are no parameters.
    """
    c = config
    sizes = {name: prod(shape) for name, shape in shapes(replace(c, mtp_heads=0)).items() if ROUTER_BIAS not in name}
    total = sum(sizes.values())
    idle = sum(n for name, n in sizes.items() if _expert(name)) * (c.experts - c.top_k) // c.experts
    heads = sum(prod(s) for name, s in shapes(c).items() if name not in sizes and ROUTER_BIAS not in name)
    return total + heads * mtp, total - idle - (c.vocab_size - 1) * c.dim


def pairs(positions: int, window: int | None = None) -> int:
    """Queries times the keys that each sees, in a row: all up to itself, or the last `window` of them."""
    if window is None or positions <= window:
        return positions * (positions + 1) // 2
    return window * (window + 1) // 2 + (positions - window) * window


def matmul_flops(config: ModelConfig, *, mtp: bool = True) -> int:
    """Products with weights that one token's forward pass makes; each MTP head has an output layer of its own."""
    c = config if mtp else replace(config, mtp_heads=0)
    return 2 * sum(
        prod(shape) * c.top_k // c.experts if _expert(name) else prod(shape)
        for name, shape in shapes(c).items()
        if len(shape) > 1 and name != "model.embed_tokens.weight"
    )


def attention_flops(config: ModelConfig, positions: int, *, mtp: bool = True) -> int:
    """Scores and weighted values of a row's forward pass."""
    c = config
    layers = range(c.layers + c.mtp_heads * mtp)
    return sum(4 * c.heads_of(i) * c.head_dim * pairs(positions, None if c.full(i) else c.window) for i in layers)


def forward_flops(config: ModelConfig, context: int, *, mtp: bool = False) -> float:
    """Operations a token, on average over a row of `context` positions."""
    return matmul_flops(config, mtp=mtp) + attention_flops(config, context, mtp=mtp) / context


def training_flops(config: ModelConfig, context: int, *, mtp: bool = True) -> float:
    """Operations a token of a forward and a backward pass."""
    return TRAINING_PASSES * forward_flops(config, context, mtp=mtp)


def decode_flops(config: ModelConfig, context: int) -> int:
    """Operations of the trunk for one more token, whose full layers see `context` keys, its own among them."""
    c = config
    seen = (context if c.full(i) else min(context, c.window) for i in range(c.layers))
    attention = sum(4 * c.heads_of(i) * c.head_dim * keys for i, keys in enumerate(seen))
    return matmul_flops(c, mtp=False) + attention


def mfu(tokens_per_s: float, config: ModelConfig, context: int, peak: float, *, mtp: bool = True) -> float:
    """Share of `peak` operations a second that training at this speed needs; `mtp` if the heads are trained."""
    return tokens_per_s * training_flops(config, context, mtp=mtp) / peak


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 peak of a device by its full name, None for one that is not known here."""
    return PEAKS.get(device)


def relative_costs(
    positions: int, *, decode: bool, config: ModelConfig = STEP_35_FLASH, whole: bool = True
) -> dict[str, float]:
    """Operations a token of each of `LAYOUTS` over those of S3F1: at the end of a context, or on average in a prefill.

    `whole` counts the trunk as it is. Otherwise as in the paper's Table 8, which does not say what it counts; its
    prefill columns follow from the routed layers alone, n of them, of which n // full_every + 1 are full (11, 22 and 42
    of 42; the released trunk has 12, 23 and 45 of 45), but for one cell: full attention at 256k is 3.006, printed 3.00.
    Its decode columns do not follow from operations: see `paper_decode_costs`.
    """
    costs = {}
    for name, (every, heads) in LAYOUTS.items():
        c = replace(config, full_every=every, swa_heads=heads)
        if whole:
            costs[name] = float(decode_flops(c, positions)) if decode else forward_flops(c, positions)
        else:
            costs[name] = _routed_layers(c, positions, decode, c.top_k)
    return {name: cost / costs["S3F1"] for name, cost in costs.items()}


def paper_decode_costs(positions: int, routed: int, config: ModelConfig = STEP_35_FLASH) -> dict[str, float]:
    """The decode columns of Table 8 if each token were charged with `routed` experts in place of its top-k.

    73 or 74 of 288 give all its cells, 8 none but the base: so it charges a token with about a quarter of the experts. A
    batch whose every expert computes a tile of rows, most of them padding, would cost that; the paper says nothing.
    """
    shapes_of = {n: replace(config, full_every=every, swa_heads=heads) for n, (every, heads) in LAYOUTS.items()}
    costs = {name: _routed_layers(c, positions, True, routed) for name, c in shapes_of.items()}
    return {name: cost / costs["S3F1"] for name, cost in costs.items()}


def _routed_layers(config: ModelConfig, positions: int, decode: bool, routed: int) -> float:
    """Operations a token of as many layers as are routed, `routed` experts each."""
    c = replace(config, layers=1, dense_layers=0, mtp_heads=0, routed_clip=(), shared_clip=(), top_k=routed)
    layers = config.layers - config.dense_layers
    full = min(layers, layers // config.full_every + 1)
    outside = 2 * c.vocab_size * c.dim  # the output layer
    cost = 0.0
    for heads, window, count in ((c.heads, None, full), (c.swa_heads, c.window, layers - full)):
        layer = replace(c, heads=heads)
        seen = min(positions, window or positions) if decode else pairs(positions, window) / positions
        cost += count * (matmul_flops(layer) - outside + 4 * heads * c.head_dim * seen)
    return cost


def _expert(name: str) -> bool:
    """Whether a tensor holds routed experts, of which a token uses top_k."""
    return ".moe." in name and name.endswith("_proj.weight")
