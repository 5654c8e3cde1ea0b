"""A tokenizer that is trained on a few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "def hello(world):\n    return world + 1\n\nprint(hello(2))\n" * 20


def make_tokenizer(path: Path, *, eos: str = "</s>", vocab_size: int = 300) -> Tokenizer:
    """Train and save a small byte-level BPE tokenizer. Its file requests <begin>, truncation and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<begin>", eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def make_closed_tokenizer(path: Path, words: Sequence[str]) -> None:
    """Save a tokenizer of ``words`` that has no token for any other."""
    vocabulary = {word: number for number, word in enumerate([*words, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
