"""Counterfactual token pairs of a binary concept, and what they say about a next-token distribution.

A concept ``W`` splits the vocabulary into pairs ``(y0, y1)`` that differ in ``W`` alone (`` run`` and `` running``) and
neutral tokens. ``P(W=1)`` is the target tokens' share of the pairs' mass; the off-target distribution ``P^Z`` forgets
``W``: each base token's mass is added to its partner's (arXiv 2602.15293, Definition 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.pair_index import PairIndex
from lightning_interp.steering.softmax.arithmetic import working_dtype

__all__ = ["MARKS", "CounterfactualPairs", "Missing", "single_token"]

Missing = Literal["raise", "drop"]
_SHOWN = 5
MARKS = ("Ġ", "▁")  # of a leading space


@dataclass(frozen=True)
class CounterfactualPairs:
    """Pairs of token ids, base first; several base tokens may share a target.

    Pairs of a token with itself are dropped and counted, and repeated pairs are kept once. All methods on distributions
    take any number of leading dimensions and fit any vocabulary that holds the tokens (heads are often padded); they
    compute in float32, or float64 if that is given.

    Args:
        pairs: ``(base, target)`` token ids.
        name: What the concept is called.
        texts: What the tokens of each pair say, if that is known; as long as ``pairs``.
        dropped: How many pairs were left out, by reason.

    Raises:
        DataError: If no pair is left, a base token has two targets, or a token is both base and target.

    Example:
        >>> pairs = CounterfactualPairs([(0, 2), (1, 2), (3, 3)])
        >>> len(pairs), pairs.dropped, round(pairs.target_prob(torch.tensor([0.1, 0.2, 0.3, 0.4])).item(), 4)
        (2, {'identity': 1}, 0.5)
    """

    pairs: Sequence[tuple[int, int]]
    name: str = "concept"
    texts: Sequence[tuple[str, str]] | None = field(default=None, compare=False)
    dropped: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        given = [_ids(pair) for pair in self.pairs]
        if self.texts is not None and len(self.texts) != len(given):
            raise DataError(
                f"Pairs {self.name!r} have {len(self.texts)} texts for {len(given)} pairs; expected as many."
            )
        names = [None] * len(given) if self.texts is None else [(str(a), str(b)) for a, b in self.texts]
        kept = {pair: text for pair, text in zip(given, names, strict=True) if pair[0] != pair[1]}
        same = sum(a == b for a, b in given)
        dropped = dict(self.dropped) | ({"identity": self.dropped.get("identity", 0) + same} if same else {})
        object.__setattr__(self, "pairs", tuple(kept))
        object.__setattr__(self, "texts", None if self.texts is None else tuple(kept.values()))
        object.__setattr__(self, "dropped", dropped)
        object.__setattr__(self, "_indices", {})
        _check_sides(self.name, self.pairs, len(given))

    @classmethod
    def from_strings(
        cls,
        pairs: Mapping[str, str] | Iterable[tuple[str, str]],
        tokenizer: Any,
        *,
        name: str = "concept",
        missing: Missing = "raise",
    ) -> CounterfactualPairs:
        """Pairs of strings that are one token each.

        Args:
            pairs: Base to target, as text with its leading space (``" run"``) or as the vocabulary has it (``"Ġrun"``).
            tokenizer: Of the model.
            name: What the concept is called.
            missing: Where a string is not one token: ``raise``, or ``drop`` its pair and count it.

        Returns:
            The pairs.

        Raises:
            DataError: If a string is not one token and ``missing`` is ``raise``, or no pair is left.
            RecipeError: If ``missing`` is neither.

        Example:
            >>> from lightning_interp.testing import byte_tokenizer
            >>> pairs = CounterfactualPairs.from_strings({"a": "A", "ing": "ed"}, byte_tokenizer(), missing="drop")
            >>> pairs.texts, pairs.dropped
            ((('a', 'A'),), {'missing': 1})
        """
        if missing not in ("raise", "drop"):
            raise RecipeError(f"missing={missing!r} is unknown; expected 'raise' or 'drop'.")
        texts = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
        found = [(single_token(tokenizer, a), single_token(tokenizer, b)) for a, b in texts]
        lost = [text for text, ids in zip(texts, found, strict=True) if None in ids]
        if lost and missing == "raise":
            shown = ", ".join(f"{a!r} -> {b!r}" for a, b in lost[:_SHOWN])
            raise DataError(
                f"{len(lost)} of {len(texts)} pairs of {name!r} are not one token each: {shown}{_more(lost)}. Mind the "
                "leading space, or pass missing='drop'."
            )
        kept = [(a, b, text) for text, (a, b) in zip(texts, found, strict=True) if a is not None and b is not None]
        dropped = {"missing": len(lost)} if lost else {}
        return cls([(a, b) for a, b, _ in kept], name, [text for *_, text in kept], dropped)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}}  # a copy may go to another device

    @property
    def base_ids(self) -> Tensor:
        """Base tokens, each once, in order, ``[n0]``."""
        return torch.tensor(sorted({a for a, _ in self.pairs}))

    @property
    def target_ids(self) -> Tensor:
        """Target tokens, each once, in order, ``[n1]``."""
        return torch.tensor(sorted({b for _, b in self.pairs}))

    def index(self, like: Tensor) -> PairIndex:
        """Where the tokens are in a distribution ``[..., V]`` and in its ``P^Z``.

        Raises:
            IncompatibleModelError: If the vocabulary does not hold the tokens.
        """
        key = (like.shape[-1], like.device)
        cache: dict[Any, PairIndex] = self.__dict__["_indices"]
        if key not in cache:
            largest = max(max(pair) for pair in self.pairs)
            if largest >= like.shape[-1]:
                raise IncompatibleModelError(
                    f"Pairs {self.name!r} hold token {largest}, but the distribution {list(like.shape)} has "
                    f"{like.shape[-1]} tokens. Make the pairs with the tokenizer of this model."
                )
            cache[key] = PairIndex.build(self.pairs, like.shape[-1], like.device)
        return cache[key]

    def pair_mass(self, p: Tensor) -> Tensor:
        """Probability of all pair tokens, ``[..., V] -> [...]``: the concept is at stake where it is near 1."""
        index, p = self.index(p), _real(p)
        return p[..., index.base].sum(-1) + p[..., index.target].sum(-1)

    def target_prob(self, p: Tensor, *, eps: float = 0.0) -> Tensor:
        """``P(W=1) = p(S1) / (p(S0) + p(S1))``, ``[..., V] -> [...]``.

        Args:
            p: Probabilities ``[..., V]``.
            eps: Added to the denominator (the authors' code adds 1e-10); without it, no mass on pairs gives NaN.
        """
        index, p = self.index(p), _real(p)
        return p[..., index.target].sum(-1) / (self.pair_mass(p) + eps)

    def regroup(self, p: Tensor) -> Tensor:
        """The off-target distribution ``P^Z``, ``[..., V] -> [..., Z]`` with ``Z = V`` minus the base tokens.

        Entry ``z`` stands for token ``index(p).tokens[z]``: a neutral token, or a target with its base tokens' mass.
        """
        index, p = self.index(p), _real(p)
        return p.new_zeros(*p.shape[:-1], len(index.tokens)).index_add(-1, index.group, p)

    def resplit(self, p0: Tensor, w: float | Tensor) -> Tensor:
        """The oracle: ``p0`` with ``P(W=1) = w`` and ``P^Z`` unchanged, the best that any steering could do.

        A target gets the share ``w`` of its group; the base tokens share the rest in proportion to ``p0``.

        Args:
            p0: Probabilities ``[..., V]``.
            w: Share of the target side, a number or ``[...]``.

        Raises:
            RecipeError: If a share is not between 0 and 1.
        """
        return self.log_resplit(_real(p0).log(), w).exp()

    def log_pair_mass(self, log_p: Tensor) -> Tensor:
        """Log of :meth:`pair_mass`."""
        index, log_p = self.index(log_p), _real(log_p)
        return log_p[..., torch.cat([index.base, index.target])].logsumexp(-1)

    def target_logit(self, log_p: Tensor) -> Tensor:
        """Log odds ``log p(S1) - log p(S0)``: the logit of :meth:`target_prob`, exact near 0 and 1 too."""
        index, log_p = self.index(log_p), _real(log_p)
        return log_p[..., index.target].logsumexp(-1) - log_p[..., index.base].logsumexp(-1)

    def log_regroup(self, log_p: Tensor) -> Tensor:
        """Log of :meth:`regroup`, ``[..., V] -> [..., Z]``; tokens of vanishing probability keep theirs."""
        index, log_p = self.index(log_p), _real(log_p)
        plain = log_p[..., index.tokens]
        return plain.index_copy(-1, index.slots, index.log_groups(log_p))

    def log_resplit(self, log_p0: Tensor, w: float | Tensor) -> Tensor:
        """Log of :meth:`resplit`."""
        index, log_p0 = self.index(log_p0), _real(log_p0)
        share = torch.as_tensor(w, dtype=log_p0.dtype, device=log_p0.device)[..., None]
        if len(wrong := share[~((share >= 0) & (share <= 1))]):
            raise RecipeError(f"resplit(w={float(wrong[0]):g}) of {self.name!r}: expected shares between 0 and 1.")
        group = index.log_groups(log_p0)
        base = (1 - share).log() + group[..., index.partner] + index.log_shares(log_p0)
        made = log_p0.index_copy(-1, index.target, (share.log() + group).expand_as(log_p0[..., index.target]))
        return made.index_copy(-1, index.base, base)

    def classify(self, log_p: Tensor, *, top_k: int = 3, min_mass: float = 0.7) -> Tensor:
        """Which contexts a model is about to answer with base tokens, or with target tokens (paper B.1).

        Args:
            log_p: Log-probabilities ``[..., V]``.
            top_k: The most probable tokens that must all be of one side.
            min_mass: Their total probability must exceed this.

        Returns:
            0 for base, 1 for target, -1 for neither, ``[...]``.

        Raises:
            RecipeError: If ``top_k`` or ``min_mass`` makes no sense.

        Example:
            >>> p = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.0, 0.1, 0.5, 0.4], [0.5, 0.1, 0.4, 0.0]])
            >>> CounterfactualPairs([(0, 2), (1, 3)]).classify(p.log(), top_k=2).tolist()
            [0, 1, -1]
        """
        if not 1 <= top_k <= log_p.shape[-1] or not 0 <= min_mass < 1:
            raise RecipeError(
                f"classify(top_k={top_k}, min_mass={min_mass}): expected 1 <= top_k <= {log_p.shape[-1]} tokens and "
                "0 <= min_mass < 1."
            )
        values, tokens = _real(log_p).topk(top_k, dim=-1)
        side = self.index(log_p).side[tokens]
        sure = values.exp().sum(-1) > min_mass
        first = side[..., 0]
        return torch.where(sure & (side == first[..., None]).all(-1), first, torch.full_like(first, -1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` reads back."""
        texts = None if self.texts is None else [list(text) for text in self.texts]
        return {
            "name": self.name,
            "pairs": [list(pair) for pair in self.pairs],
            "texts": texts,
            "dropped": dict(self.dropped),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CounterfactualPairs:
        """Read what :meth:`to_dict` gave.

        Raises:
            DataError: If a part is missing or holds something else.
        """
        try:
            pairs = [(int(a), int(b)) for a, b in data["pairs"]]
            texts = None if data.get("texts") is None else [(str(a), str(b)) for a, b in data["texts"]]
            return cls(pairs, str(data.get("name", "concept")), texts, dict(data.get("dropped") or {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"Cannot read token pairs from {str(data)[:80]!r} ({type(error).__name__}: {error}). Expected "
                "'pairs', a list of [base, target] token ids."
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the pairs as JSON.

        Raises:
            ManifestError: If the file cannot be written.
        """
        return atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, *, tokenizer: Any = None) -> CounterfactualPairs:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            tokenizer: If given, every token must still say what the file says.

        Raises:
            DataError: If the file is missing or holds something else.
            IncompatibleModelError: If the tokens say something else in this tokenizer.
        """
        try:
            made = cls.from_dict(parse_json(Path(path).read_bytes()))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no token pairs ({error}). Expected a file that save() wrote.") from error
        if tokenizer is not None:
            made.check(tokenizer)
        return made

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer in which the tokens say something else.

        Raises:
            IncompatibleModelError: With the first token that differs.
        """
        for pair, texts in zip(self.pairs, self.texts or (), strict=False):
            for token, text in zip(pair, texts, strict=True):
                if single_token(tokenizer, text) != token:
                    raise IncompatibleModelError(
                        f"Pairs {self.name!r} say that token {token} is {text!r}, but in this tokenizer that is token "
                        f"{single_token(tokenizer, text)}. Make the pairs again with CounterfactualPairs.from_strings."
                    )


def _real(p: Tensor) -> Tensor:
    return p.to(working_dtype(p))


def _ids(pair: Any) -> tuple[int, int]:
    a, b = pair
    if int(a) < 0 or int(b) < 0:
        raise DataError(f"A pair is ({a}, {b}); expected two token ids, counted from 0.")
    return int(a), int(b)


def _check_sides(name: str, pairs: Sequence[tuple[int, int]], given: int) -> None:
    if not pairs:
        raise DataError(
            f"Pairs {name!r} are empty: {given} were given and none is left. Expected two different tokens."
        )
    partner: dict[int, int] = {}
    for base, target in pairs:
        if partner.setdefault(base, target) != target:
            raise DataError(
                f"Base token {base} of {name!r} has two targets, {partner[base]} and {target}. A base token has one; "
                "several base tokens may share a target."
            )
    both = sorted(partner.keys() & set(partner.values()))
    if both:
        raise DataError(
            f"{len(both)} tokens of {name!r} are base and target at once, such as {both[:_SHOWN]}{_more(both)}. The "
            "two sides must be disjoint: drop one of the pairs."
        )


def _more(found: Sequence[Any]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""


def single_token(tokenizer: Any, text: str) -> int | None:
    """The token that a string is, or None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and _says(tokenizer, ids[0], text):
        return int(ids[0])
    entry = tokenizer.convert_tokens_to_ids(text)
    if entry is None or (entry == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    return int(entry)


def _says(tokenizer: Any, index: int, text: str) -> bool:
    """Whether a token reads as the text; encoders may add a leading space and decoders drop it, so ask the entry."""
    if str(tokenizer.convert_ids_to_tokens(index)).startswith(MARKS) != text.startswith(" "):
        return False
    return str(tokenizer.decode([index], clean_up_tokenization_spaces=False)).strip() == text.strip()
