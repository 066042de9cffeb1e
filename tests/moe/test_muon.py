"""The polar factor on easy and hostile matrices, and the update against one matrix at a time in float64."""

import pytest
import torch

from moe.model import Decoder
from moe.muon import COEFFICIENTS, MARGIN, matrices, polar, update
from moe.presets import preset


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _outlier() -> torch.Tensor:
    x = _normal(3, 64, 48)
    x[:, 5, 7] = 1e4
    return x


HOSTILE = {
    "square": _normal(3, 64, 64),
    "wide": _normal(3, 32, 96),
    "tall": _normal(3, 96, 32),
    "row": _normal(3, 1, 40),
    "low rank and noise": _normal(3, 64, 4) @ _normal(3, 4, 64, seed=1) + 1e-4 * _normal(3, 64, 64, seed=2),
    "outlier": _outlier(),
    "small": 1e-7 * _normal(3, 48, 64),
    "tiny": 1e-30 * _normal(3, 48, 64),
    "huge": 1e30 * _normal(3, 48, 64),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_singular_values_become_one(name: str, dtype: torch.dtype) -> None:
    x = HOSTILE[name]
    y = polar(x, dtype).double()
    before, after = torch.linalg.svdvals(x.double()), torch.linalg.svdvals(y)
    before /= before.norm(dim=-1, keepdim=True)
    assert after.max() < 1.2
    assert after[before > 6e-4].min() > 0.7
    if dtype != torch.bfloat16:
        assert after[before > 2e-3].min() > 0.95
    # Singular vectors stay: U^T y V is diagonal, and the product with x is symmetric and positive.
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inner = u.mT @ y @ vh.mT
    kept = (before > 6e-4).double()
    off = (inner - torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1))) * kept[:, :, None] * kept[:, None, :]
    assert off.abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert torch.diagonal(inner, dim1=-2, dim2=-1)[before > 6e-4].min() > 0.6


def test_zero_stays_zero_beside_others_and_size_does_not_matter() -> None:
    x = _normal(2, 16, 24)
    x[1] = 0
    for dtype in (torch.float16, torch.float32):
        y = polar(x, dtype)
        assert y.isfinite().all()
        assert not y[1].any()
        assert y[0].any()
        torch.testing.assert_close(polar(2.0**40 * x, dtype), y, atol=0, rtol=0)


def _naive(x: torch.Tensor) -> torch.Tensor:
    """One matrix in float64 by its singular values: each goes through the six polynomials."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm() / MARGIN
    for a, b, c in COEFFICIENTS:
        s = a / MARGIN * s + b / MARGIN**3 * s**3 + c / MARGIN**5 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_updates_equal_one_matrix_at_a_time(shape: tuple[int, int]) -> None:
    weight, momentum = _normal(4, *shape, seed=1).double(), torch.zeros(4, *shape).double()
    expected, buffers = weight.clone(), torch.zeros_like(weight)
    lr, decay = torch.tensor([0.02, 0.9], dtype=torch.float64)
    for step in range(3):
        grad = _normal(4, *shape, seed=10 + step).double()
        update(weight, momentum, grad, lr, decay, 0.1)
        for i in range(4):
            buffers[i] = 0.9 * buffers[i] + grad[i]
            expected[i] *= 1 - 0.02 * 0.1
            expected[i] -= 0.02 * 0.2 * max(shape) ** 0.5 * _naive(grad[i] + 0.9 * buffers[i])
    torch.testing.assert_close(weight, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(momentum, buffers, atol=1e-12, rtol=0)


def test_an_update_has_the_size_of_adamws() -> None:
    for shape in ((64, 64), (32, 96), (96, 32)):
        weight = torch.zeros(1, *shape)
        update(weight, torch.zeros_like(weight), _normal(1, *shape), torch.tensor(1.0), torch.tensor(0.95), 0.1)
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02), shape


def test_matrices_of_a_decoder() -> None:
    """By hand for the ci preset: width 32, heads of 16, 4 experts of 32 whose gate and up lie in one parameter."""
    config = preset("ci", vocab_size=64, eos=0)
    found = {name: matrices(name, p) for name, p in Decoder(config).named_parameters()}
    at = "model.layers.1."
    assert found[at + "self_attn.q_proj.weight"] == [(48, 32)]
    assert found[at + "self_attn.g_proj.weight"] == [(3, 32)]
    assert found[at + "moe.gate.weight"] == [(4, 32)]
    assert found[at + "moe.gate_up_proj.weight"] == [(32, 32)] * 8
    assert found[at + "moe.down_proj.weight"] == [(32, 32)] * 4
    assert found[at + "self_attn.o_proj.weight"] == [(32, 48)]
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == found["model.norm.weight"] == []
