"""The shape of the decoder as the hub writes it: `config.json` of Step 3.5 Flash, and back.

In: a `ModelConfig`, or the values of a `config.json` with `model_type` `step3p5` (per-layer lists that go on over the
MTP heads, `moe_layers_enum` as a comma string), or of the file that transformers writes for Step 3.7, whose text trunk
is the same (`text_config`, `rope_parameters`, `mlp_layer_types`). Out: the other of the two. What this decoder cannot
compute is a `ConfigError` that lists every such key. Keys of either file that this module does not read say nothing
about the shape, or repeat what another says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import ConfigError
from moe.config import ModelConfig, RopeScaling

MODEL_TYPE, ARCHITECTURE = "step3p5", "Step3p5ForCausalLM"
DEFAULT_THETA = 10_000.0  # of transformers 5.23, and of the released code
FULL, WINDOWED = "full_attention", "sliding_attention"
ROUTER_BIAS = "moe.router_bias"  # float32 at every precision: bfloat16 would round steps of 0.001 away
# The one value of each key that this decoder computes. A key left out means that value: it is the default of the
# released modelling code, or of transformers 5.23.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "att_impl_type": ("GQA",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "sink": (False,),
    "zero_centered": (True,),
    "use_rope_layers": ([], None),
    "yarn_only_types": ([FULL], None),
    "norm_expert_weight": (True,),
    "moe_router_activation": ("sigmoid",),
    "use_moe_router_bias": (True,),
    "moe_layer_offset": (0,),
    "moe_every_n_layer": (1,),
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
}
# Ours: the hub's names, the released file's first, then those that transformers writes.
SIZES: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "dim": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_attention_groups", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "dense_dim": ("intermediate_size",),
    "experts": ("moe_num_experts", "n_routed_experts", "num_local_experts"),
    "top_k": ("moe_top_k", "num_experts_per_tok"),
    "expert_dim": ("moe_intermediate_size",),
    "shared_dim": ("share_expert_dim", "share_expert_dims"),
    "routed_scale": ("moe_router_scaling_factor",),
}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a hub folder: what a model of this config must have, known before any is allocated."""
    c = config
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.dim)}
    for i in range(c.layers + c.mtp_heads):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in _block_shapes(c, i).items()}
        if c.dense_layers <= i < c.layers:
            found[f"model.layers.{i}.{ROUTER_BIAS}"] = (c.experts,)
    return found | {"model.norm.weight": (c.dim,), "lm_head.weight": (c.vocab_size, c.dim)}


def to_hub(config: ModelConfig) -> dict[str, Any]:
    """The values of `config.json`: the released file's keys, and those of generation that transformers wants beside."""
    c = config
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{names[0]: getattr(c, ours) for ours, names in SIZES.items()},
        "max_seq_len": c.context,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "num_nextn_predict_layers": c.mtp_heads,
        **_attention_to_hub(c),
        **_feed_forward_to_hub(c),
        # transformers never trains the embedding of the pad token, and takes token 1 where none is named.
        **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), c.eos),
    }
    return values | {name: only[0] for name, only in FIXED.items() if only != (None,)}


def from_hub(values: Mapping[str, Any], context: int | None = None) -> ModelConfig:
    """The config of a hub folder.

    `context` replaces the file's (262,144 positions of the released model need not be the length in training). Lists
    may be as long as the layers, or go on over the MTP heads.
    """
    text = values.get("text_config", values)
    reader = Reader(text)
    fields: dict[str, Any] = {ours: reader.size(names) for ours, names in SIZES.items()}
    sized = not reader.problems
    reader.fixed()
    if sized:
        reader.layers, reader.mtp_heads = fields["layers"], text.get("num_nextn_predict_layers") or 0
        fields |= {"mtp_heads": reader.mtp_heads, "norm_eps": text.get("rms_norm_eps", 1e-5)}
        fields |= {"context": context or reader.context(), "eos": reader.eos(values)}
        fields |= reader.attention(fields) | reader.rotary() | reader.feed_forward()
    _raise(reader.problems)
    return ModelConfig(**fields)


class Reader:
    """Reads one `config.json` and gathers in `problems` what is missing or cannot be computed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []
        self.layers = self.mtp_heads = 0

    def wrong(self, key: str, got: object, expected: str) -> None:
        self.problems.append(
            f"hub: config.json {key} is not what this decoder computes, got {got}, expected {expected}"
        )

    def size(self, names: Sequence[str]) -> Any:
        """The value of the first of the names that the file has."""
        found = next((self.values[n] for n in names if self.values.get(n) is not None), None)
        if found is None:
            self.problems.append(
                f"hub: config.json has no {names[0]}, got {' or '.join(names)} absent, expected a number"
            )
        elif not isinstance(found, int | float) or isinstance(found, bool):
            self.wrong(names[0], repr(found), "one number for all layers")
        return found

    def fixed(self) -> None:
        """Everything that has one value here, or follows from the sizes."""
        if (kind := self.values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            self.wrong("model_type", repr(kind), f"'{MODEL_TYPE}'")
        for key, allowed in FIXED.items():
            if key in self.values and self.values[key] not in allowed:
                self.wrong(key, repr(self.values[key]), repr(allowed[0]))
        scalar = self.values.get("query_pre_attn_scalar")
        if scalar is not None and scalar != self.values.get("head_dim"):
            self.wrong("query_pre_attn_scalar", scalar, "head_dim")

    def context(self) -> int:
        return int(self.size(("max_seq_len", "max_position_embeddings")) or 0)

    def eos(self, outer: Mapping[str, Any]) -> int:
        """The token that ends a document; the first, where the file lists several (`moe.hub.stop_tokens` has them all)."""
        found = self.values.get("eos_token_id", outer.get("eos_token_id"))
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, int):
            self.wrong("eos_token_id", repr(found), "the id of the token that ends a document")
            return 0
        return found

    def attention(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Which layers see everything, window, heads of windowed layers, gate."""
        kinds = self.per_layer("layer_types", FULL, WINDOWED)
        full = [kind == FULL for kind in kinds[: self.layers]]
        # Where only layer 0 is full, several distances say the same: the paper's 4 if it is one of them.
        every = next(
            (n for n in (4, *range(1, self.layers + 1)) if full == [i % n == 0 for i in range(self.layers)]), 0
        )
        if not every or set(kinds) - {FULL, WINDOWED} or FULL in kinds[self.layers :]:
            self.wrong(
                "layer_types", kinds, f"{FULL} in layer 0 and then in every n-th, {WINDOWED} in all others and MTP"
            )
        other = self.values.get("attention_other_setting") or {}
        for key, ours in (
            ("num_attention_groups", "kv_heads"),
            ("head_dim", "head_dim"),
            ("true_head_dim", "head_dim"),
        ):
            if other.get(key, fields[ours]) != fields[ours]:
                self.wrong(f"attention_other_setting.{key}", other[key], f"{fields[ours]} as in full layers")
        heads = other.get("num_attention_heads") or self.values.get("num_sliding_attention_heads") or fields["heads"]
        window = self.values.get("sliding_window")
        if window is None and all(full) and not self.mtp_heads:
            window = 512  # no layer reads it
        if not isinstance(window, int):
            self.wrong("sliding_window", window, "one number for all windowed layers")
        gate = self.values.get("use_head_wise_attn_gate", True)
        return {"full_every": every, "window": window, "swa_heads": heads, "gate": bool(gate)}

    def rotary(self) -> dict[str, Any]:
        """Frequencies of the two kinds of layer."""
        nested = self.values.get("rope_parameters") or {}
        if nested.get(FULL) or nested.get(WINDOWED):
            full, windowed = nested.get(FULL) or {}, nested.get(WINDOWED) or {}
            theta = (full.get("rope_theta", DEFAULT_THETA), windowed.get("rope_theta", DEFAULT_THETA))
            fraction = (full.get("partial_rotary_factor", 1.0), windowed.get("partial_rotary_factor", 1.0))
            scaling = full if full.get("rope_type", "default") != "default" else None
            if windowed.get("rope_type", "default") != "default":
                self.wrong(f"rope_parameters.{WINDOWED}.rope_type", windowed["rope_type"], "default")
        else:
            theta = self.by_kind("rope_theta", DEFAULT_THETA)
            fraction = self.by_kind("partial_rotary_factors", 1.0)
            scaling = self.values.get("rope_scaling")
        if fraction[1] != 1:
            self.wrong("partial_rotary_factors", fraction[1], "1 in windowed layers")
        return {
            "rope_theta": float(theta[0]),
            "swa_rope_theta": float(theta[1]),
            "rotary_fraction": float(fraction[0]),
            "rope_scaling": self.scaling(scaling) if scaling else None,
        }

    def scaling(self, values: Mapping[str, Any]) -> RopeScaling | None:
        """Llama 3's rule; another is a problem."""
        kind = values.get("rope_type", values.get("type"))
        names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        if kind != "llama3" or any(n not in values for n in names):
            self.wrong("rope_scaling", dict(values), f"rope_type llama3 with {', '.join(names)}")
            return None
        factor, original, low, high = (values[n] for n in names)
        return RopeScaling(
            factor=factor, original_context=original, low_frequency_factor=low, high_frequency_factor=high
        )

    def feed_forward(self) -> dict[str, Any]:
        """Dense layers, bounds, and the router's precision."""
        sparse = self.sparse_layers()
        dense = self.layers - len(sparse)
        if sparse != list(range(dense, self.layers)):
            self.wrong("moe_layers_enum", sparse, "every layer from the first routed one to the last")
        clips = {}
        for ours, key in (("routed_clip", "swiglu_limits"), ("shared_clip", "swiglu_limits_shared")):
            bounds = [float(bound or 0) for bound in self.per_layer(key, 0.0, 0.0)]
            if any(bounds[self.layers :]):
                self.wrong(key, bounds[self.layers :], "0 for MTP heads")
            clips[ours] = tuple(bounds[: self.layers]) if any(bounds[: self.layers]) else ()
        precision = "float32" if self.values.get("need_fp32_gate", True) else "bfloat16"
        return {"dense_layers": dense, "router_dtype": precision, **clips}

    def sparse_layers(self) -> list[int]:
        """Layers with routed experts, in order."""
        if not self.values.get("use_moe", True):
            return []
        kinds = self.values.get("mlp_layer_types")
        if kinds is not None:
            return [i for i, kind in enumerate(kinds[: self.layers]) if kind == "sparse"]
        listed = self.values.get("moe_layers_enum")
        if listed is None:
            self.problems.append(
                "hub: config.json has no moe_layers_enum, got no mlp_layer_types either, expected '1,2,3' or a list"
            )
            return []
        items = [str(item).strip() for item in (listed.split(",") if isinstance(listed, str) else listed)]
        if not all(item.isdecimal() for item in items if item):
            self.wrong("moe_layers_enum", repr(listed), "numbers of layers")
            return []
        return sorted({int(item) for item in items if item} & set(range(self.layers)))

    def per_layer(self, key: str, default: Any, default_mtp: Any) -> list[Any]:
        """A list of one value a layer and MTP head; a list that ends with the layers leaves the heads their default."""
        found = self.values.get(key)
        if found is None:
            found = [default] * self.layers
        total = self.layers + self.mtp_heads
        if not isinstance(found, list) or len(found) not in (self.layers, total):
            self.wrong(key, found, f"a list of {self.layers} or {total} values")
            return [default] * self.layers + [default_mtp] * self.mtp_heads
        return [*found, *[default_mtp] * (total - len(found))]

    def by_kind(self, key: str, default: float) -> tuple[float, float]:
        """The one value of full layers and the one of windowed ones, of a list or a number for all."""
        found = self.values.get(key)
        if not isinstance(found, list):
            return (default, default) if found is None else (found, found)
        kinds = self.per_layer("layer_types", FULL, WINDOWED)
        values: list[float] = []
        for kind in (FULL, WINDOWED):
            seen = sorted({value for value, k in zip(found, kinds, strict=False) if k == kind})
            if len(seen) > 1:
                self.wrong(key, seen, f"one value for all layers of {kind}")
            values.append(seen[0] if seen else default)
        return values[0], values[1]


def _block_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The weights of one layer or MTP head by their names below it."""
    c, heads = config, config.heads_of(layer)
    q, kv = heads * c.head_dim, c.kv_heads * c.head_dim
    found: dict[str, tuple[int, ...]] = {"input_layernorm": (c.dim,), "post_attention_layernorm": (c.dim,)}
    found |= {"self_attn.q_proj": (q, c.dim), "self_attn.k_proj": (kv, c.dim), "self_attn.v_proj": (kv, c.dim)}
    found |= {"self_attn.o_proj": (c.dim, q), "self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,)}
    if c.gate:
        found["self_attn.g_proj"] = (heads, c.dim)
    if layer >= c.layers:
        found |= {"enorm": (c.dim,), "hnorm": (c.dim,), "eh_proj": (c.dim, 2 * c.dim)}
        found["transformer.shared_head.norm"] = (c.dim,)
        found["transformer.shared_head.output"] = (c.vocab_size, c.dim)
    if c.dense_layers <= layer < c.layers:
        found |= {"moe.gate": (c.experts, c.dim), **_glu("moe", (c.experts,), c.dim, c.expert_dim)}
        return found | _glu("share_expert", (), c.dim, c.shared_dim)
    return found | _glu("mlp", (), c.dim, c.dense_dim)


def _glu(prefix: str, stack: tuple[int, ...], dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (*stack, hidden, dim), (*stack, dim, hidden)
    return {f"{prefix}.gate_proj": wide, f"{prefix}.up_proj": wide, f"{prefix}.down_proj": narrow}


def _attention_to_hub(config: ModelConfig) -> dict[str, Any]:
    c, layers = config, range(config.layers + config.mtp_heads)
    return {
        "layer_types": [FULL if c.full(i) else WINDOWED for i in layers],
        "sliding_window": c.window,
        "attention_other_setting": {
            "attention_type": WINDOWED,
            "num_attention_heads": c.swa_heads,
            "num_attention_groups": c.kv_heads,
            "head_dim": c.head_dim,
            "true_head_dim": c.head_dim,
        },
        "use_head_wise_attn_gate": c.gate,
        "rope_theta": [c.rope_theta if c.full(i) else c.swa_rope_theta for i in layers],
        "partial_rotary_factors": [c.rotary_fraction if c.full(i) else 1.0 for i in layers],
        "rope_scaling": None if c.rope_scaling is None else _scaling_to_hub(c.rope_scaling),
    }


def _feed_forward_to_hub(config: ModelConfig) -> dict[str, Any]:
    c, heads = config, [0.0] * config.mtp_heads
    return {
        "use_moe": c.dense_layers < c.layers,
        "moe_layers_enum": ",".join(map(str, range(c.dense_layers, c.layers))),
        "need_fp32_gate": c.router_dtype == "float32",
        "swiglu_limits": [float(c.routed_limit(i) or 0) for i in range(c.layers)] + heads,
        "swiglu_limits_shared": [float(c.shared_limit(i) or 0) for i in range(c.layers)] + heads,
    }


def _scaling_to_hub(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
    }


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(*problems)
