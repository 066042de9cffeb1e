"""Named shapes of the decoder, and one dial that derives a shape.

`ci` trains in a second, `tiny` in one or two minutes on two cores; `30m` and `150m` are proxies for questions about data;
`1b` and `3b` are models. Parameters in all and active for a token, at a vocabulary of 32,768 (embedding and head are in both):
`30m` 31M and 12M, `150m` 147M and 43M, `1b` 965M and 227M, `3b` 3,117M and 688M. From `30m` on the proportions are those of
`at_depth`.
"""

from typing import Literal, get_args

from core.errors import ConfigError
from moe.config import ModelConfig

Name = Literal["ci", "tiny", "30m", "150m", "1b", "3b"]
DEPTHS = {"30m": 5, "150m": 9, "1b": 17, "3b": 25}


def preset(name: Name, *, vocab_size: int, eos: int) -> ModelConfig:
    """A named shape."""
    if name == "ci":
        return ModelConfig(
            vocab_size=vocab_size, eos=eos, context=64, dim=32, layers=3, full_every=2, window=16, heads=2, swa_heads=3,
            kv_heads=1, head_dim=16, dense_dim=64, experts=4, top_k=2, expert_dim=32, shared_dim=32,
        )  # fmt: skip
    if name == "tiny":
        return ModelConfig(vocab_size=vocab_size, eos=eos, window=128)
    if name in DEPTHS:
        return at_depth(DEPTHS[name], vocab_size=vocab_size, eos=eos)
    raise ConfigError(f"moe.preset: unknown name, got {name!r}, expected one of {', '.join(get_args(Name))}")


def at_depth(depth: int, *, vocab_size: int, eos: int, context: int = 4096) -> ModelConfig:
    """The shape that a number of layers implies: 17 gives width 1,024, 8 and 12 heads of 128, 32 experts of 512, top-4.

    `depth` is 1 + 4n, so that the last layer sees the whole context like the first.
    """
    if depth < 5 or depth % 4 != 1:
        raise ConfigError(f"moe.depth: must be 5, 9, 13, ... (a full layer, then groups of four), got {depth}")
    dim = 64 * (depth - 1)
    head_dim = 128 if dim >= 1024 else 64
    kv_heads = max(1, dim // head_dim // 4)
    heads = 4 * kv_heads
    return ModelConfig(
        vocab_size=vocab_size, eos=eos, context=context, dim=dim, layers=depth, heads=heads, swa_heads=heads * 3 // 2,
        kv_heads=kv_heads, head_dim=head_dim, dense_dim=3 * dim, experts=32, top_k=4, expert_dim=dim // 2,
        shared_dim=dim // 2, routed_scale=2.0,
    )  # fmt: skip
