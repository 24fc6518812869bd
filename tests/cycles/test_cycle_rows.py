"""Rows of a chain: what is read, asked, written and learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import SEED, chain, data, fitting, of, scores, writing

from lightning_interp.cycles import Filter, Take
from lightning_interp.cycles.chain_rows import combined, learned, placed, read_seed, request_of, written_row
from lightning_interp.cycles.chain_settings import ChainSettings
from lightning_interp.errors import DataError
from lightning_interp.generation import FunctionGenerator
from lightning_interp.generation.hygiene import NearDuplicates
from lightning_interp.models.data.batching import EpochSampler
from lightning_interp.testing import byte_tokenizer

CHAT, PLAIN = ChainSettings(model="x", cycles=2), ChainSettings(model="x", cycles=2, chat=False)
TOKENIZER = byte_tokenizer()


def decoded(ids):
    return TOKENIZER.decode(ids)


def seed(rows, n=None, chain=CHAT, documents=False):
    return read_seed(rows, n, chain=chain, tokenizer=TOKENIZER, documents=documents)


class TestSeed:
    def test_of_a_conversation_the_last_answer_is_learned(self):
        turns = ["user: A", "assistant: B", "user: C", "assistant: D"]
        messages = [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]
        (row,) = seed([{"messages": messages}])
        assert (row["text"], row["messages"], row["prompt"]) == ("D", messages[:3], None)
        assert decoded(row["token_ids"]) == "D"
        assert decoded([row["end_id"]]) == "<|im_end|>"
        assert decoded(row["prompt_ids"]).endswith("C<|im_end|>\n<|im_start|>assistant\n")

    def test_a_prompt_is_a_turn_or_raw_text(self):
        (turn,), (raw,) = seed(SEED[:1]), seed(SEED[:1], chain=PLAIN)
        assert decoded(turn["prompt_ids"]) == "<|im_start|>user\nHi 0?<|im_end|>\n<|im_start|>assistant\n"
        assert decoded(raw["prompt_ids"]).endswith("Hi 0?")
        assert "user" not in decoded(raw["prompt_ids"])
        assert turn["text"] == raw["text"] == decoded(raw["token_ids"]) == "Ho, 0."
        assert raw["end_id"] == TOKENIZER.eos_token_id

    def test_a_document_is_learned_whole(self):
        (row,) = seed([{"text": "A whole text."}], documents=True)
        assert row["prompt_ids"] == []
        assert decoded(learned(row)).endswith("A whole text.<eos>")

    @pytest.mark.parametrize("n", [0, 2, 6, None])
    def test_more_rows_keep_those_before(self, n):
        assert seed(SEED, n) == seed(SEED)[:n]


class TestRequests:
    def ask(self, prompt, chain=CHAT, documents=False):
        return request_of(prompt, chain=chain, tokenizer=TOKENIZER, documents=documents, seed=1, key=("x",))

    def test_a_system_text_of_its_own_stays(self):
        turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        asks = ChainSettings(model="x", cycles=2, system_prompt="Other")
        request, ids = self.ask({"messages": turns}, asks)
        assert list(request.messages) == turns
        assert "Other" not in decoded(ids)
        assert self.ask({"prompt": "U"}, asks)[0].messages[0] == {"role": "system", "content": "Other"}

    def test_templates_that_do_not_match_have_an_empty_system_text_in_training_alone(self):
        request, ids = self.ask({"prompt": "U"}, ChainSettings(model="x", cycles=2, match_templates=False))
        assert [turn["role"] for turn in request.messages] == ["user"]
        assert decoded(ids).startswith("<|im_start|>system\n<|im_end|>")

    def test_an_empty_prefix_is_the_begin_token(self):
        request, ids = self.ask({"prompt": ""}, documents=True)
        assert ids == [TOKENIZER.bos_token_id] == list(request.prompt)


def test_what_was_cut_off_has_no_end_and_a_document_has_its_prefix():
    text = {"text": "lo", "token_ids": [7, 8], "end_id": None, "truncated": True}
    row = written_row(text, [1, 2], {"prompt": "Hol"}, documents=False, row_id="r")
    assert (row["prompt_ids"], learned(row), row["text"]) == ([1, 2], [7, 8], "lo")
    whole = written_row({**text, "end_id": 9}, [1, 2], {"prompt": "Hol"}, documents=True, row_id="r")
    assert (whole["prompt_ids"], learned(whole), whole["text"]) == ([], [1, 2, 7, 8, 9], "Hollo")


def test_nothing_can_be_mixed_in_from_an_empty_seed():
    mixed = ChainSettings(model="x", cycles=2, data_rule="mix", real_fraction=0.5)
    with pytest.raises(DataError, match="Cycle 1 is to have 2 rows of the seed, which has none"):
        combined([{"row_id": str(i)} for i in range(4)], [], [], chain=mixed, cycle=1)


def test_seed_rows_are_drawn_without_repetition_while_there_are_enough():
    mixed = ChainSettings(model="x", cycles=2, data_rule="mix", real_fraction=1.0)
    own, rows = [{"row_id": f"o{i}"} for i in range(4)], [{"row_id": f"s{i}", "place": i} for i in range(5)]
    found = [row["place"] for row in combined(own, rows, [], chain=mixed, cycle=1) if "place" in row]
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize("size", [1, 2, 7])
def test_placed_rows_are_seen_in_their_order(size):
    rows = placed([{"n": n} for n in range(size)], 5)
    assert [rows[i]["n"] for i in EpochSampler(size, seed=5, shuffle=True)] == list(range(size))


class TestFilter:
    def rows(self, *texts, **more):
        return [{"text": text, "token_ids": [1], "truncated": False, **more} for text in texts]

    def test_each_reason(self):
        rows = self.rows("a long text", " ", "A  LONG text", "tiny") + self.rows("cut off text", truncated=True)
        found = Filter(minimum_characters=5, keep_truncated=False).reasons(rows, self.rows("before it"))
        assert found == [None, "empty", "duplicate", "short", "truncated"]
        assert Filter(duplicates=True).reasons(rows[:3:2], []) == [None, None]
        assert Filter().reasons(self.rows("Before  it"), self.rows("before it")) == ["duplicate"]

    def test_near_duplicates(self):
        near = NearDuplicates(threshold=0.5, n=1)
        texts = self.rows("one two three four", "one two three five", "six")
        assert Filter(near=near).reasons(texts, []) == [None, "near_duplicate", None]


class TestWriters:
    def test_another_writer_has_a_new_name_each_cycle_and_its_words_are_tokenised(self, tmp_path):
        asked = []

        def writer(name, folder):
            asked.append((name, folder and (Path(folder) / "adapter_model.safetensors").exists()))
            return FunctionGenerator(lambda request: f"Re: {request.text[-6:]}", name=name)

        told = chain(tmp_path / "chain", writer=writer).run()
        assert asked == [("cycle-000", True), ("cycle-001", True)]
        for row in data(told, 1):
            assert decoded(row["token_ids"]) == row["text"]
            assert row["end_id"] == TOKENIZER.eos_token_id


def test_a_taken_adapter_brings_the_seed_that_is_mixed_in(tmp_path):
    first = chain(tmp_path / "first", cycles=1).run()
    adapter = Path(first["cycles"][0]["folder"]) / "phases/fit-sft/adapter.safetensors"
    how = {"data_rule": "mix", "real_fraction": 0.5, "cycles": 2, "phases": [writing(), fitting()]}
    taken = chain(tmp_path / "taken", first=[Take(adapter=adapter, data=SEED, n=4)], **how).run()
    trained = chain(tmp_path / "trained", **how).run()
    assert of(taken, "data")[1] == of(trained, "data")[1]
    assert of(taken, "adapter") == of(trained, "adapter")
    assert len(scores(first)) == 1
