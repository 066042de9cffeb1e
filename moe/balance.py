"""What tells whether experts share the work: statistics of a forward, and the loss that balances groups of experts.

In: the router's logits and scores [S, E], the chosen experts [S, K], each expert's number of copies [E], and SwiGLU's
output [R, F]. Out: 0-d tensors and [E, 2] without a wait for the device, equal from run to run. Statistics by name:

    rms_min_median, rms_max_median   least and greatest expert's RMS of SwiGLU's output over the median of those that
                                     have rows: they fall and rise as experts die and blow up while loss and load look
                                     healthy (Step 3.5 Flash, arXiv 2602.10604). An expert without rows reads 0
    dead_fraction                    experts below a tenth of the mean load or of the median RMS
    confidence                       share of the score mass on the chosen experts
    load_entropy                     1 when balanced, 0 when one expert takes all
    router_logit_std, _max           of all logits, the greatest by size

Legend: S tokens, E experts, K chosen of them, R routed copies of tokens sorted by expert, F expert width, G groups.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

WEIGHT_SUM_EPS = 1e-20  # released modelling code: keeps the renormalisation finite when all chosen scores underflow
SMALLEST = 1e-30  # of a squared weight: a row whose weight vanished shows no activity
IDLE = 0.1  # an expert counts as dead below this share of the mean load or of the median RMS (chosen)


def squares_and_rows(a_RF: Tensor, weight_R: Tensor, load_E: Tensor) -> Tensor:
    """[E, 2], fp32: sums over each expert's rows of their mean squares before they were weighed, and its rows.

    Both are sums, so those of ranks that hold the same experts add up.
    """
    square_R = a_RF.to(weight_R.dtype).square().mean(-1) / weight_R.square().clamp(min=SMALLEST)
    # Every row against every expert: running sums and atomic additions depend on the run on a GPU.
    ends_E, index_R1 = load_E.cumsum(0), torch.arange(len(a_RF), device=a_RF.device)[:, None]
    own_RE = (index_R1 >= ends_E - load_E) & (index_R1 < ends_E)
    return torch.stack((torch.where(own_RE, square_R[:, None], 0).sum(0).float(), load_E.float()), dim=1)


def activity_stats(activity_E2: Tensor) -> dict[str, Tensor]:
    """What compares experts, from `squares_and_rows` of all of them; 0 where none has a row."""
    square_E, rows_E = activity_E2.unbind(1)
    rms_E = (square_E / rows_E.clamp(min=1)).sqrt()
    median = torch.where(rows_E > 0, rms_E, torch.nan).nanmedian()
    ratio_E = (rms_E / median).nan_to_num(0.0)
    dead_E = (rows_E < IDLE * rows_E.mean()) | (ratio_E < IDLE)
    return {
        "rms_min_median": ratio_E.amin(),
        "rms_max_median": ratio_E.amax(),
        "dead_fraction": dead_E.float().mean(),
    }


def counted_load(counted_S: Tensor, order_R: Tensor, ends_E: Tensor, k: int) -> Tensor:
    """[E], int64: copies of counted tokens; `order_R` and `ends_E` are those of the sort by expert."""
    before_R1 = functional.pad(counted_S[order_R // k].to(torch.int64).cumsum(0), (1, 0))
    return before_R1[functional.pad(ends_E, (1, 0)).to(torch.int64)].diff()


def routing_stats(
    logit_SE: Tensor, score_SE: Tensor, chosen_SK: Tensor, load_E: Tensor, counted_S: Tensor | None = None
) -> dict[str, Tensor]:
    """What describes the router's choices; `load_E` holds counted tokens only."""
    mass_S = score_SE.gather(1, chosen_SK).sum(-1) / (score_SE.sum(-1) + WEIGHT_SUM_EPS)
    share_E = load_E.to(score_SE.dtype) / load_E.sum().clamp(min=1)
    mean = _mean(logit_SE.mean(-1), counted_S)
    kept_SE = logit_SE if counted_S is None else torch.where(counted_S[:, None], logit_SE, 0)
    return {
        "confidence": _mean(mass_S, counted_S),
        "router_logit_std": _mean((logit_SE - mean).square().mean(-1), counted_S).sqrt(),
        "router_logit_max": kept_SE.abs().amax(),
        "load_entropy": -torch.xlogy(share_E, share_E).sum() / math.log(max(2, len(share_E))),
    }


def group_loss(score_SE: Tensor, load_E: Tensor, groups: int, counted_S: Tensor | None = None) -> Tensor:
    """G * sum over groups of (share of copies) * (mean probability): 1 when balanced, at most G.

    Probabilities are the scores normalised over all experts. Counts have no gradient, so the loss reaches the router's
    scores only, and lowers those of crowded groups.
    """
    if groups == 1:
        return score_SE.new_ones(())
    probability_E = _mean(score_SE / (score_SE.sum(-1, keepdim=True) + WEIGHT_SUM_EPS), counted_S)
    share_E = load_E.to(score_SE.dtype) / load_E.sum().clamp(min=1)
    return groups * (share_E.view(groups, -1).sum(1) * probability_E.view(groups, -1).sum(1)).sum()


def _mean(values: Tensor, counted_S: Tensor | None) -> Tensor:
    """The mean over counted tokens, the first dimension; 0 without any."""
    if counted_S is None:
        return values.mean(0)
    weight_S = counted_S.to(values.dtype)
    return torch.tensordot(weight_S, values, 1) / weight_S.sum().clamp(min=1)
