"""Every kind of reward model scores as transformers' own forward does, or is refused with what to do about it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from reward_folders import (
    DECODERS,
    ENCODERS,
    OUTPUTS,
    PROMPTS,
    TEXTS,
    leave_arguments,
    leave_card,
    model_of,
    saved,
    theirs,
    tokenizer_of,
    with_adapter,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer

from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models import PreferenceDataModule, RewardModel, load_reward_model
from lightning_interp.models.scoring.score_head import label_index
from lightning_interp.models.scoring.text_scorer import TextScorer
from lightning_interp.rate import as_scorer
from lightning_interp.testing import tiny_model

THIN = [("llama", "weights"), ("bert", "one"), ("distilbert", "named weights")]
FULL = [pair for pair in itertools.product((*DECODERS, *ENCODERS), OUTPUTS) if pair not in THIN]
CASES = [*THIN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in FULL)]


JOINED = [(prompt + text,) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
ENDED = [(f"{text}<eos>",) for (text,) in JOINED]  # as TRL writes them


def close(found, expected, **tolerance):
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(found.float(), expected.float(), **{"rtol": 1e-6, "atol": 1e-6, **tolerance})


def ends(kind):
    """What settles how plain texts of a stranger's decoder end."""
    return {"add_eos": False} if kind in DECODERS else {}


class TestMatrix:
    @pytest.mark.parametrize(("kind", "output"), CASES)
    def test_of_transformers(self, tmp_path, kind, output):
        labels, label, take = OUTPUTS[output]
        folder = saved(tmp_path / "rm", kind, labels=labels)
        alone = TextScorer.load(folder, label=label, batch_size=1, **ends(kind))
        close(alone.score([""] * 5, TEXTS), take(theirs(folder, [(text,) for text in TEXTS])))
        model, tokenizer = alone.model, alone.encoder.tokenizer
        joined = TextScorer(model, tokenizer, label=label, pair=False)
        # Decoders score padded batches, encoders those of one length: padding moves their scores by rounding.
        expected = take(theirs(folder, JOINED, together=kind in DECODERS))
        close(joined.score(PROMPTS, TEXTS), expected)
        pairs = TextScorer(model, tokenizer, label=label, pair=True, batch_size=1)
        expected = take(theirs(folder, list(zip(PROMPTS, TEXTS, strict=True))))
        close(pairs.score(PROMPTS, TEXTS), expected)
        if kind in ENCODERS:
            assert not torch.allclose(joined.score(PROMPTS, TEXTS), expected, atol=1e-4)
            with pytest.raises(IncompatibleModelError, match=r"Say so: pair=True \(two segments\), or pair=False"):
                alone.score(PROMPTS, TEXTS)

    @pytest.mark.parametrize("kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ENCODERS[1:])])
    def test_of_transformers_in_bfloat16(self, tmp_path, kind):
        folder = saved(tmp_path / "rm", kind)
        scorer = TextScorer.load(folder, pair=True, dtype="bfloat16")
        expected = theirs(folder, list(zip(PROMPTS, TEXTS, strict=True)), dtype=torch.bfloat16)[:, 0]
        close(scorer.score(PROMPTS, TEXTS), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("kind", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
    def test_in_bfloat16_one_text_at_a_time_depends_on_nothing_else(self, tmp_path, kind):
        folder = saved(tmp_path / "rm", kind)
        scorer = TextScorer.load(folder, add_eos=False, batch_size=1, dtype="bfloat16")
        alone = torch.cat([scorer.score([prompt], [text]) for prompt, text in zip(PROMPTS, TEXTS, strict=True)])
        assert torch.equal(scorer.score(PROMPTS, TEXTS), alone)
        sizes = []
        scorer.model.register_forward_pre_hook(
            lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True
        )
        scorer.score(PROMPTS, TEXTS)
        assert sizes == [1] * 5

    @pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in DECODERS[1:])])
    def test_of_transformers_with_a_chat_template(self, tmp_path, kind):
        folder = saved(tmp_path / "rm", kind, chat=True)
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for prompt, text in zip(PROMPTS, TEXTS, strict=True)
        ]
        written = tokenizer_of(kind).apply_chat_template(turns, tokenize=False)
        close(
            as_scorer(folder).score(PROMPTS, TEXTS), theirs(folder, [(text,) for text in written], together=True)[:, 0]
        )

    @pytest.mark.parametrize(
        ("kind", "output"),
        [
            ("llama", "weights"),
            *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(("gpt2", "opt"), OUTPUTS)),
            pytest.param("bert", "one", marks=pytest.mark.slow),
            *(pytest.param(kind, "index", marks=pytest.mark.slow) for kind in ENCODERS),
        ],
    )
    def test_of_peft(self, tmp_path, kind, output):
        labels, label, take = OUTPUTS[output]
        label = {"kind": 1}.get(label, label) if isinstance(label, str) else label
        if isinstance(label, dict):
            label = [0.0, 1.0, -0.25]
        folder, base, wrapped = with_adapter(tmp_path / "adapter", kind, labels=labels)
        scorer = TextScorer.load(folder, label=label, **(ends(kind) or {"pair": True}))
        rows = JOINED if kind in DECODERS else list(zip(PROMPTS, TEXTS, strict=True))
        close(scorer.score(PROMPTS, TEXTS), take(theirs(base, rows, wrapped, together=kind in DECODERS)))

    @pytest.mark.parametrize(
        "kind", ["gpt2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "opt"))]
    )
    @pytest.mark.parametrize("left", ["card", "arguments"])
    def test_of_trl_on_plain_text(self, tmp_path, monkeypatch, kind, left):
        folder = saved(tmp_path / "rm", kind)
        leave_card(folder) if left == "card" else leave_arguments(folder, monkeypatch, eos_token=None)
        expected = theirs(folder, ENDED, together=True)[:, 0]
        for scorer in (as_scorer(folder), RewardModel(str(folder)).scorer):
            close(scorer.score(PROMPTS, TEXTS), expected)
            assert scorer.encoder.add_eos
        in_memory = load_reward_model(folder)
        close(TextScorer(in_memory.model, in_memory.tokenizer).score(PROMPTS, TEXTS), expected)


class TestWhatWasLeft:
    def test_an_adapter_of_trl(self, tmp_path):
        folder, base, wrapped = with_adapter(tmp_path / "adapter", "llama")
        leave_card(folder)
        close(as_scorer(folder).score(PROMPTS, TEXTS), theirs(base, ENDED, wrapped, together=True)[:, 0])

    @pytest.mark.parametrize(
        ("version", "end"), [("0.24.0", True), ("v1.0.0.dev0", True), ("0.23.1", False), ("0.9.6", False)]
    )
    def test_the_end_token_came_with_a_version(self, tmp_path, version, end):
        folder = saved(tmp_path / "rm", "llama")
        leave_card(folder, version)
        assert as_scorer(folder).encoder.add_eos is end
        if version == "0.24.0":
            assert as_scorer(folder, add_eos=False).encoder.add_eos is False

    def test_arguments_of_another_version_or_trainer(self, tmp_path, monkeypatch):
        folder = saved(tmp_path / "rm", "llama")
        leave_arguments(folder, monkeypatch)  # without eos_token, as before
        assert as_scorer(folder).encoder.add_eos is False
        for data in (b"", b"no zip", b"PK\x05\x06" + bytes(18)):
            (folder / "training_args.bin").write_bytes(data)
            with pytest.raises(IncompatibleModelError, match="add_eos=True or add_eos=False"):
                as_scorer(folder)

    def test_a_checkpoint_finds_the_card_of_its_run(self, tmp_path):
        folder = saved(tmp_path / "checkpoint-500", "llama")
        leave_card(tmp_path)
        assert as_scorer(folder).encoder.add_eos

    def test_a_chat_template_beside_trl_is_asked_about(self, tmp_path):
        folder = saved(tmp_path / "rm", "llama", chat=True)
        leave_card(folder)
        with pytest.raises(IncompatibleModelError, match=r"TRL wrote .* chat=True, or chat=False with add_eos=True"):
            as_scorer(folder)
        assert as_scorer(folder, chat=True).encoder.chat
        assert as_scorer(folder, chat=False).encoder.add_eos

    def test_plain_text_of_nobody_knows_whom_is_asked_about(self, tmp_path):
        folder = saved(tmp_path / "rm", "llama")
        for load in (as_scorer, lambda path: RewardModel(str(path))):
            with pytest.raises(IncompatibleModelError, match=r"say so: add_eos=True or add_eos=False"):
                load(folder)

    @pytest.mark.parametrize(
        "card",
        [b"\xff\xfe", b"---\ntags: reward-trainer\n", b"- reward-trainer\n", b"---\na: b\n---\n- reward-trainer\n"],
    )
    def test_a_card_of_something_else_says_nothing(self, tmp_path, card):
        folder = saved(tmp_path / "rm", "llama")
        (folder / "README.md").write_bytes(card)
        with pytest.raises(IncompatibleModelError, match="add_eos=True or add_eos=False"):
            as_scorer(folder)

    def test_a_card_that_is_a_folder_says_nothing(self, tmp_path):
        folder = saved(tmp_path / "rm", "llama")
        (folder / "README.md").mkdir()
        assert as_scorer(folder, add_eos=True).encoder.add_eos

    @pytest.mark.parametrize("mark", ["config", "card", "labels"])
    def test_pairs_that_say_so(self, tmp_path, mark):
        folder = saved(tmp_path / "rm", "bert")
        if mark == "card":
            (folder / "README.md").write_text("---\ntags:\n- sentence-transformers\n- cross-encoder\n---\nA model.")
        else:
            more = {
                "config": {"sentence_transformers": {"version": "5.0"}},
                "labels": {"id2label": {"0": "entailment"}},
            }
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | more[mark]))
        expected = theirs(folder, list(zip(PROMPTS, TEXTS, strict=True)))[:, 0]
        close(as_scorer(folder).score(PROMPTS, TEXTS), expected)

    def test_our_own_folders_say_all_of_it(self, tmp_path):
        module = RewardModel(model_of("bert"), tokenizer=tokenizer_of("bert"), pair=True)
        folder = module.export(tmp_path / "out")
        close(as_scorer(folder).score(PROMPTS, TEXTS), module.score(PROMPTS, TEXTS))
        again = RewardModel(str(folder))
        assert again.encoder.pair
        assert again.scorer.identity()["pair"]

    def test_a_folder_from_before_pairs_were_known(self, tmp_path):
        folder = RewardModel(model_of("bert"), tokenizer=tokenizer_of("bert"), pair=False).export(tmp_path / "out")
        written = json.loads((folder / "reward_text.json").read_text())
        assert "pair" not in written
        close(as_scorer(folder).score(PROMPTS, TEXTS), theirs(folder, JOINED)[:, 0])


class TestTokenizersThatEndTexts:
    """TRL writes the end token into plain texts since 0.24, and a tokenizer that ends texts puts another behind it."""

    def folder(self, path, kind="llama"):
        folder, tokenizer = saved(path / "rm", kind), tokenizer_of(kind, chat=False)
        if kind == "llama":
            ends = {"single": "<bos> $A <eos>", "pair": "$A $B:1 <eos>:1"}
            core = TemplateProcessing(**ends, special_tokens=[("<bos>", 1), ("<eos>", 2)])
            tokenizer.backend_tokenizer.post_processor = core
        elif kind == "bert":
            tokenizer.eos_token = "bad"  # noqa: S105 - another than what the tokenizer puts there
        tokenizer.save_pretrained(folder)
        return folder, AutoTokenizer.from_pretrained(folder)

    @pytest.mark.parametrize("kind", ["llama", "roberta", "bert"])
    @pytest.mark.parametrize("version", ["1.2.0", "0.23.1"])
    def test_they_are_read_as_they_were_trained(self, tmp_path, kind, version):
        folder, tokenizer = self.folder(tmp_path, kind)
        leave_card(folder, version)
        end = tokenizer.eos_token if version == "1.2.0" else ""
        space = "" if kind == "llama" else " "
        texts = [f"{prompt}{text}{space}{end}" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
        asked = {} if kind == "llama" else {"pair": False}
        scorer = as_scorer(folder, **asked)
        found = [list(row.ids) for row in scorer.encoder.encode_texts(PROMPTS, TEXTS)]
        assert found == tokenizer(texts).input_ids
        close(scorer.score(PROMPTS, TEXTS), theirs(folder, [(text,) for text in texts], together=kind == "llama")[:, 0])
        if kind == "bert":
            return
        told = {row["of"]: row["is"] for row in scorer.reading("a", "a")}["end token"]
        assert ("behind it what the tokenizer puts there" in told) is bool(end)
        again = RewardModel(str(folder), **asked).export(tmp_path / "out")
        assert [list(row.ids) for row in as_scorer(again).encoder.encode_texts(PROMPTS, TEXTS)] == found

    def test_a_cut_text_keeps_both_ends(self, tmp_path):
        folder, _ = self.folder(tmp_path)
        leave_card(folder)
        scorer = as_scorer(folder, max_length=6)
        ((ids, cut, _),) = scorer.encoder.encode_texts([""], ["fine words"])
        assert (len(ids), ids[0], ids[-2:], cut) == (6, 1, [2, 2], True)

    def test_of_a_version_that_nobody_knows(self, tmp_path):
        folder, _ = self.folder(tmp_path)
        leave_card(folder, "unknown")
        with pytest.raises(IncompatibleModelError, match=r"how TRL wrote .* add_eos=True or add_eos=False"):
            as_scorer(folder)

    def test_of_other_trainers_they_end_once(self, tmp_path):
        folder, tokenizer = self.folder(tmp_path)
        for given in ({}, {"add_eos": True}):
            (row,) = as_scorer(folder, **given).encoder.encode_texts([""], ["a"])
            assert row.ids == tokenizer("a").input_ids

    def test_a_setting_of_the_tokenizer_is_kept(self, tmp_path):
        folder = saved(tmp_path / "rm", "llama")
        letters = {letter: place for place, letter in enumerate(["<unk>", "<s>", "</s>", "▁", *"abc"])}
        LlamaTokenizer(vocab=letters, merges=[], add_eos_token=True).save_pretrained(folder)
        leave_card(folder)
        (row,) = as_scorer(folder).encoder.encode_texts([""], ["abc"])
        assert row.ids[-3:] == [6, 2, 2]


class TestWhatPads:
    """Where the end token also pads, transformers' classes read (and are trained) at the last token before it."""

    def folder(self, path, *, chat):
        model, tokenizer = model_of("llama"), tokenizer_of("llama", chat=chat)
        model.config.pad_token_id = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.eos_token
        if chat:
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    @pytest.mark.parametrize("way", ["trl", "chat", "given"])
    def test_it_is_read_as_it_was_trained(self, tmp_path, way):
        folder = self.folder(tmp_path / "rm", chat=way == "chat")
        if way == "trl":
            leave_card(folder)
        between = "<eos>" if way == "chat" else ""
        rows = [(f"{prompt}{between}{text}<eos>",) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
        given = {"add_eos": True} if way == "given" else {}
        module = RewardModel(str(folder), **given)
        for scorer in (as_scorer(folder, **given), module.scorer, as_scorer(module.export(tmp_path / "out"))):
            close(scorer.score(PROMPTS, TEXTS), theirs(folder, rows, together=True)[:, 0])
            assert {"of": "read before", "is": "<eos>"}.items() <= scorer.reading("a", "b")[-3].items()
            assert scorer.identity()["ends_before"] == 2

    def test_an_adapter_of_trl_has_the_padding_of_its_tokenizer(self, tmp_path):
        folder, _, wrapped = with_adapter(tmp_path / "adapter", "llama")
        leave_card(folder)
        tokenizer = tokenizer_of("llama", chat=False)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        wrapped.config.pad_token_id = 2  # as the trainer did before the first step
        close(as_scorer(folder).score(PROMPTS, TEXTS), theirs(folder, ENDED, wrapped, together=True)[:, 0])

    def test_a_fresh_head_is_trained_at_the_end(self, tmp_path):
        tokenizer = tokenizer_of("llama", chat=False)
        tokenizer.pad_token = tokenizer.eos_token
        module = RewardModel(tiny_model("llama", pad_token_id=2), tokenizer=tokenizer)
        loaded = as_scorer(module.export(tmp_path / "out"))
        close(loaded.score(PROMPTS, TEXTS), module.score(PROMPTS, TEXTS))
        assert loaded.encoder.encode_texts(["a"], ["b"])[0].ids[-1] == 2


class TestReading:
    def rows(self, scorer):
        return {row["of"]: (row["is"], row["because"]) for row in scorer.reading(PROMPTS[0], TEXTS[0])}

    def test_plain_text(self, tmp_path):
        folder = saved(tmp_path / "rm", "llama")
        leave_card(folder)
        found = self.rows(as_scorer(folder, max_length=50))
        assert found["texts"] == ("one text, the answer behind the prompt", "texts are one segment")
        assert found["end token"] == ("yes, <eos>", "TRL")
        assert found["most tokens"] == ("50", "given")
        assert found["an example, as it is read"][0] == "say morefine words<eos>"
        assert found["its 19 token ids"][0].endswith(" 2")

    def test_pairs_and_chats(self, tmp_path):
        found = self.rows(as_scorer(saved(tmp_path / "a", "bert"), pair=True))
        assert found["texts"] == ("two segments, prompt and answer", "given")
        assert found["an example, as it is read"][0] == "[CLS] say more [SEP] fine words [SEP]"
        found = self.rows(as_scorer(saved(tmp_path / "b", "llama", chat=True), system_prompt="be kind"))
        assert found["texts"] == ("a chat by the tokenizer's template", "the tokenizer has a chat template")
        assert found["system text"] == ("'be kind'", "given")

    def test_what_needs_none_has_none(self):
        assert as_scorer(lambda prompts, texts: [0.0] * len(texts), name="zero").reading("", "a") == []


class TestRefusals:
    def kind(self, folder, name, **more):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [name], **more}))

    @pytest.mark.parametrize(
        "name",
        [
            "LlamaForTokenClassification",
            "Qwen2ForProcessRewardModel",
            "BertForQuestionAnswering",
            "BertForMultipleChoice",
        ],
    )
    def test_what_scores_no_whole_text(self, tmp_path, name):
        folder = saved(tmp_path / "rm", "llama")
        self.kind(folder, name)
        with pytest.raises(IncompatibleModelError, match=rf"is a {name}, .*function of prompts and texts"):
            as_scorer(folder)

    @pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
    def test_adapters_that_score_tokens(self, tmp_path, task):
        folder, *_ = with_adapter(tmp_path / "adapter", "llama")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": task}))
        with pytest.raises(IncompatibleModelError, match=rf"scores tokens \({task}\).*function of prompts and texts"):
            as_scorer(folder)

    @pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModel"])
    def test_code_that_nobody_agreed_to(self, tmp_path, auto):
        folder, ran = saved(tmp_path / "rm", "llama"), tmp_path / "ran"
        (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
        self.kind(folder, "LlamaForRewardModelWithGating", auto_map={auto: "own.RM"})
        with pytest.raises(IncompatibleModelError, match=r"own\.RM.* pass trust_remote_code=True"):
            as_scorer(folder)
        self.kind(
            folder,
            "OwnForCausalLM",
            auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.LM"},
            model_type="own",
        )
        with pytest.raises(DataError, match=r"pass\s+trust_remote_code=True"):
            as_scorer(folder)
        assert not ran.exists()

    @pytest.mark.parametrize("gives", ["score", "logits", "several"])
    def test_code_that_was_agreed_to(self, tmp_path, gives, monkeypatch):
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        folder = saved(tmp_path / "rm", "gpt2", labels=3 if gives != "logits" else 1)
        (folder / f"own_{gives}.py").write_text(
            "from transformers import GPT2ForSequenceClassification\n"
            "class RewardRM(GPT2ForSequenceClassification):\n"
            "    def forward(self, input_ids=None, attention_mask=None):\n"
            "        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)\n"
            f"        if {gives == 'score'}:\n"
            "            output['score'] = output.logits.sum(1)\n"
            "        return output\n"
        )
        expected = theirs(folder, JOINED)
        self.kind(folder, "RewardRM", auto_map={"AutoModel": f"own_{gives}.RewardRM"})
        agreed = {"trust_remote_code": True, "pair": False, "add_eos": False}
        scorer = as_scorer(folder, **agreed)
        if gives == "several":
            with pytest.raises(IncompatibleModelError, match=r"no score of its own.*Choose with label="):
                scorer.score(PROMPTS, TEXTS)
            scorer, expected = as_scorer(folder, **agreed, label=[0, 1, 0]), expected[:, 1:2]
        close(scorer.score(PROMPTS, TEXTS), expected.sum(1))

    def test_weights_that_fit_no_outputs(self):
        model = model_of("bert", 3)
        for label in ([1.0, 2.0], [0, 0, 0], [1.0, float("nan"), 0.0], {"kind": float("inf")}):
            with pytest.raises(IncompatibleModelError, match="no finite number for each of them, or all 0"):
                label_index(model, label)
        for label in ({"nice": 1.0}, "nice", 3, True, -1):
            with pytest.raises(IncompatibleModelError, match="has no output label="):
                label_index(model, label)
        assert label_index(model, {"long": 2}) == [0.0, 0.0, 2.0]
        assert label_index(model, "2") == 2

    def test_settings_that_contradict_or_are_for_nothing(self, tmp_path):
        with pytest.raises(RecipeError, match="chat=True and pair=True"):
            TextScorer(model_of("llama"), tokenizer_of("llama"), chat=True, pair=True)
        with pytest.raises(RecipeError, match="batch_size=0"):
            TextScorer(model_of("llama"), tokenizer_of("llama"), batch_size=0)
        for scorer in (len, TextScorer(model_of("llama"), tokenizer_of("llama"))):
            with pytest.raises(RecipeError, match=r"as_scorer\(\) got device for a .* loaded here"):
                as_scorer(scorer, device="cpu")

    def test_no_text_is_longer_than_the_positions(self, tmp_path):
        """RoBERTa begins to count behind its padding token, so it takes fewer tokens than it has positions."""
        folder = saved(tmp_path / "rm", "roberta")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 10**30}))
        scorer = as_scorer(folder)
        found = scorer.scores([""], ["fine words " * 100])
        assert (scorer.encoder.max_length, found.truncated.tolist()) == (65, [True])

    def test_a_folder_is_loaded_as_asked(self, tmp_path):
        folder = saved(tmp_path / "rm", "bert")
        scorer = as_scorer(folder, dtype="bfloat16", device="cpu", name="mine")
        assert (next(scorer.model.parameters()).dtype, scorer.name) == (torch.bfloat16, "mine")


def test_pairs_are_trained_as_they_are_scored(tmp_path):
    """The batch of a training has the token types, so a step sees what a score does."""
    module = RewardModel(model_of("bert"), tokenizer=tokenizer_of("bert"), pair=True).eval()
    rows = [{"prompt": "say more", "chosen": "fine words", "rejected": "a"}]
    batch = next(iter(PreferenceDataModule(rows, encoder=module.encoder).train_dataloader()))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    with torch.no_grad():
        found = module(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    close(found, module.score(["say more"] * 2, ["fine words", "a"]))
