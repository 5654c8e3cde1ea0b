"""Ids to text, one at a time: the same text as all at once, and no half characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.tokenizers import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kempnerforge.data.text_decoder import MAX_INCOMPLETE
from kempnerforge.data.tokenizer import ByteTokenizer, HfTokenizer, load_tokenizer

TEXTS = [
    "",
    "aéaéa",
    "plain words, twice: plain words",
    "é",
    "naïve 日本語 \U0001f600 e\u0301",
    "\U0001f468\u200d\U0001f469",
]
RANGES = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)]


def random_text(generator: random.Random) -> str:
    return "".join(
        chr(generator.randrange(*generator.choice(RANGES))) for _ in range(generator.randrange(40))
    )


def with_byte_fallback(path: Path) -> Tokenizer:
    """A tokenizer like Llama 2's: words begin with ▁, and unknown characters are tokens of bytes."""
    words = [
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁plain",
        "▁words",
        "p",
        "l",
        "a",
        "i",
        "n",
    ]
    model = models.BPE(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        byte_fallback=True,
        unk_token=None,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(path))
    return tokenizer


def with_cut_characters(path: Path) -> Tokenizer:
    """A byte-level tokenizer with a token of a letter and the first byte of the next character."""
    tokenizer = make_tokenizer(path)
    body = json.loads(tokenizer.to_str())
    body["model"]["merges"] = [["a", "Ã"]]
    body["model"]["vocab"] = {**body["model"]["vocab"], "aÃ": tokenizer.get_vocab_size()}
    path.write_text(json.dumps(body))
    return Tokenizer.from_file(str(path))


MAKERS = {"byte-level": make_tokenizer, "byte fallback": with_byte_fallback, "cut": with_cut_characters}


@pytest.fixture(params=["bytes", *MAKERS])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> ByteTokenizer | HfTokenizer:
    file = tmp_path / "tokenizer.json"
    if request.param == "bytes":
        return ByteTokenizer()
    MAKERS[request.param](file)
    return HfTokenizer(file)


def streamed(tokenizer: ByteTokenizer | HfTokenizer, ids: list[int], context: list[int]) -> list[str]:
    decoder = tokenizer.decoder(context)
    return [*(decoder.add(token) for token in ids), decoder.flush()]


def test_decoder_parts_make_the_whole_text(tokenizer: ByteTokenizer | HfTokenizer) -> None:
    generator = random.Random(0)
    for text in [*TEXTS, *(random_text(generator) for _ in range(60))]:
        context = [tokenizer.separator_id, *tokenizer.encode("a prompt:").tolist()]
        parts = streamed(tokenizer, tokenizer.encode(text).tolist(), context)
        # Metaspace puts a space before the first word.
        assert "".join(parts).removeprefix(" ") == text.removeprefix(" ")
        assert not any("\ufffd" in part for part in parts)
        assert parts[-1] == ""


def test_decoder_incomplete_character_comes_at_the_end(tokenizer: ByteTokenizer | HfTokenizer) -> None:
    whole = tokenizer.encode("é€").tolist()
    *parts, rest = streamed(tokenizer, whole[:-1], [tokenizer.separator_id])
    assert "".join(parts).strip() == "é"
    assert set(rest) == {"\ufffd"}


def test_decoder_invalid_bytes_do_not_pile_up(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path))
    continuation = tokenizer.encode("é").tolist()[-1]
    decoder = tokenizer.decoder()
    parts = [decoder.add(continuation) for _ in range(MAX_INCOMPLETE)]
    assert parts[-1] == "\ufffd" * MAX_INCOMPLETE
    assert "".join(parts[:-1]) == ""
    assert decoder.add(tokenizer.encode("x").item()) == "x"


def test_byte_decoder_separator_has_no_text() -> None:
    assert streamed(ByteTokenizer(), [104, 256, 0xC3, 256, 105], []) == ["h", "", "", "\ufffd", "i", ""]


def test_byte_tokenizer_files_have_the_same_ids(tmp_path: Path) -> None:
    for name, data in ByteTokenizer().files().items():
        (tmp_path / name).write_bytes(data)
    stored, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), ByteTokenizer()
    assert stored.get_vocab_size() == ours.vocab_size
    generator = random.Random(1)
    for text in [*TEXTS, *(random_text(generator) for _ in range(200))]:
        ids = stored.encode(text).ids
        assert ids == [ours.separator_id, *ours.encode(text).tolist()]
        assert stored.decode(ids) == text
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.separator_id, loaded.vocab_size) == (256, 257)


def test_tokenizer_files_name_the_separator(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a" / "tokenizer.json", eos="<eos>")
    given = load_tokenizer(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    for name, data in given.files().items():
        (tmp_path / "b" / name).write_bytes(data)
    assert '"eos_token": "<eos>"' in (tmp_path / "b" / "tokenizer_config.json").read_text()
    assert load_tokenizer(str(tmp_path / "b")).digest == given.digest
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "own": 1}')
    assert b'"own"' in given.files()["tokenizer_config.json"]
