"""Labellers, rules, templates and scorers by name, as a command line gives them."""

from __future__ import annotations

import os
import pickle  # for its error alone
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.errors import DataError, InterpError, RecipeError
from lightning_interp.generation.labellers import Contains, Labeller, LongerThan, StartsWithVowel, vader_labeller
from lightning_interp.models.scoring.text_scorer import Scorer, TextScorer
from lightning_interp.rate.rewriting.rules import Drop, MarkToggle, OpenerToggle, RepairTranspositions, Rule, Toggle
from lightning_interp.rate.rewriting.templates import Kind, RewriteTemplate, rewrite_template
from lightning_interp.rate.scoring.scores import CallableScorer, as_scorer, vader_scorer
from lightning_interp.rate.texts.words import fluency_scorer, word_counts

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def named_labeller(name: str, texts: Sequence[str] = ()) -> Labeller:
    """A labeller by its name.

    Args:
        name: ``vowel``; ``length`` or ``words`` (longer than the median of the texts) or ``length:200``;
            ``contains:REGULAR EXPRESSION``; ``vader`` or ``vader:0.3``, the least sentiment.
        texts: The originals, for the median.

    Returns:
        The labeller.

    Raises:
        RecipeError: If there is no such labeller, or its argument is no number.
        DataError: If a median is asked for and there are no texts.

    Example:
        >>> named_labeller("contains:!+")(["Oh!", "Oh"], ["", ""]), named_labeller("length", ["a", "abc"])
        ([1, 0], LongerThan(limit=2.0, unit='characters'))
    """
    kind, given, rest = name.partition(":")
    if kind in ("length", "words"):
        unit: Any = "characters" if kind == "length" else "words"
        return LongerThan(_number(name, rest), unit) if given else LongerThan.median(texts, unit)
    if kind == "contains" and rest:
        return Contains(rest)
    if kind == "vader":
        return vader_labeller(_number(name, rest) if given else 0.0)
    if name == "vowel":
        return StartsWithVowel()
    raise RecipeError(
        f"There is no labeller {name!r}; expected vowel, length, length:200, words, words:40, contains:PATTERN, vader "
        "or vader:0.3."
    )


def named_toggle(name: str) -> Toggle:
    """What sets an attribute by rule, by its name.

    Args:
        name: ``mark:!!!`` (ends with the mark, or has none) or ``opener:ZERO|ONE`` (opens with either phrase; one may
            be empty).

    Returns:
        The toggle.

    Raises:
        RecipeError: If there is no such toggle.

    Example:
        >>> named_toggle("opener:Well,|Also,")("It rains.", 1)
        'Also, It rains.'
    """
    kind, _, rest = name.partition(":")
    if kind == "mark" and rest:
        return MarkToggle(rest)
    if kind == "opener" and rest.count("|") == 1:
        return OpenerToggle(*(phrase.strip() for phrase in rest.split("|")))
    raise RecipeError(f"There is no toggle {name!r}; expected mark:!!! or opener:Well,|Also, (for 0 and for 1).")


def named_rule(name: str) -> Rule:
    """A rule that a rewrite follows whichever way the attribute goes, by its name.

    Args:
        name: ``mentions``, ``links``, ``markup``, ``typos`` (swapped letters are put back) or ``phrase:WORDS`` (are
            left out).

    Returns:
        The rule.

    Raises:
        RecipeError: If there is no such rule, or ``typos`` lacks its words (package ``textblob``).

    Example:
        >>> named_rule("phrase:really")("I really do.")
        'I do.'
    """
    kind, _, rest = name.partition(":")
    plain: dict[str, Callable[[], Rule]] = {
        "mentions": Drop.mentions,
        "links": Drop.links,
        "markup": Drop.markup,
        "typos": lambda: RepairTranspositions(word_counts()),
    }
    if name in plain:
        return plain[name]()
    if kind == "phrase" and rest.strip():
        return Drop.phrase(rest.strip())
    raise RecipeError(f"There is no rule {name!r}; expected {', '.join(plain)} or phrase:WORDS.")


def named_template(name: str, kind: Kind = "text") -> RewriteTemplate:
    """How a language model is asked, by the attribute's name or from a file.

    Args:
        name: An attribute of ``ATTRIBUTES``, or a JSON file with ``name``,
            ``version``, ``body``, ``phrases`` and, if the attribute is the length, ``changes_length``.
        kind: What is rewritten; see :func:`~lightning_interp.rate.rewriting.templates.rewrite_template`.

    Returns:
        The template.

    Raises:
        RecipeError: If there is no such attribute, or the file's template cannot be used.
        DataError: If the file cannot be read.

    Example:
        >>> named_template("length").changes_length
        True
    """
    if not name.endswith(".json"):
        return rewrite_template(name, kind)
    try:
        return RewriteTemplate(**parse_json(Path(name).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{name} holds no template: {error}. Give a JSON object with name, version, body and phrases."
        ) from error


def named_scorer(name: str, *, imports: Sequence[str] = (), **settings: Any) -> Scorer:
    """A reward by its name.

    Args:
        name: ``vader``; ``fluency``; ``module:function``, a function of prompts and texts; a checkpoint (``.ckpt``) of
            :class:`~lightning_interp.models.RewardModel`; or a folder or Hugging Face id of a reward model.
        imports: Modules that functions may come from: a name in a file that somebody sent imports nothing else.
        **settings: Of :meth:`~lightning_interp.models.TextScorer.load`, for a folder or id; None says nothing.

    Returns:
        The scorer.

    Raises:
        RecipeError: If a package is missing, a function may not be imported or is none, or settings are given for what
            has none.
        DataError: If a checkpoint does not exist.
        IncompatibleModelError: If the source is a language model without a score head.

    Example:
        >>> import tempfile
        >>> from lightning_interp.models.scoring.score_head import scoring_model
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> folder = tempfile.mkdtemp()
        >>> scoring_model(tiny_model("llama"), seed=0).save_pretrained(folder)
        >>> _ = byte_tokenizer().save_pretrained(folder)
        >>> named_scorer(folder, max_length=16).scores([""], ["A fine film of this year"]).truncated.tolist()
        [True]
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    function = _FUNCTION.fullmatch(name) if not name.startswith("tiny:") else None
    what = "a checkpoint" if name.endswith(".ckpt") else "a function" if function else "no model"
    if not (function or name.endswith(".ckpt") or name in ("vader", "fluency")):
        return TextScorer.load(name, **settings)
    if given := {key: value for key, value in settings.items() if (key, value) != ("dtype", "float32")}:
        raise RecipeError(
            f"{name!r} is {what} and keeps its own settings, but "
            f"{', '.join(f'{key}={value!r}' for key, value in given.items())} was given. Leave them out."
        )
    if function:
        return CallableScorer(_function(name, function[1], function[2], imports), name=name)
    if name in ("vader", "fluency"):
        return vader_scorer() if name == "vader" else fluency_scorer()
    if not Path(name).is_file():
        raise DataError(f"There is no checkpoint {name!r}. Give the path of a .ckpt file.")
    from lightning_interp.models.training.reward_model import RewardModel

    try:
        return as_scorer(RewardModel.load_from_checkpoint(name, map_location="cpu", weights_only=True))
    except InterpError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{name!r} is no checkpoint of a RewardModel, or holds more than numbers ({reason:.200}). Save it with "
            "Lightning's ModelCheckpoint."
        ) from error


def _function(name: str, module: str, function: str, imports: Sequence[str]) -> Callable[..., Any]:
    if not any(f"{module}.".startswith(f"{one}.") for one in imports):
        raise RecipeError(
            f"{name!r} names a function, and its module is not imported unasked. If you trust that code, name it on "
            f"the command line: --import={module}; in Python, recipe.imports = ({module!r},)."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where it may lie: the command of an installed package has it not
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever a user's module raises
        raise RecipeError(
            f"There is no function {name!r} ({error}). Give module:function, of a module that lies here or can be "
            "imported."
        ) from error
    if not callable(found):
        raise RecipeError(f"{name!r} is a {type(found).__name__}: expected a function of prompts and texts.")
    return found  # type: ignore[no-any-return]


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise RecipeError(f"{name!r}: {value!r} is no number.") from error
