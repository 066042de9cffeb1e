"""transformers' Step-3.x trunk as the oracle of the decoder, in float32 and in float64.

5.23 has no text-only class of it with an output layer, so the multimodal one is built around a vision tower that no test
runs. Its config and weights go through a hub folder that `moe.hub` wrote, read by transformers' own conversion of names.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe import hub
from moe.config import ModelConfig
from moe.experts import halves
from moe.model import Decoder

transformers = pytest.importorskip("transformers", minversion="5.23", reason="the oracle is transformers' Step trunk")

VISION = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}
SMALL = ModelConfig(
    vocab_size=97, eos=0, context=128, dim=48, layers=6, dense_layers=2, window=8, heads=4, swa_heads=6, kv_heads=2,
    head_dim=16, dense_dim=80, experts=6, top_k=2, expert_dim=24, shared_dim=40,
)  # fmt: skip


def perturbed(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder whose every tensor matters: gains away from 1, router biases that decide, gates and scores not flat.

    Logits have a size near 1, so that absolute bounds mean something.
    """
    model, generator = Decoder(config, seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "layernorm.weight", "router_bias")):
                tensor.copy_(0.3 * noise)
            elif name.endswith("embed_tokens.weight"):
                tensor.copy_(0.5 * noise)
            elif name.endswith(("lm_head.weight", "output.weight")):
                tensor.copy_(config.dim**-0.5 * noise)
            else:
                tensor.mul_(1.2)
    return model.eval()


def oracle(folder: Path) -> nn.Module:
    """transformers' model of a hub folder."""
    from transformers.models.step3p7 import Step3p7Config, Step3p7ForConditionalGeneration

    text = hub._read_json(folder / hub.CONFIG)
    config = Step3p7Config(text_config=text, vision_config=dict(VISION))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, loading = Step3p7ForConditionalGeneration.from_pretrained(folder, config=config, output_loading_info=True)
    missing = [n for n in loading["missing_keys"] if "vision_model" not in n and "multi_modal" not in n]
    wrong = [*missing, *loading["unexpected_keys"], *loading["mismatched_keys"]]
    assert not wrong, f"transformers did not take {wrong}"
    # It gives the pad token's embedding no gradient; ours pads with EOS, which is learned.
    model.model.language_model.embed_tokens.padding_idx = None
    return model.eval()


def pair(config: ModelConfig, folder: Path, dtype: torch.dtype, seed: int = 0) -> tuple[Decoder, nn.Module]:
    """Our decoder and the oracle with the same weights, which are float32 numbers in either type.

    The oracle always has a gate. Half of twice the output is the output without one.
    """
    ours = perturbed(config, seed)
    exported = ours
    if not config.gate:
        exported = Decoder(replace(config, gate=True))
        exported.load_state_dict(ours.state_dict(), strict=False)
        with torch.no_grad():
            for name, tensor in exported.state_dict().items():
                if name.endswith("g_proj.weight"):
                    tensor.zero_()
                elif name.endswith("o_proj.weight"):
                    tensor.mul_(2)
    hub.export(exported, folder)
    return ours.to(dtype), oracle(folder).to(dtype)


@contextmanager
def wide_casts() -> Iterator[None]:
    """Lets the oracle compute in float64.

    Its norms and router say `x.float()`, which would round float64 to float32 and hide errors below 1e-6 in noise.
    Here that keeps float64 as it is. Rotary angles come from integer positions and stay float32, as ours do; attention
    is torch's SDPA, which has no cast.
    """
    original = Tensor.float

    def float_(x: Tensor, *args: object) -> Tensor:
        return x if x.dtype == torch.float64 else original(x, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", float_)
        yield


def their_logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    with wide_casts():
        return model(input_ids=tokens_BT).logits


def our_gradients(model: Decoder) -> dict[str, Tensor]:
    """By hub names."""
    return {
        hub.hub_name(part, model.config.layers): half
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
        for part, half in halves(name, parameter.grad).items()
    }


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By hub names, without the vision tower's."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace("model.language_model.", "model.").replace("mlp.shared_experts.", "share_expert.")
        if name.endswith("mlp.experts.gate_up_proj"):
            stem = name.removesuffix("mlp.experts.gate_up_proj")
            gate, up = parameter.grad.chunk(2, dim=1)
            found |= {f"{stem}moe.gate_proj.weight": gate, f"{stem}moe.up_proj.weight": up}
            continue
        name = name.replace("mlp.experts.down_proj", "moe.down_proj.weight").replace(
            "mlp.gate.weight", "moe.gate.weight"
        )
        found[name] = parameter.grad
    return found


def tokens(rows: int, positions: int, seed: int = 0, vocab_size: int = SMALL.vocab_size) -> Tensor:
    return torch.randint(0, vocab_size, (rows, positions), generator=torch.Generator().manual_seed(seed))


def greatest(a: Tensor, b: Tensor) -> float:
    """Greatest difference of two tensors."""
    return float((a - b).detach().abs().max())


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Greatest difference of each tensor over the oracle's greatest entry of it.

    Some gradients are 0 but for rounding (queries that see one key, the router of a single chosen expert). So no
    tensor is held to more than a millionth of the greatest entry of all, in float32 a thousandth.
    """
    share = 1e-6 if theirs[names[0]].dtype == torch.float64 else 1e-3
    least = share * max(float(theirs[n].abs().max()) for n in names)
    return {n: greatest(ours[n], theirs[n]) / max(least, float(theirs[n].abs().max())) for n in names}
