"""Muon: momentum whose singular values are all set to one, for every weight matrix by itself.

In: weights, momenta and gradients [N, m, n] of N equal-shaped matrices. Out: the first two updated in place. The polar
factor comes from six polynomial steps of Polar Express (arXiv 2505.16932), the number and the coefficients that Step 3.5
Flash trains with (arXiv 2602.10604, section 4.2.3): a singular value of at least 5e-4 of the matrix's Frobenius norm
ends within 0.7 to 1.01 (from 1e-3 on, 0.95), a smaller one is multiplied by about 1,800 and never passes 1.01. The
update is scaled to the size of AdamW's (0.2 * sqrt(max(m, n)), arXiv 2502.16982), so that one learning rate serves both.

Precision: scaling to norm one in fp32 (fp64 for fp64), by the greatest entry first, so that neither 1e-30 nor 1e30
breaks it; the iteration in fp16 on a GPU, since bf16 keeps 8 bits and the paper saw rare unrecoverable spikes from it,
and in fp32 on a CPU, where fp16 products are slow. Cost: 12 products of m * m * n for the shorter side m; E32 F512 at
width 1024 (96 matrices of a layer) 2.65 ms on one H100.
"""

import torch
from torch import Tensor, nn

from moe.experts import FUSED

MARGIN = 1.01  # released code: keeps rounding from lifting a singular value out of the polynomials' range
# Minimax coefficients of x, x^3, x^5 from Polar Express's authors for singular values from 1e-3 to 1.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
RMS = 0.2  # of AdamW's usual update (arXiv 2502.16982, section 2.2)


def matrices(name: str, parameter: nn.Parameter) -> list[tuple[int, int]]:
    """Shapes [m, n] of the matrices that lie end to end in a parameter, none if AdamW updates it.

    Embeddings, output heads, gains and biases are AdamW's. A 3-D parameter is one matrix per expert, or two where
    gate and up projection are stored as one (moe/experts.py): their common polar factor would be another.
    """
    if parameter.ndim < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight", "output.weight")):
        return []
    *stacked, rows, columns = parameter.shape
    parts = 2 if name.endswith(FUSED) else 1
    return [(rows // parts, columns)] * (parts * torch.Size(stacked).numel())


def update(
    weight_Nmn: Tensor, momentum_Nmn: Tensor, grad_Nmn: Tensor, lr: Tensor, momentum: Tensor, weight_decay: float
) -> None:
    """One step with Nesterov momentum and decoupled weight decay, in place; `lr` and `momentum` are 0-d tensors."""
    momentum_Nmn.mul_(momentum).add_(grad_Nmn)
    polar_Nmn = polar(grad_Nmn + momentum * momentum_Nmn)
    weight_Nmn.mul_(1 - lr * weight_decay)
    weight_Nmn.sub_(lr * (RMS * max(weight_Nmn.shape[-2:]) ** 0.5) * polar_Nmn)


def polar(x_Nmn: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest matrix with singular values one, for each of N, in x's type; zero for zero.

    `dtype` of the iteration: by default fp16 on a GPU, else x's own.
    """
    if dtype is None:
        dtype = torch.float16 if x_Nmn.is_cuda and x_Nmn.dtype == torch.float32 else x_Nmn.dtype
    tiny = torch.finfo(x_Nmn.dtype).tiny
    unit = x_Nmn / x_Nmn.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    unit = unit / (MARGIN * torch.linalg.matrix_norm(unit, keepdim=True)).clamp(min=tiny)
    wide = unit.mT if unit.shape[-2] > unit.shape[-1] else unit
    x = wide.to(dtype).contiguous()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        cubic = torch.baddbmm(gram, gram, gram, beta=b / MARGIN**3, alpha=c / MARGIN**5)
        x = torch.baddbmm(x, cubic, x, beta=a / MARGIN, alpha=1.0)
    return (x.mT if wide is not unit else x).to(x_Nmn.dtype)
