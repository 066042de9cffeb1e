"""Heads before the attention: the operator beside the layers' own modules, and its Triton body beside its reference."""

import os

import pytest

torch = pytest.importorskip("torch")

from moe import kernels_heads, layers  # noqa: E402
from moe.config import ModelConfig  # noqa: E402
from moe.experts import product  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# (H, G, C), angles, gates, padding: a windowed layer's, a full one's, one without gates, and a width that is no power of two
SHAPES = [((6, 2, 8), 4, 6, 2), ((4, 2, 8), 2, 4, 0), ((3, 1, 16), 8, 0, 5), ((2, 1, 12), 3, 2, 1)]


def made(shape, angles, gates, padding, *, rows=2, places=5, segments=False, dtype=torch.float32):
    (H, G, C) = shape
    g = torch.Generator().manual_seed(H * C + angles)
    x = torch.randn(rows, places, (H + 2 * G) * C + gates + padding, generator=g).to(dtype)
    gains = [(0.3 * torch.randn(C, generator=g)).to(dtype) for _ in range(2)]
    angle = torch.rand(rows if segments else 1, places, 1, angles, generator=g) * 6
    return [t.to(DEVICE) for t in (x, *gains, angle.cos(), angle.sin())]


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_operator_is_the_attention_block_without_its_middle_rounding(gate, layer):
    config = ModelConfig(vocab_size=64, eos=0, window=8, heads=4, swa_heads=6, kv_heads=2, head_dim=8, gate=gate)
    block = layers.Attention(config, layer).double()
    x = torch.randn(2, 5, config.dim, dtype=torch.float64)
    turn = layers.Rope(config, block.full)(torch.arange(5)[None])
    maps = [block.q_proj, block.k_proj, block.v_proj, *([block.g_proj] if gate else [])]
    torch.nn.init.normal_(block.q_norm.weight)
    torch.nn.init.normal_(block.k_norm.weight)
    heads = config.heads_of(layer)
    got = kernels_heads.heads(
        product(x, maps), block.q_norm.weight, block.k_norm.weight, *turn, (heads, 2, 8), heads if gate else 0, EPS
    )
    want = block.heads(x, turn)
    for a, b in zip(got, want[: 3 + gate], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # angles are fp32
    assert got[3].shape == (2, 5, heads if gate else 0)


@pytest.mark.parametrize(("shape", "angles", "gates", "padding"), SHAPES)
def test_gradients_are_those_of_the_formula(shape, angles, gates, padding):
    x, *rest = made(shape, angles, gates, padding)
    leaves = [t.double().cpu().requires_grad_() for t in (x, *rest[:2])]
    tables = [t.double().cpu() for t in rest[2:]]
    assert torch.autograd.gradcheck(lambda a, b, c: kernels_heads.heads(a, b, c, *tables, shape, gates, EPS), leaves)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "angles", "gates", "padding"), SHAPES)
def test_the_triton_body_computes_the_same(shape, angles, gates, padding, dtype, segments):
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from moe import kernels_heads_triton

    tensors = made(shape, angles, gates, padding, rows=3, places=150, segments=segments, dtype=dtype)
    # sums of four terms, each rounded at 2^-8
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 4e-2}
    got = kernels_heads_triton.heads(*tensors, list(shape), gates, EPS)
    want = kernels_heads.heads_reference(*tensors, list(shape), gates, EPS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **near)
    grads = [torch.randn_like(t) for t in want]
    # As attention gives them: heads before positions.
    grads = [*(g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads[:3]), grads[3]]
    got = kernels_heads_triton.heads_backward(grads, *tensors, list(shape), EPS)
    want = kernels_heads.heads_backward_reference(grads, *tensors, list(shape), EPS)
    torch.testing.assert_close(got[0], want[0], **near)
    for a, b in zip(got[1:], want[1:], strict=True):  # sums over 450 tokens and all heads
        torch.testing.assert_close(a, b, rtol=near["rtol"], atol=near["atol"] * 10 * float(b.abs().max()))


@pytest.mark.parametrize(("run", "stages"), [(4, 1), (3, 2)])
@pytest.mark.parametrize(("shape", "angles", "gates", "padding"), SHAPES[:2])
def test_gradients_do_not_depend_on_how_the_backward_is_cut(shape, angles, gates, padding, run, stages, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from moe import kernels_heads_triton

    (H, G, C) = shape
    tensors = made(shape, angles, gates, padding, places=50)
    grads = [torch.randn(2, 50, *n, device=DEVICE) for n in ((H, C), (G, C), (G, C), (gates,))]
    monkeypatch.setattr(kernels_heads_triton, "RUN", run)
    monkeypatch.setattr(kernels_heads_triton, "STAGES", stages)
    got = kernels_heads_triton.heads_backward(grads, *tensors, list(shape), EPS)
    want = kernels_heads.heads_backward_reference(grads, *tensors, list(shape), EPS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = kernels_heads_triton.heads_backward(grads, *tensors, list(shape), EPS)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
