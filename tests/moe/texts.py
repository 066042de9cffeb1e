"""A byte-level tokenizer small enough to train in a test, and models over it whose answers are known."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from moe.config import ModelConfig
from moe.model import Decoder
from moe.presets import preset


def tokenizer_of(texts: Iterable[str], vocab_size: int = 300) -> Tokenizer:
    """Token 0 is `<eos>`; every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def uniform(tokenizer: Tokenizer, context: int = 256) -> Decoder:
    """A model to which every token is equally likely."""
    config = preset("ci", vocab_size=tokenizer.get_vocab_size(), eos=0)
    model = Decoder(ModelConfig(**{**vars(config), "context": context})).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model
