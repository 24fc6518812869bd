"""How a reward model's texts were written when it was trained: found out, shown, asked for where nobody can know."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.scoring.reward_text import RewardEncoder, length_limit
from lightning_interp.models.scoring.score_head import DecoderWithScore, label_index

__all__ = ["NOTHING_LEFT", "Left", "Marks", "Reading", "reading_of", "settle_text", "trainer_marks"]

Reading = dict[str, str]
"""A row of how texts are read: ``of`` what, what it ``is``, and ``because`` of what."""

_TRL = re.compile(r"^- TRL: v?(\d+)\.(\d+)", re.MULTILINE)
_FIRST_END = (0, 24)  # since then RewardTrainer puts the end token behind plain texts
_SHOWN = 200  # characters of each end of an example
_MOST = 1 << 20  # bytes of a file that are looked at
_PAIR_LABELS = {"entailment", "contradiction", "not_entailment", "not_equivalent", "not_duplicate", "duplicate"}


class Marks(NamedTuple):
    """What a folder's trainer left there.

    Attributes:
        trainer: Its name; empty if nobody can tell.
        end: Whether it put the end token behind plain texts; None if that is not known.
        pair: Whether texts were two segments; None if that is not known.
    """

    trainer: str = ""
    end: bool | None = None
    pair: bool | None = None


class Left(NamedTuple):
    """What lies beside a model about its texts: settings that our own export wrote, and marks of another trainer."""

    text: Mapping[str, Any] = MappingProxyType({})
    marks: Marks = Marks()


NOTHING_LEFT = Left()


def trainer_marks(beside: Callable[[str], Path | None], config: Mapping[str, Any]) -> Marks:
    """Read what was left: TRL's model card and arguments, sentence-transformers' card and configuration, labels.

    ``beside`` gives the path of a file of the model, or None. Nothing is unpickled.
    """
    card, arguments = _read(beside("README.md")).decode("utf-8", "replace"), _arguments(beside("training_args.bin"))
    if b"trl.trainer.reward_config" in arguments:
        return Marks("TRL", end=b"eos_token" in arguments)
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    tags = set(re.findall(r"^- ([\w-]+)\s*$", head, re.MULTILINE))
    if "reward-trainer" in tags:
        version = _TRL.search(card)
        return Marks("TRL", end=None if version is None else (int(version[1]), int(version[2])) >= _FIRST_END)
    if "sentence_transformers" in config or "cross-encoder" in tags:
        return Marks("sentence-transformers", pair=True)
    named = config.get("id2label")
    labels = {str(name).lower() for name in named.values()} if isinstance(named, Mapping) else set[str]()
    return Marks("training on pairs, by its labels", pair=True) if labels & _PAIR_LABELS else Marks()


def _read(path: Path | None) -> bytes:
    try:
        with open(path or "", "rb") as file:
            return file.read(_MOST)
    except OSError:
        return b""


def _arguments(path: Path | None) -> bytes:
    """The pickle inside a file of ``torch.save``, as bytes."""
    try:
        with zipfile.ZipFile(path or "") as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                return file.read(_MOST)
    except (OSError, StopIteration, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return b""


def settle_text(
    given: Mapping[str, Any],
    left: Left,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    fresh: bool,
    named: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settle how texts are written: as given, else as the model's folder says, else by what fits the model.

    Returns the settings, and for each why it is so. A source that is ``named``, and not a model in memory, is asked
    about where two ways of writing are possible; a model in memory is taken to have no end token then.
    """
    saved, marks = left
    text = {name: saved.get(name) if value is None else value for name, value in given.items()}
    known = [name for name, value in text.items() if value is not None]
    why = {name: "given" if given[name] is not None else "the folder says so" for name in known}

    def settle(name: str, value: Any, reason: str) -> None:
        if text[name] is None:
            text[name], why[name] = value, reason

    decoder = isinstance(model, DecoderWithScore)
    if tokenizer is not None:
        if saved:  # by whoever wrote the file before pairs were known
            settle("pair", False, "the folder says so")
        if text["pair"] and text["chat"] is None:
            settle("chat", False, "texts are pairs")
        if named and text["chat"] is None and tokenizer.chat_template and marks.trainer == "TRL":
            raise _two_ways(marks.trainer, "a chat by its template", "plain text with the end token", "chat")
        template = bool(tokenizer.chat_template)
        settle("chat", template, "the tokenizer has a chat template" if template else "there is no chat template")
        _settle_pair(settle, tokenizer, decoder or bool(text["chat"]), marks)
        _settle_end(settle, tokenizer, text, fresh, marks, named)
        # TRL's trainer sets the one by the other; an adapter's folder does not hold the configuration.
        pad = tokenizer.pad_token_id if marks.trainer == "TRL" else getattr(model.config, "pad_token_id", None)
        if named and not fresh and not saved and decoder and pad is not None and pad == tokenizer.eos_token_id:
            settle("ends_before", pad, "it also pads")
        if text["add_eos"] and not fresh and not saved and marks.trainer == "TRL" and _ends_texts(tokenizer):
            settle("eos_in_text", True, marks.trainer)
        settle("max_length", length_limit(model, tokenizer), "the limit of model and tokenizer")
    label = label_index(model, text["label"])
    return {**text, "label": label}, why


Settle = Callable[[str, Any, str], None]


def _settle_pair(settle: Settle, tokenizer: PreTrainedTokenizerBase, one: bool, marks: Marks) -> None:
    if one:
        settle("pair", False, "texts are one segment")
    elif marks.pair is not None:
        settle("pair", marks.pair, marks.trainer)
    elif tokenizer("a", "b").input_ids == tokenizer("ab").input_ids:
        settle("pair", False, "the tokenizer puts nothing between two segments")


def _settle_end(
    settle: Settle,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, Any],
    fresh: bool,
    marks: Marks,
    named: bool,
) -> None:
    end = tokenizer.eos_token_id
    ends = marks.trainer != "TRL" and _ends_texts(tokenizer)  # TRL puts its own into the text before that
    if fresh:
        settle("add_eos", end is not None, "the score head is fresh")
    elif text["chat"] or end is None or ends:
        settle("add_eos", False, "the chat template ends texts" if text["chat"] else "the tokenizer ends texts")
    elif marks.end is not None:
        settle("add_eos", marks.end, marks.trainer)
    elif named and text["add_eos"] is None:
        raise _two_ways(marks.trainer or "its trainer", "with the end token", "without it", "add_eos")
    else:
        settle("add_eos", False, "assumed")


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a token behind texts, as those of encoders do."""
    return {*tokenizer("a").input_ids[-1:]} <= {*tokenizer.all_special_ids}


def _two_ways(trainer: str, one: str, other: str, setting: str) -> IncompatibleModelError:
    more = f"{setting}=True or {setting}=False"
    if setting == "chat":
        more = "chat=True, or chat=False with add_eos=True"
    return IncompatibleModelError(
        f"Nothing says how {trainer} wrote the texts of this reward model: {one}, or {other}; its scores differ. Look "
        f"at its training, and say so: {more}."
    )


def reading_of(encoder: RewardEncoder, label: Any, why: Mapping[str, str], prompt: Any, text: str) -> list[Reading]:
    """How one text is read: the settings with their reasons, and the tokens that the model gets."""
    (read,) = encoder.encode_texts([prompt], [text])
    end = f"yes, {encoder.tokenizer.eos_token}" if encoder.add_eos else "none is added"
    end += ", and behind it what the tokenizer puts there" if encoder.eos_in_text else ""
    way = "one text, the answer behind the prompt" if encoder.pair is False else "one text alone, without a prompt"
    ways = {"chat": "a chat by the tokenizer's template", "pair": "two segments, prompt and answer"}
    system = "as the template has it" if encoder.system_prompt is None else repr(encoder.system_prompt)
    kind, before = "chat" if encoder.chat else "pair", encoder.ends_before
    rows = [
        ("texts", ways[kind] if encoder.chat or encoder.pair else way, kind),
        *([("system text", system, "system_prompt")] if encoder.chat else [("end token", end, "add_eos")]),
        ("reward", f"output {label}", "label"),
        ("most tokens", encoder.max_length or "no limit", "max_length"),
        *([("read before", encoder.tokenizer.decode([before]), "ends_before")] if before is not None else []),
        ("an example, as it is read", _shortened(encoder.tokenizer.decode(read.ids)), ""),
        (f"its {len(read.ids)} token ids", _shortened(" ".join(map(str, read.ids))), ""),
    ]
    return [{"of": name, "is": str(value), "because": why.get(by, "")} for name, value, by in rows]


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}"
