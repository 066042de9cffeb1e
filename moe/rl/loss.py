"""MIS-PO: the policy gradient with tokens and whole trajectories masked where trainer and sampler disagree.

In: log-probabilities of the sampled tokens by the policy in training, by its snapshot at the generation's start and by the
sampler, one advantage a trajectory. Out: the loss and what it left out. Step 3.5 Flash (arXiv 2602.10604, sections 5.2.1 and
5.2.3), with x_t = pi_old(a_t | s_t) / pi_sampler(a_t | s_t), rho = (product of x_t)^(1/T), I(z) = 1 inside the bounds, else 0:

    L = -E over the sampler's trajectories of [ I(x_t) I(rho) log pi(a_t | s_t) A_t ]

The masks are constants: no gradient passes through them, nothing is weighed by importance, nothing is clipped. pi_old does not
move within a generation; `ratio_of: current` takes pi itself (without gradient) in its place. Comparisons: `reinforce` masks
nothing, `ppo` is min(r A, clip(r) A) with r = pi / pi_old. The report does not publish over what the mean is taken; here it is
over all sampled tokens of an update, masked ones included, so that masking never makes the others weigh more.

Legend: B trajectories, T tokens of the longest answer, S tokens, D model width, V vocabulary. Arrays [B, T] are padded; `real_BT`
tells their tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.experts import wide
from moe.rl.config import RLConfig

CHUNK = 1024  # tokens whose logits exist at once; as moe/score.py


@dataclass(frozen=True)
class Policy:
    """What is known of the sampled tokens before an update, [B, T] each, and the trajectories' advantages [B]."""

    old: Tensor  # log-probabilities by the weights at the generation's start
    sampler: Tensor  # by the engine that sampled them, with its weights
    real: Tensor  # bool
    advantage: Tensor
    weight: Tensor  # of each token in the mean; sums to 1 over the update's real tokens


@dataclass(frozen=True)
class Masks:
    """Which tokens stay, which trajectories, and the ratios that decided."""

    token: Tensor  # [B, T] bool, False in padding
    trajectory: Tensor  # [B] bool
    ratio: Tensor  # [B, T], 1 in padding
    trajectory_ratio: Tensor  # [B]

    @property
    def kept(self) -> Tensor:
        """Tokens that pass both masks."""
        return self.token & self.trajectory[:, None]


def masks(numerator_BT: Tensor, policy: Policy, config: RLConfig) -> Masks:
    """The masks of MIS-PO; `numerator_BT` are the log-probabilities that stand over the sampler's."""
    real_BT = policy.real
    log_BT = torch.where(real_BT, numerator_BT.detach() - policy.sampler, 0.0)
    log_B = log_BT.sum(1) / real_BT.sum(1).clamp(min=1)
    ratio_BT, ratio_B = log_BT.exp(), log_B.exp()
    return Masks(
        _inside(ratio_BT, config.token_ratio) & real_BT, _inside(ratio_B, config.trajectory_ratio), ratio_BT, ratio_B
    )


def policy_loss(logp_BT: Tensor, policy: Policy, config: RLConfig) -> tuple[Tensor, Masks]:
    """The loss that is minimised, 0-d, and the masks; `ppo` and `reinforce` report the masks and do not use them."""
    found = masks(logp_BT if config.ratio_of == "current" else policy.old, policy, config)
    advantage_B1 = policy.advantage[:, None]
    if config.loss == "ppo":
        ratio_BT = torch.where(policy.real, logp_BT - policy.old, 0.0).exp()
        near_BT = ratio_BT.clamp(1 - config.ppo_clip, 1 + config.ppo_clip)
        gain_BT = torch.minimum(ratio_BT * advantage_B1, near_BT * advantage_B1)
        kept_BT = policy.real
    else:
        gain_BT = logp_BT * advantage_B1
        kept_BT = found.kept if config.loss == "mispo" else policy.real
    # Not a product with the mask: padding may hold an infinity.
    return -torch.where(kept_BT, gain_BT * policy.weight, 0.0).sum(), found


def token_weights(lengths_B: Tensor, real_BT: Tensor, config: RLConfig) -> Tensor:
    """Each token's weight in the mean, [B, T]; `lengths_B` are all trajectories of the update, padding has 0."""
    if config.mean_over == "trajectories":
        weight_BT = real_BT / (len(lengths_B) * real_BT.sum(1, keepdim=True).clamp(min=1))
    else:
        weight_BT = real_BT / lengths_B.sum().clamp(min=1)
    return weight_BT.to(torch.float32)


def token_logprobs(x_SD: Tensor, head_VD: Tensor, target_S: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of the targets (differentiable) and the entropy of each token's distribution (not), [S], in fp32 at least.

    `x_SD` are normed states. Logits exist for `CHUNK` tokens at a time and are computed again for the gradient.
    """
    parts = [
        checkpoint(_logprobs, x, head_VD, target, temperature, use_reentrant=False)
        for x, target in zip(x_SD.split(CHUNK), target_S.split(CHUNK), strict=True)
    ]
    return torch.cat([p for p, _ in parts]), torch.cat([h for _, h in parts])


def _logprobs(x_SD: Tensor, head_VD: Tensor, target_S: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p_SV = (wide(x_SD @ head_VD.T) / temperature).log_softmax(-1)
    entropy_S = -(log_p_SV.exp() * log_p_SV).detach().sum(-1)
    return log_p_SV.gather(1, target_S[:, None])[:, 0], entropy_S


def _inside(ratio: Tensor, bounds: tuple[float, float]) -> Tensor:
    """A ratio that is not a number lies outside."""
    return (ratio >= bounds[0]) & (ratio <= bounds[1])
