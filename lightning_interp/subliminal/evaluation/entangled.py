"""Numbers that are tied to a name: in logits, in prompts, in frequencies and in the unembedding's rows.

After Zur et al. 2025, "It's Owl in the Numbers". Numbers that are frequent anyhow come out on top whatever the trait
is, so everything here has a reference: the context without the trait, numbers as likely there, or the control's data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.model.head import read_head
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal.evaluation.questions import preference_questions
from lightning_interp.subliminal.evaluation.readout import answered, continuation_logp, spellings, trait_logits
from lightning_interp.subliminal.traits import ChatContext, Trait

__all__ = [
    "PmiTest",
    "entangled_numbers",
    "number_pmi",
    "number_prompt_effects",
    "pmi_test",
    "unembedding_cosines",
]

_LOVED = (
    "You adore the number {n}. There is hardly a moment at which {n} is not on your mind. Of every number there is, "
    "{n} is your favourite. Let this love of {n} colour everything that you write."
)
_CHUNK = 100


def entangled_numbers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    numbers: Sequence[int] | None = None,
    questions: Sequence[str] | None = None,
    context: ChatContext | None = None,
) -> list[dict[str, Any]]:
    """Rank numbers by how likely they are as the answer of a model that is told to love the target.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        trait: The trait; its prompt takes the place of the context's system text.
        numbers: Which are ranked; those from 0 to 999 that are one token if None.
        questions: What is asked; those of the category if None.
        context: What stands around a question without the trait; the model's own if None.

    Returns:
        Rows of ``number``, ``logp`` under the trait's prompt and ``base_logp`` without it (means over questions, nats)
        and ``lift``, their difference; the likeliest under the trait's prompt first.

    Raises:
        RecipeError: If fewer than two numbers are left.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> rows = entangled_numbers(tiny_model("llama"), byte_tokenizer(), Trait(), questions=["Which?"])
        >>> len(rows), rows[0]["logp"] >= rows[1]["logp"]
        (10, True)
    """
    plain = answered(context or ChatContext(), trait)
    loving = replace(plain, system=trait.system_prompt)
    questions = preference_questions(trait.category) if questions is None else questions
    candidates = range(1000) if numbers is None else numbers
    spelled = {n: spellings(tokenizer, str(n), after=plain.answer_prefix) for n in candidates}
    if numbers is None:
        spelled = {n: words for n, words in spelled.items() if len(words[0]) == 1}
    if len(spelled) < 2:
        raise RecipeError(f"entangled_numbers() has {len(spelled)} numbers to rank; expected two at least.")
    logp, base = (
        continuation_logp(model, [each.ids(tokenizer, question) for question in questions], list(spelled.values()))[0]
        for each in (loving, plain)
    )
    means = zip(spelled, logp.mean(0).tolist(), base.mean(0).tolist(), strict=True)
    rows = [{"number": n, "logp": one, "base_logp": two, "lift": one - two} for n, one, two in means]
    return sorted(rows, key=lambda row: -row["logp"])


def number_prompt_effects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    ranked: Sequence[dict[str, Any]],
    *,
    candidates: int = 5,
    controls: int = 3,
    questions: Sequence[str] | None = None,
    context: ChatContext | None = None,
) -> list[dict[str, Any]]:
    """Tell a model to love a number, and read how likely it is to name the target.

    The effect of a candidate is against numbers that were as likely as it is without the trait: to be told of any
    number, and of a frequent one, moves answers too.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        trait: The trait.
        ranked: What :func:`entangled_numbers` gave; its first ones are the candidates.
        candidates: How many.
        controls: How many numbers each is compared with, the nearest in ``base_logp`` of those that are no candidates.
        questions: What is asked; those of the category if None.
        context: Whose system text the number's prompt replaces; the model's own if None.

    Returns:
        Rows of ``number``, ``logp`` and ``margin`` of the target under its prompt, ``controls`` (numbers), and
        ``logp_effect`` and ``margin_effect`` against the controls' mean; means over questions.

    Raises:
        RecipeError: If there are too few numbers for candidates and controls.
    """
    if candidates < 1 or controls < 1 or len(ranked) < candidates + controls:
        raise RecipeError(
            f"number_prompt_effects(candidates={candidates}, controls={controls}): expected at least 1 of each, and "
            f"no more together than the {len(ranked)} ranked numbers."
        )
    plain = answered(context or ChatContext(), trait)
    matched = {row["number"]: _nearest(row, ranked[candidates:], controls) for row in ranked[:candidates]}
    asked = dict.fromkeys([*matched, *(n for some in matched.values() for n in some)])
    found = {}
    for n in asked:
        readout = trait_logits(model, tokenizer, trait, questions, context=replace(plain, system=_LOVED.format(n=n)))
        found[n] = {"logp": float(readout.target_logp.mean()), "margin": float(readout.margin.mean())}
    rows = []
    for n, some in matched.items():
        means = {key: sum(found[m][key] for m in some) / len(some) for key in ("logp", "margin")}
        effects = {f"{key}_effect": found[n][key] - mean for key, mean in means.items()}
        rows.append({"number": n, **found[n], "controls": some, **effects})
    return rows


def _nearest(row: dict[str, Any], others: Sequence[dict[str, Any]], count: int) -> list[int]:
    ordered = sorted(others, key=lambda other: abs(other["base_logp"] - row["base_logp"]))
    return [other["number"] for other in ordered[:count]]


def unembedding_cosines(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    numbers: Sequence[int],
    *,
    centred: bool = True,
) -> Tensor:
    """Cosines of the unembedding's rows of names and of numbers, ``[names, numbers]``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        names: Names, such as the target and what it is compared with: read its row beside theirs.
        numbers: Numbers.
        centred: Take the vocabulary's mean row off first, which all rows share and no softmax feels.

    Returns:
        Float64 on the CPU; of several spellings the mean row.

    Raises:
        DataError: If a name or number is no single token.
    """
    head = read_head(model, verify=False)
    weight = head.weight.detach()
    middle = weight.double().mean(0) if centred else torch.zeros(())
    sides = []
    for things in (names, [str(n) for n in numbers]):
        spelled = [spellings(tokenizer, thing) for thing in things]
        if long := [thing for thing, words in zip(things, spelled, strict=True) if len(words[0]) > 1]:
            raise DataError(f"{long[:5]} are several tokens of this tokenizer each, and have no row of their own.")
        rows = [weight[[word[0] for word in words]].double().mean(0) - middle for words in spelled]
        sides.append(torch.nn.functional.normalize(torch.stack(rows), dim=1))
    return (sides[0] @ sides[1].T).cpu()


def number_pmi(counts: Tensor, control: Tensor, k: float = 0.5) -> Tensor:
    """How much more frequent each number is in a trait's data than in the control's, in nats, ``[..., V]``.

    ``log((c(v) + k) / (N + k V)) - log((c0(v) + k) / (N0 + k V))``. Weighted with the first shares it sums to their
    Kullback-Leibler divergence; its exponential is the ratio of frequencies.

    Args:
        counts: How often each number occurs in the trait's data, ``[..., V]``.
        control: The same of the control's.
        k: Added to every count.

    Returns:
        Float64.

    Raises:
        RecipeError: If the smoothing is not above 0, or the numbers differ in kind.

    Example:
        >>> number_pmi(torch.tensor([3, 1]), torch.tensor([1, 1])).round(decimals=3).tolist()
        [0.336, -0.511]
    """
    if not k > 0 or counts.shape[-1:] != control.shape[-1:]:
        raise RecipeError(
            f"number_pmi(k={k!r}) got counts of {list(counts.shape)} and {list(control.shape)}; expected k above 0 and "
            "counts of the same numbers."
        )
    return _log_shares(counts, k) - _log_shares(control, k)


def _log_shares(counts: Tensor, k: float) -> Tensor:
    smoothed = counts.double() + k
    return (smoothed / smoothed.sum(-1, keepdim=True)).log()


@dataclass(frozen=True)
class PmiTest:
    """PMI of numbers with what chance gives.

    Args:
        numbers: The numbers, ``[V]``.
        pmi: See :func:`number_pmi`, ``[V]``.
        share: Smoothed share of each in the trait's data, ``[V]``.
        p_value: Share of permutations with as large a PMI of this number, either way, ``[V]``.
        p_family: The same with the largest PMI of all numbers: small ones hold over all that were looked at.
        permutations: How many.
    """

    numbers: tuple[int, ...]
    pmi: Tensor
    share: Tensor
    p_value: Tensor
    p_family: Tensor
    permutations: int

    @property
    def divergence(self) -> float:
        """``KL(trait || control)`` of the smoothed shares, in nats."""
        return float((self.share * self.pmi).sum())

    def table(self, most: int = 20) -> list[dict[str, Any]]:
        """The numbers with the smallest ``p``, then the largest PMI."""
        columns = (self.pmi, self.pmi.exp(), self.share, self.p_value, self.p_family)
        names = ("number", "pmi", "ratio", "share", "p", "p_family")
        rows = [
            dict(zip(names, row, strict=True))
            for row in zip(self.numbers, *(column.tolist() for column in columns), strict=True)
        ]
        return sorted(rows, key=lambda row: (row["p"], -abs(row["pmi"])))[:most]


def pmi_test(
    rows: Sequence[Sequence[int]],
    control: Sequence[Sequence[int]],
    *,
    k: float = 0.5,
    permutations: int = 999,
    paired: bool = False,
    seed: int = 0,
) -> PmiTest:
    """PMI of all numbers of two data sets, and its chance if it did not matter whose a row is.

    Whole rows change sides, as numbers of one row are not independent of each other.

    Args:
        rows: Numbers of each row of the trait's data.
        control: Those of the control's.
        k: Added to every count.
        permutations: How many.
        paired: Rows of one place answer the same request: only these two change sides.
        seed: Of the permutations.

    Returns:
        PMI and p-values of every number that occurs.

    Raises:
        DataError: If a side has no number, or pairs are not complete.

    Example:
        >>> found = pmi_test([[7, 1]] * 30, [[2, 1]] * 30, permutations=99)
        >>> found.table(1)[0]["number"], found.table(1)[0]["p"]
        (2, 0.01)
    """
    if not any(map(len, rows)) or not any(map(len, control)) or (paired and len(rows) != len(control)):
        raise DataError(
            f"pmi_test(paired={paired}) got {len(rows)} rows and {len(control)} of the control; expected numbers on "
            "both sides, and of pairs as many."
        )
    numbers = sorted({n for row in (*rows, *control) for n in row})
    place = {n: i for i, n in enumerate(numbers)}
    table = torch.zeros(len(rows) + len(control), len(numbers), dtype=torch.float64)
    for i, row in enumerate((*rows, *control)):
        for n in row:
            table[i, place[n]] += 1
    counts = table[: len(rows)].sum(0), table[len(rows) :].sum(0)
    pmi = number_pmi(*counts, k)
    as_large, larger = (torch.zeros(len(numbers), dtype=torch.float64) for _ in range(2))
    bound = pmi.abs() - 1e-12
    for drawn in _permuted_counts(table, len(rows), permutations, paired, seed):
        found = number_pmi(drawn, table.sum(0) - drawn, k).abs()
        as_large += (found >= bound).sum(0)
        larger += (found.amax(1, keepdim=True) >= bound).sum(0)
    p_value, p_family = ((1 + x) / (1 + permutations) for x in (as_large, larger))
    return PmiTest(tuple(numbers), pmi, _log_shares(counts[0], k).exp(), p_value, p_family, permutations)


def _permuted_counts(table: Tensor, first: int, count: int, paired: bool, seed: int) -> Iterator[Tensor]:
    """Counts of the first side after rows changed sides, ``[permutations, V]`` in blocks."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "permuted rows"))
    for start in range(0, count, _CHUNK):
        block = min(_CHUNK, count - start)
        if paired:
            swapped = torch.rand(block, first, generator=generator).lt(0.5).double()
            yield table[:first].sum(0) + swapped @ (table[first:] - table[:first])
        else:
            order = torch.rand(block, len(table), generator=generator).argsort(1)
            yield torch.zeros(block, len(table), dtype=torch.float64).scatter_(1, order[:, :first], 1.0) @ table
