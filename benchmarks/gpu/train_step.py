"""Training steps of one process on one GPU: our decoder beside Hugging Face's classes at the same shape.

Two shapes, T = 4096 and 8 rows unless memory asks for fewer: `qwen` (d 1024, 16 layers of full attention, 16 heads of 64,
32 experts of 512, top-4, no shared expert, no gate) and `step`, the preset `1b` (17 layers, S3F1, window 512, 8 and 12 heads
of 128, head gate, shared expert). All contenders: bf16 weights and states, fused AdamW, tokens at random, a real
next-token loss. Ours and Qwen3-MoE have their own loss code; Step's class has none, and the one given to it is compiled, in
`loss_eager` left as it is.
`muon` is a step of a real run: fp32 masters and momenta, Muon. The routers' statistics are off, as they are in all but every
tenth update of a run; `watched` has them on.

The median of the steps after the warm-up counts; compile time and peak memory stand beside it.
"""

import dataclasses
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import timing
from moe import optim
from moe.config import ModelConfig, OptimConfig
from moe.loss import next_token_loss
from moe.presets import preset

CONTEXT, WARM = 4096, 3
E64 = {"experts": 64, "top_k": 8, "expert_dim": 256, "shared_dim": 256}
Step = Callable[[], Tensor]


def step_shape(vocab: int, **changes: Any) -> ModelConfig:
    """The preset `1b`, whose proportions are the paper's."""
    return dataclasses.replace(preset("1b", vocab_size=vocab, eos=0), **changes)


def qwen_shape(vocab: int) -> ModelConfig:
    """Hugging Face's Qwen3-MoE of spec size, in our terms; the shared expert is taken out of the model."""
    return ModelConfig(
        vocab_size=vocab, eos=0, context=CONTEXT, dim=1024, layers=16, dense_layers=0, full_every=1, heads=16,
        swa_heads=16, kv_heads=4, head_dim=64, gate=False, experts=32, top_k=4, expert_dim=512, shared_dim=64,
        rotary_fraction=1.0, routed_scale=1.0,
    )  # fmt: skip


class Nothing(nn.Module):
    """In place of a shared expert, where the other side has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def ours(
    config: ModelConfig, tokens_BT: Tensor, *, shared: bool = True, muon: bool = False, watch: bool = False
) -> Step:
    """Our decoder, each layer compiled. `watch`: with the routers' statistics."""
    model = timing.drawn(config).train()
    for layer in model.model["layers"]:  # type: ignore[arg-type, union-attr]
        if not shared:
            layer.share_expert = Nothing()
        layer.compile(fullgraph=True, dynamic=False)
    for moe in model.routed:
        moe.watch = watch
    model.model["norm"].compile(fullgraph=True, dynamic=False)
    target_S = tokens_BT.roll(-1, 1).flatten()
    head = model.lm_head.weight
    update = _muon(model) if muon else _adamw(model)

    def step() -> Tensor:
        x_SD = model.hidden(tokens_BT).flatten(0, 1)
        loss, _ = next_token_loss(x_SD, head, target_S, total=len(target_S), compiled=True)
        loss.backward()
        update()
        return loss.detach()

    return step


def hf_qwen_model(config: ModelConfig) -> Any:
    """Hugging Face's Qwen3-MoE of our shape in bf16, experts by grouped_mm."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    c = config
    hf = Qwen3MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.dense_dim, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, num_experts=c.experts,
        num_experts_per_tok=c.top_k, moe_intermediate_size=c.expert_dim, max_position_embeddings=CONTEXT,
        norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM._from_config(hf, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model


def hf_qwen(config: ModelConfig, tokens_BT: Tensor) -> Step:
    """Each layer compiled: its fastest setting."""
    model = hf_qwen_model(config).train()
    for layer in model.model.layers:
        layer.compile()
    update = _adamw(model)

    def step() -> Tensor:
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        update()
        return loss.detach()

    return step


def hf_step(config: ModelConfig, tokens_BT: Tensor, *, patched: bool, loss: str = "compiled") -> Step:
    """Hugging Face's Step class: as shipped, or with grouped_mm, flex attention and compiled layers.

    It comes without LM head and loss. Both are added here: compiled, so that no lead of ours is theirs, or `eager`, as its users
    have them.
    """
    from transformers.models.step3p7 import modeling_step3p7 as hf
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    c, rope = config, {"rope_type": "default", "rope_theta": 10_000.0}
    kinds = ["full_attention" if c.full(i) else "sliding_attention" for i in range(c.layers)]
    text = Step3p7TextConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.dense_dim, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_sliding_attention_heads=c.swa_heads, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, n_routed_experts=c.experts, num_experts_per_tok=c.top_k, moe_intermediate_size=c.expert_dim,
        share_expert_dim=c.shared_dim, sliding_window=c.window, layer_types=kinds, pad_token_id=0, use_cache=False,
        mlp_layer_types=["dense" if i < c.dense_layers else "sparse" for i in range(c.layers)],
        max_position_embeddings=CONTEXT, moe_router_scaling_factor=c.routed_scale,
        rope_parameters={"full_attention": {**rope, "partial_rotary_factor": 0.5}, "sliding_attention": rope},
    )  # fmt: skip
    with torch.device("cuda"):
        model = hf.Step3p7TextModel._from_config(
            text, attn_implementation="flex_attention" if patched else "sdpa", dtype=torch.bfloat16
        )
        head = nn.Linear(c.dim, c.vocab_size, bias=False, dtype=torch.bfloat16)
    model.train()
    if patched:
        _patch_experts(model, hf.Step3p7Experts)
        for layer in model.layers:
            layer.compile()
    update, target_S = _adamw(nn.ModuleList([model, head])), tokens_BT.roll(-1, 1).flatten()

    def loss_of(states: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(states).flatten(0, 1).float(), target_S)

    measured = torch.compile(loss_of, dynamic=False) if loss == "compiled" else loss_of

    def step() -> Tensor:
        loss = measured(model(input_ids=tokens_BT).last_hidden_state)
        loss.backward()
        update()
        return loss.detach()

    return step


def _patch_experts(model: nn.Module, kind: type[nn.Module]) -> None:
    """Of this model alone: the class stays as it was shipped."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    for experts in (module for module in model.modules() if isinstance(module, kind)):
        experts.forward = MethodType(grouped_mm_experts_forward, experts)
        experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated = True, False, False, True


def _adamw(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _muon(model: nn.Module) -> Callable[[], None]:
    optimizer = optim.build(model, OptimConfig(), compiled=True)

    def update() -> None:
        optimizer.step(1e-4)
        optimizer.zero_grad()

    return update


def measure(
    build: Callable[[Tensor], Step], flops: float, rows: int, steps: int, vocab: int, profile: bool
) -> dict[str, Any]:
    """Builds a contender, warms it up, times its steps; `profile` lists one step's kernels."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(1, vocab, (rows, CONTEXT), device="cuda")
    begin = time.perf_counter()
    step = build(tokens_BT)
    losses = [float(step())]
    first_s = time.perf_counter() - begin
    times = sorted(timing.timed_ms(step, steps, WARM))
    losses.append(float(step()))
    ms = times[len(times) // 2]
    rate = rows * CONTEXT / ms * 1000
    listed = {"kernels": timing.kernels(step, runs=1, most=60)} if profile else {}
    return listed | {
        "rows": rows, "ms": ms, "ms_least": times[0], "ms_most": times[-1], "tokens_per_s": rate,
        "mfu": flops * rate / timing.PEAK_FLOPS, "gflop_per_token": flops / 1e9, "first_step_s": first_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "loss_first": losses[0], "loss_last": losses[-1],
    }  # fmt: skip


def contenders() -> dict[str, tuple[Callable[[Tensor], Step], ModelConfig, int, bool]]:
    """Name: builder, shape, rows, whether the shape has a shared expert."""
    small, large = step_shape(32_768), step_shape(128_896)
    small64, large64 = step_shape(32_768, **E64), step_shape(128_896, **E64)
    qwen, fused = qwen_shape(32_768), {"experts_backend": "triton"}
    return {
        "ours_step_e32_v32k": (lambda t: ours(small, t), small, 8, True),
        "ours_step_e32_v32k_triton": (lambda t: ours(dataclasses.replace(small, **fused), t), small, 8, True),
        "ours_step_e32_v32k_muon": (lambda t: ours(dataclasses.replace(small, **fused), t, muon=True), small, 8, True),
        "ours_step_e32_v32k_muon_watched": (
            lambda t: ours(dataclasses.replace(small, **fused), t, muon=True, watch=True),
            small,
            8,
            True,
        ),
        "ours_step_e64_v32k_triton": (lambda t: ours(dataclasses.replace(small64, **fused), t), small64, 8, True),
        "ours_step_e32_v129k_triton": (lambda t: ours(dataclasses.replace(large, **fused), t), large, 8, True),
        "ours_step_e64_v129k_triton": (lambda t: ours(dataclasses.replace(large64, **fused), t), large64, 8, True),
        "ours_qwen": (lambda t: ours(dataclasses.replace(qwen, **fused), t, shared=False), qwen, 8, False),
        "hf_qwen_grouped_layers_compiled": (lambda t: hf_qwen(qwen, t), qwen, 8, False),
        "hf_step_shipped": (lambda t: hf_step(small, t, patched=False), small, 4, True),
        "hf_step_patched_flex_compiled": (lambda t: hf_step(small, t, patched=True), small, 8, True),
        "hf_step_patched_flex_loss_eager": (lambda t: hf_step(small, t, patched=True, loss="eager"), small, 8, True),
    }


def main() -> None:
    """Runs the contenders named, or all."""
    args = timing.arguments(
        "train_step",
        __doc__,
        only={"nargs": "*", "help": "names of contenders (default: all)"},
        steps={"type": int, "default": 12, "help": "timed steps of each (default 12)"},
        profile={"action": "store_true", "help": "list the kernels of a step too"},
    )
    torch._dynamo.config.recompile_limit = 64  # the patched Step class compiles each layer by itself
    results, known = timing.Results("train_step", args.out), contenders()
    for name in args.only or known:
        build, shape, rows, shared = known[name]
        flops = timing.flops_per_token(shape, CONTEXT, shared)
        results.attempt(
            name,
            lambda: measure(build, flops, rows, args.steps, shape.vocab_size, args.profile),  # noqa: B023
        )


if __name__ == "__main__":
    main()
