"""Continues a prompt, one token at a time, with a key/value cache.

In: a decoder and token ids, or a run folder and a text. Out: new token ids without EOS, or the new text. A prompt
starts from EOS like every document. Same folder, prompt, settings and seed: same output.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ConfigError
from moe import checkpoint
from moe.attention import KVCache
from moe.model import Decoder


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The continuation of `prompt`, without it. `max_tokens` None: as far as the model's context reaches."""
    tokenizer = checkpoint.load_tokenizer(Path(folder))
    model = checkpoint.load(Path(folder))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    new = generate(model, ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return tokenizer.decode(list(new))


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields new tokens until EOS or `max_tokens`.

    `temperature` 0 takes the likeliest token. EOS, prompt and new tokens must fit the context.
    """
    config = model.config
    room = config.context - len(prompt)  # EOS takes one place, and the last new token needs none
    wanted = room if max_tokens is None else max_tokens
    problems = []
    if not 0 < wanted <= room:
        problems.append(
            f"generate: prompt and answer exceed the context, got {len(prompt)} + {wanted} tokens, "
            f"expected 1 to {room} new ones within {config.context}; shorten the prompt or lower max_tokens"
        )
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        problems.append(
            f"generate: a sampling setting is out of range, got temperature {temperature}, top_p {top_p}, "
            f"top_k {top_k}, expected temperature >= 0, 0 < top_p <= 1, top_k >= 1"
        )
    if any(not 0 <= t < config.vocab_size for t in prompt):
        problems.append(
            f"generate: the prompt has tokens outside the vocabulary, expected 0 to {config.vocab_size - 1}"
        )
    if problems:
        raise ConfigError(*problems)
    return _tokens(model, [config.eos, *prompt], wanted, temperature, top_k, top_p, seed)


def _tokens(
    model: Decoder, start: list[int], wanted: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> Iterator[int]:
    generator, cache = torch.Generator().manual_seed(seed), KVCache(model.config)
    fresh = torch.tensor([start])
    for _ in range(wanted):
        with torch.inference_mode():
            logits_V = model.lm_head(model.hidden(fresh, cache=cache)[0, -1])
            token = sample(logits_V, temperature, top_k, top_p, generator)
        if token == model.config.eos:
            return
        yield token
        fresh = torch.tensor([[token]])


def sample(logits_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One token.

    Of the `top_k` likeliest, the shortest prefix whose probability reaches `top_p`. Equal logits: the lower id is
    likelier.
    """
    sorted_V, ids_V = logits_V.float().sort(descending=True, stable=True)
    if temperature == 0:
        return int(ids_V[0])
    probability_V = (sorted_V[:top_k] / temperature).softmax(0)
    before_V = probability_V.cumsum(0) - probability_V
    kept = probability_V[before_V < top_p]
    return int(ids_V[torch.multinomial(kept, 1, generator=generator)])
