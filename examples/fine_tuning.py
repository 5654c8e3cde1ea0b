"""Make conversations and a small tokenizer with a chat template, to try fine-tuning without a network.

    python examples/fine_tuning.py FOLDER

See docs/guide/fine-tuning.md.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# ChatML, with {% generation %} around what the assistant says.
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def conversation(chance: random.Random) -> list[dict[str, str]]:
    """Return one to three questions about sums, with their answers."""
    messages = []
    for _ in range(chance.randint(1, 3)):
        a, b = chance.randint(0, 20), chance.randint(0, 20)
        messages.append({"role": "user", "content": f"What is {a} plus {b}?"})
        messages.append({"role": "assistant", "content": f"{a} plus {b} is {a + b}."})
    return messages


def main(folder: Path, count: int = 2000) -> None:
    """Write ``chats.jsonl`` and the files of the tokenizer into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    chats = [conversation(chance) for _ in range(count)]
    with open(folder / "chats.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in chats)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for messages in chats for m in messages), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
