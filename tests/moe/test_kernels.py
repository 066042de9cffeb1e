"""Fused operators beside autograd on plain torch, and the Triton kernels beside those operators' references.

The kernels run on a GPU, or where TRITON_INTERPRET=1 is set and triton is installed, on CPU tensors.
"""

import os

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from moe import kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from moe import kernels_triton

    return kernels_triton


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def test_swiglu_by_hand():
    h = torch.tensor([[0.0, 2.0, 3.0, -1.0]], dtype=torch.float64)
    silu = 2 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp())
    got = kernels.swiglu(h, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[0.0, -0.5 * float(silu)]], dtype=torch.float64))
    clipped = kernels.swiglu(torch.tensor([[9.0, 9.0, 5.0, -5.0]]), torch.tensor([2.0]), 3.0)
    torch.testing.assert_close(clipped, torch.tensor([[18.0, -18.0]]))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_swiglu_gradient_is_that_of_the_formula(limit):
    h, weight = draw(7, 12).double().cpu().requires_grad_(), draw(7, seed=1).double().cpu().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernels.swiglu(a, b, limit), (h, weight))
    dy = torch.ones(7, 6, dtype=torch.float64)
    kernels.swiglu(h, weight, limit).backward(dy)
    ours = h.grad, weight.grad
    theirs = torch.autograd.grad(kernels.swiglu_reference(h, weight, limit or 0.0), (h, weight), dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_router_logits_and_gradients_are_those_of_a_linear_map():
    x, weight = draw(9, 16).double().cpu().requires_grad_(), draw(5, 16, seed=1).double().cpu().requires_grad_()
    torch.testing.assert_close(kernels.router_logits(x, weight), x @ weight.T)
    assert torch.autograd.gradcheck(kernels.router_logits, (x, weight))
    assert kernels.router_logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32


def test_three_bf16_pieces_hold_an_fp32_number():
    x = draw(1000).cpu()
    assert torch.equal(sum(p.double() for p in kernels.pieces(x, kernels.WEIGHT_PIECES)), x.double())
    left = (sum(p.double() for p in kernels.pieces(x, kernels.GRADIENT_PIECES)) - x.double()).abs() / x.abs()
    assert float(left.max()) < 2**-16


def test_top_experts_break_ties_by_index():
    score = torch.tensor([[0.5, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]])
    assert kernels.top_experts(score, 3).tolist() == [[1, 3, 0], [0, 1, 2]]


def test_expert_order_by_hand():
    order, place, ends = kernels.expert_order(torch.tensor([2, 0, 2, 3, 0]), 5)
    assert order.tolist() == [1, 4, 0, 2, 3]
    assert place.tolist() == [2, 0, 3, 4, 1]
    assert ends.tolist() == [2, 2, 4, 5, 5]
    assert ends.dtype == torch.int32


@given(st.lists(st.integers(0, 6), max_size=60))
@settings(max_examples=30, deadline=None)
def test_expert_order_and_place_are_inverse(chosen):
    chosen_R = torch.tensor(chosen, dtype=torch.int64)
    order, place, ends = kernels.expert_order(chosen_R, 7)
    assert torch.equal(order[place], torch.arange(len(chosen)))
    assert chosen_R[order].tolist() == sorted(chosen)
    assert ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == [chosen.count(e) for e in range(7)]


def test_operators_hold_under_a_whole_graph():
    def layer(h, weight, x, router):
        chosen = kernels.top_experts(kernels.router_logits(x, router).sigmoid(), 2)
        return kernels.swiglu(h, weight, 1.0), chosen, *kernels.expert_order(chosen.flatten(), len(router))

    inputs = draw(6, 8, seed=1), draw(6, seed=2), draw(6, 4, seed=3), draw(5, 4, seed=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), layer(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "width", "limit"), [(5, 6, 0.0), (70, 96, 0.5), (33, 600, 0.7)])
def test_swiglu_kernel(triton_kernels, rows, width, limit):
    h, weight, dy = draw(rows, 2 * width), draw(rows, seed=1), draw(rows, width, seed=2)
    got, want = triton_kernels.swiglu(h, weight, limit), kernels.swiglu_reference(h, weight, limit)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got = triton_kernels.swiglu_backward(dy, h, weight, limit)
    want = kernels.swiglu_backward_reference(dy, h, weight, limit)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(3, 4, 2), (70, 24, 4), (40, 64, 8), (5, 3, 3)])
def test_top_experts_kernel(triton_kernels, tokens, experts, top_k):
    score = draw(tokens, experts).mul(4).round()  # many ties
    assert torch.equal(triton_kernels.top_experts(score, top_k), kernels.top_experts_reference(score, top_k))


def test_top_experts_kernel_always_names_distinct_experts(triton_kernels):
    score = torch.full((4, 5), float("nan"), device=DEVICE)
    score[1, 3], score[2] = 1.0, float("-inf")
    got = triton_kernels.top_experts(score, 3).tolist()
    assert got == [[0, 1, 2], [3, 0, 1], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (255, 8), (1000, 24), (513, 64)])
def test_expert_order_kernel(triton_kernels, rows, experts):
    chosen = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    chosen = torch.where(chosen == 1, 0, chosen)  # an expert without tokens
    got, want = triton_kernels.expert_order(chosen, experts), kernels.expert_order_reference(chosen, experts)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (70, 32), (33, 20)])
def test_two_pieces_are_those_of_the_definition(tokens, experts, triton_kernels):
    x = draw(tokens, experts, scale=3.0)
    got = triton_kernels.two_pieces(x)
    if INTERPRETED:  # which cuts off where a GPU rounds
        torch.testing.assert_close(got.float().unflatten(1, (2, -1)).sum(1), x, rtol=2**-14, atol=0)
    else:
        assert torch.equal(got, torch.cat(kernels.pieces(x, 2), dim=1))
