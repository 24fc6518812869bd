from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_interp.errors import DataError
from lightning_interp.models import load_causal_lm
from lightning_interp.models.data.encoding import Encoder
from lightning_interp.models.data.rows import read_rows
from lightning_interp.testing import byte_tokenizer

QUESTION = {"role": "user", "content": "q?"}
ANSWER = {"role": "assistant", "content": "yes"}


def encode(row, tokenizer, **options):
    return Encoder(tokenizer=tokenizer, **options).encode(read_rows([row], name="train")[0])


def shown(encoded, tokenizer):
    """The whole text, and its scored stretches."""
    stretches, current = [], []
    for index, scored in zip(encoded.ids, encoded.scored, strict=True):
        if scored:
            current.append(index)
        elif current:
            stretches, current = [*stretches, tokenizer.decode(current)], []
    return tokenizer.decode(encoded.ids), stretches + ([tokenizer.decode(current)] if current else [])


def merging_tokenizer(*merges, begin=False, eos="<eos>"):
    """Bytes and a few merges; ``begin`` puts a begin token (and an end token) around texts, as some tokenizers do."""
    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [tuple(pair.split()) for pair in merges]
    tokens = alphabet + ["".join(pair) for pair in pairs]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos)  # noqa: S106


def test_a_text_is_scored_whole():
    tokenizer = byte_tokenizer()
    assert shown(encode({"text": "né"}, tokenizer), tokenizer) == ("né<eos>", ["né<eos>"])


def test_a_completion_is_scored_and_its_prompt_is_not():
    tokenizer = byte_tokenizer()
    encoded = encode({"prompt": "né: ", "completion": "☃!"}, tokenizer)
    assert shown(encoded, tokenizer) == ("né: ☃!<eos>", ["☃!<eos>"])
    assert not encoded.split


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_used_exactly_as_given(chat):
    tokenizer = merging_tokenizer("a b", begin=True)
    tokenizer.chat_template = byte_tokenizer().chat_template
    row = {"prompt_ids": [70, 71], "completion_ids": [72, 5]}
    encoded = encode(row, tokenizer, chat=chat, add_eos=True)
    assert encoded == ([70, 71, 72, 5], [False, False, True, True], False)
    assert encode(row | {"prompt_ids": []}, tokenizer).scored == [True, True]


def test_a_token_id_beyond_the_vocabulary_is_refused():
    tokenizer = byte_tokenizer()
    row = {"prompt_ids": [261], "completion_ids": [7]}
    with pytest.raises(DataError, match=r"train\[0\]: the token id 261 is none of the 261 known ones \(0 to 260\)"):
        encode(row, tokenizer)
    assert encode(row, tokenizer, vocabulary=262).ids == [261, 7]


def test_the_end_token_is_an_option_and_never_doubled():
    tokenizer = byte_tokenizer()
    row = {"prompt": "a", "completion": "b"}
    assert shown(encode(row, tokenizer, add_eos=False), tokenizer) == ("ab", ["b"])
    assert shown(encode({"prompt": "a", "completion": "b<eos>"}, tokenizer), tokenizer) == ("ab<eos>", ["b<eos>"])


def test_ids_equal_those_of_the_whole_text_where_the_boundary_allows():
    tokenizer = merging_tokenizer("Ġ c", "Ġc a", "a t")
    row = {"prompt": "a fat", "completion": " cat"}
    encoded = encode(row, tokenizer, add_eos=False)
    assert encoded.ids == tokenizer("a fat cat").input_ids
    assert tokenizer.convert_ids_to_tokens([i for i, s in zip(encoded.ids, encoded.scored, strict=True) if s]) == [
        "Ġca",
        "t",
    ]
    assert not encoded.split


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("fa", "t", ["f", "a", "t"]),  # 'at' would straddle the boundary
        ("a ", "cat", ["a", "Ġ", "c", "at"]),  # 'Ġc' would; its reported characters leave the space out
    ],
)
def test_a_token_across_the_boundary_is_split_and_the_prompt_keeps_its_ids(prompt, completion, tokens):
    tokenizer = merging_tokenizer("Ġ c", "a t")
    encoded = encode({"prompt": prompt, "completion": completion}, tokenizer, add_eos=False)
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == tokens
    own = tokenizer(prompt).input_ids
    assert encoded.ids[: len(own)] == own
    assert encoded.scored == [False] * len(own) + [True] * (len(tokens) - len(own))
    assert encoded.split


def test_begin_tokens_are_put_once_and_end_tokens_by_the_option():
    tokenizer = merging_tokenizer("a t", begin=True)
    encoded = encode({"prompt": "f", "completion": "at"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["<bos>", "f", "at", "<eos>"]
    assert encoded.scored == [False, False, True, True]
    encoded = encode({"prompt": "", "completion": "at"}, tokenizer, add_eos=False)
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["<bos>", "at"]
    assert encoded.scored == [False, True]


# Conversations


def test_only_the_assistants_turns_are_scored():
    tokenizer = byte_tokenizer()
    turns = [QUESTION, ANSWER, {"role": "user", "content": "again?"}, {"role": "assistant", "content": "né"}]
    encoded = encode({"messages": turns}, tokenizer)
    text, stretches = shown(encoded, tokenizer)
    assert text + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)
    assert stretches == ["yes<|im_end|>", "né<|im_end|>"]
    assert encoded.ids == tokenizer(text, add_special_tokens=False).input_ids


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = byte_tokenizer()
    text, stretches = shown(encode({"messages": [QUESTION, ANSWER, QUESTION]}, tokenizer), tokenizer)
    assert text == "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert stretches == ["yes<|im_end|>"]


def test_two_answers_in_a_row_are_both_scored():
    tokenizer = byte_tokenizer()
    assert shown(encode({"messages": [QUESTION, ANSWER, ANSWER]}, tokenizer), tokenizer)[1] == ["yes<|im_end|>"] * 2


def test_prompt_and_completion_can_become_turns():
    tokenizer = byte_tokenizer()
    row = {"prompt": "q?", "completion": "yes"}
    chat = encode(row, tokenizer, chat=True)
    assert chat == encode({"messages": [QUESTION, ANSWER]}, tokenizer)
    assert (
        chat.ids[: -len("yes") - 1]
        == tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=True)["input_ids"]
    )


IMPLICIT = (
    "{% if messages[0]['role'] != 'system' %}{{ '[sys]be nice' }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def implicit_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = IMPLICIT
    return tokenizer


@pytest.mark.parametrize(
    ("system_prompt", "expected"),
    [(None, "[sys]be nice[user]q?"), ("", "[system][user]q?"), ("curt", "[system]curt[user]q?")],
)
def test_an_implicit_system_text_is_not_an_explicit_empty_one(system_prompt, expected):
    tokenizer = implicit_tokenizer()
    encoded = encode({"messages": [QUESTION, ANSWER]}, tokenizer, system_prompt=system_prompt)
    assert shown(encoded, tokenizer) == (f"{expected}[assistant]yes<eos>", ["yes<eos>"])


def test_a_rows_own_system_text_wins_even_if_empty():
    tokenizer = implicit_tokenizer()
    turns = [{"role": "system", "content": ""}, QUESTION, ANSWER]
    encoded = encode({"messages": turns}, tokenizer, system_prompt="curt")
    assert shown(encoded, tokenizer)[0] == "[system][user]q?[assistant]yes<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else 'gone' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"train\[0\]: the chat template .* before messages\[1\]"):
        encode({"messages": [QUESTION, ANSWER, QUESTION]}, tokenizer)


def test_a_conversation_that_the_template_refuses_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate, sorry') }}"
    with pytest.raises(DataError, match=r"train\[0\]: the chat template .* \(roles must alternate, sorry\)"):
        encode({"messages": [QUESTION, ANSWER]}, tokenizer)


def test_a_tokenizer_without_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"train\[0\]: 'messages' needs a chat template"):
        encode({"messages": [QUESTION, ANSWER]}, tokenizer)
    with pytest.raises(DataError, match=r"chat=True needs a chat template"):
        Encoder(tokenizer=tokenizer, chat=True)
    with pytest.raises(DataError, match=r"system_prompt='curt' needs a chat template"):
        Encoder(tokenizer=tokenizer, system_prompt="curt")


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(DataError, match=r"train\[0\]: .* has no end token .*add_eos=False"):
        encode({"text": "a"}, merging_tokenizer(eos=None))


@pytest.mark.bundled
def test_the_bundled_models_template_and_boundaries():
    tokenizer = load_causal_lm("smollm2-135m-instruct").tokenizer
    encoded = encode({"messages": [QUESTION, ANSWER]}, tokenizer)
    text, stretches = shown(encoded, tokenizer)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert stretches == ["yes<|im_end|>"]
    assert not encoded.split
    empty = encode({"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]}, tokenizer)
    assert shown(empty, tokenizer)[0].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq?")
    fact = encode({"prompt": "The capital of France is", "completion": " Paris."}, tokenizer)
    assert fact.ids == tokenizer("The capital of France is Paris.<|im_end|>").input_ids
    assert shown(fact, tokenizer)[1] == [" Paris.<|im_end|>"]
    assert encode({"prompt": "The capital of France is ", "completion": "Paris."}, tokenizer).split
