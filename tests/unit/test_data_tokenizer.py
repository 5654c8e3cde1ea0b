"""Bytes and real ``tokenizer.json`` files to ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tokenizers import TEXT, make_closed_tokenizer, make_tokenizer

from kempnerforge.data.tokenizer import ByteTokenizer, encoding_errors, load_tokenizer, token_dtype
from kempnerforge.errors import DataError, StopRequestedError


def test_byte_tokenizer_bytes_are_ids():
    tokenizer = ByteTokenizer()
    raw = bytes(range(256))
    assert tokenizer.encode(raw).tolist() == list(range(256))
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.encode(b"").size == 0
    assert (tokenizer.separator_id, tokenizer.vocab_size) == (256, 257)
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"ab", b"c"])] == [[97, 98], [99]]


def test_tokenizer_json_matches_reference(tmp_path):
    reference = make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16
    assert ids.tolist() == reference.encode(TEXT, add_special_tokens=False).ids
    assert reference.decode(ids.tolist()) == TEXT
    assert tokenizer.separator_id == reference.token_to_id("</s>")
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert [batch.tolist() for batch in tokenizer.encode_batch([TEXT.encode(), b"x"])] == [
        ids.tolist(),
        reference.encode("x", add_special_tokens=False).ids,
    ]
    assert load_tokenizer(str(tmp_path)).digest == tokenizer.digest


def test_tokenizer_separator_in_text_stays_text(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.separator_id not in ids
    assert ids.size > 3


def test_tokenizer_invalid_utf8_replaced(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(b"a\xffb").tolist() == tokenizer.encode("a\ufffdb").tolist()
    assert tokenizer.reads_utf8
    assert not ByteTokenizer().reads_utf8


@pytest.mark.parametrize("eos", ["<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<eos>"])
def test_tokenizer_well_known_separator_found(tmp_path, eos):
    reference = make_tokenizer(tmp_path / "tokenizer.json", eos=eos)
    assert load_tokenizer(str(tmp_path)).separator_id == reference.token_to_id(eos)


@pytest.mark.parametrize("value", ["[STOP]", {"content": "[STOP]", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokenizer_config_file_names_separator(tmp_path, name, value):
    reference = make_tokenizer(tmp_path / "tokenizer.json", eos="[STOP]")
    with pytest.raises(DataError, match=r"no end-of-text token.*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    assert load_tokenizer(str(tmp_path)).separator_id == reference.token_to_id("[STOP]")


def test_tokenizer_separator_changes_digest(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    before = load_tokenizer(str(tmp_path)).digest
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<begin>"}')
    assert load_tokenizer(str(tmp_path)).digest != before


def test_tokenizer_unusable_file_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(broken))
    make_tokenizer(broken)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(DataError, match="'<nowhere>' is not in the vocabulary"):
        load_tokenizer(str(broken))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load_tokenizer(str(broken))


def test_tokenizer_text_without_token_refused(tmp_path):
    make_closed_tokenizer(tmp_path / "tokenizer.json", ["e4"])
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("e4 e4").tolist() == [0, 0]
    for encode in (lambda: tokenizer.encode("e5"), lambda: tokenizer.encode_batch([b"e4", b"e5"])):
        with pytest.raises(DataError, match=r"/tokenizer\.json cannot encode the text: .* an unknown token"):
            encode()


def test_tokenizer_config_that_is_no_object_is_refused(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: it is not a JSON object"):
        load_tokenizer(str(tmp_path), eos="</s>").files()


def test_token_dtype_smallest_that_fits():
    assert token_dtype(65_536).name == "uint16"
    assert token_dtype(65_537).name == "uint32"


@pytest.mark.parametrize("error", [StopRequestedError("SIGTERM"), MemoryError()])
def test_tokenizer_errors_of_others_are_not_its_own(error):
    """A signal may arrive while it encodes."""
    with pytest.raises(type(error)), encoding_errors("a"):
        raise error
