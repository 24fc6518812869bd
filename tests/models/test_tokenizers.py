from __future__ import annotations

import pytest
from tokenizers import AddedToken, pre_tokenizers

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models import check_same_tokenizer
from lightning_interp.testing import byte_tokenizer


def test_equal_tokenizers_pass_whatever_their_template_and_padding(tmp_path):
    other = byte_tokenizer()
    other.chat_template, other.padding_side, other.pad_token = None, "right", "<eos>"
    check_same_tokenizer(byte_tokenizer(), other)
    byte_tokenizer().save_pretrained(tmp_path)
    check_same_tokenizer(byte_tokenizer(), type(other).from_pretrained(tmp_path))
    check_same_tokenizer(other, other)


def test_another_size_names_the_first_token_that_differs():
    other = byte_tokenizer()
    other.add_tokens([AddedToken("<new>")])
    with pytest.raises(IncompatibleModelError, match=r"261 and 262 tokens, .* id 261: None and '<new>'"):
        check_same_tokenizer(byte_tokenizer(), other)


def test_one_renamed_token_is_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"z":', '"Zz":'))
    other = type(byte_tokenizer()).from_pretrained(tmp_path)
    index = byte_tokenizer().convert_tokens_to_ids("z")
    with pytest.raises(IncompatibleModelError, match=rf"261 and 261 tokens, .* id {index}: 'z' and 'Zz'"):
        check_same_tokenizer(byte_tokenizer(), other)


def test_another_end_token_is_named():
    other = byte_tokenizer()
    other.eos_token = "<|im_end|>"  # noqa: S105
    with pytest.raises(IncompatibleModelError, match=r"eos_token_id is 2 and 4"):
        check_same_tokenizer(byte_tokenizer(), other)


def test_another_way_to_split_is_named():
    other = byte_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(IncompatibleModelError, match=r"split 'The capital of France is Paris.' differently: ids \["):
        check_same_tokenizer(byte_tokenizer(), other)
