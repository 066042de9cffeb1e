"""The chunked loss against torch's cross entropy: values, gradients, masks, totals, z-loss, precision."""

import os

import pytest
import torch
from torch.nn import functional

from moe import loss as loss_module
from moe.loss import CHUNK, next_token_loss, token_losses

TOKENS = 2 * CHUNK + 17


def _inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(tokens, 8, generator=generator), torch.randn(30, 8, generator=generator)
    target = torch.randint(0, 30, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7
    return x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), target, mask


def _plain(x: torch.Tensor, head: torch.Tensor, target: torch.Tensor, z: float) -> torch.Tensor:
    """Loss of each token, from full logits."""
    logits = x @ head.T
    return functional.cross_entropy(logits, target, reduction="none") + z * logits.logsumexp(1).square()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("total", [None, 5, torch.tensor(7)])
def test_equals_cross_entropy_and_its_gradients(z_loss: float, total: torch.Tensor | int | None) -> None:
    x, head, target, mask = _inputs(torch.float64)
    loss, nll = next_token_loss(x, head, target, mask, z_loss=z_loss, total=total)
    expected = (_plain(x, head, target, z_loss) * mask).sum() / (mask.sum() if total is None else total)
    assert loss.dtype == nll.dtype == torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(nll, _plain(x, head, target, 0.0) * mask, atol=1e-12, rtol=1e-12)
    ours = torch.autograd.grad(3 * loss, (x, head))
    for a, b in zip(ours, torch.autograd.grad(3 * expected, (x, head)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_without_a_mask_all_count() -> None:
    x, head, target, _ = _inputs()
    loss, nll = next_token_loss(x, head, target)
    torch.testing.assert_close(loss, functional.cross_entropy(x @ head.T, target))
    torch.testing.assert_close(token_losses(x, head, target), nll)


def test_logits_far_from_zero_stay_finite() -> None:
    x, head, target, _ = _inputs()
    loss, _ = next_token_loss(x * 1e4, head, target)
    torch.testing.assert_close(loss, functional.cross_entropy(1e4 * x @ head.T, target))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, head)))


@pytest.mark.parametrize("tokens", [5, 0])
def test_nothing_counted_is_zero_with_zero_gradients(tokens: int) -> None:
    x, head, target, _ = _inputs(tokens=tokens)
    loss, nll = next_token_loss(x, head, target, torch.zeros(tokens, dtype=torch.bool), z_loss=0.1)
    assert loss.item() == 0
    assert not nll.any()
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, head)))


def test_parts_over_one_total_add_up_to_the_whole() -> None:
    x, head, target, mask = _inputs(torch.float64)
    whole = torch.autograd.grad(next_token_loss(x, head, target, mask)[0], head)[0]
    total, parts = mask.sum(), [slice(0, 100), slice(100, 700), slice(700, None)]
    summed = sum(
        torch.autograd.grad(next_token_loss(x[p], head, target[p], mask[p], total=total)[0], head)[0] for p in parts
    )
    torch.testing.assert_close(summed, whole, atol=1e-13, rtol=1e-12)


def test_bfloat16_sums_the_heads_gradient_over_chunks_in_fp32() -> None:
    x, head, target, _ = _inputs(torch.bfloat16, tokens=16 * CHUNK)
    loss, nll = next_token_loss(x, head, target)
    assert loss.dtype == nll.dtype == torch.float32
    grad_x, grad_head = torch.autograd.grad(loss, (x, head))
    assert grad_x.dtype == grad_head.dtype == torch.bfloat16
    exact = functional.cross_entropy(x.double() @ head.double().T, target)
    expected = torch.autograd.grad(exact, head)[0]
    torch.testing.assert_close(loss.double(), exact, atol=0, rtol=2e-3)
    # Summed in bf16 over these 16 chunks, the difference is five times as large.
    assert ((grad_head - expected).norm() / expected.norm()).item() < 4e-3


def test_bfloat16_scales_the_states_gradient_in_fp32() -> None:
    """Over 517 targets: 1/517 lies between two bf16 numbers, which would be off by 0.1% the same way everywhere."""
    x, head, target, _ = _inputs(torch.bfloat16, tokens=517)
    whole, parts = (torch.autograd.grad(next_token_loss(x, head, target, total=total)[0], x)[0] for total in (517, 1))
    torch.testing.assert_close(whole, (parts.double() / 517).bfloat16(), atol=0, rtol=0)


def test_compiled_rows_equal_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole and without the in-place writes; a real compiler would take 15 s here."""
    monkeypatch.setattr(
        loss_module, "_fused_rows", torch.compile(loss_module._rows, fullgraph=True, backend="aot_eager")
    )
    x, head, target, mask = _inputs(tokens=40)
    results = []
    for compiled in (False, True):
        loss, nll = next_token_loss(x, head, target, mask, z_loss=0.1, compiled=compiled)
        results.append((loss, nll, *torch.autograd.grad(loss, (x, head))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize(("vocab", "dtype"), [(7, torch.float32), (1000, torch.float32), (20_000, torch.bfloat16)])
def test_the_triton_body_works_on_rows_as_the_definition_does(vocab, dtype, z):
    pytest.importorskip("triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from moe import kernels_loss
    from moe.loss import _rows

    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=g) * 4).to(device, dtype)
    logits[2] = float("nan")  # does not count, so nothing of it may be seen
    target = torch.randint(0, vocab, (5,), generator=g).to(device)
    mask = torch.tensor([True, True, False, True, True], device=device)
    kept = mask.nonzero()[:, 0]
    nll, penalty, grad = kernels_loss.rows(logits.clone(), target, mask, z)
    want = _rows(logits[kept].clone(), target[kept], mask[kept], z)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(nll[kept], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty, want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[kept], want[2], **near)
    assert float(nll[2]) == 0
    assert not grad[2].any()
