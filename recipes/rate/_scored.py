"""Settings of recipes that name a reward: how a reward model reads texts, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lightning_interp.models.scoring.text_scorer import Scorer


@dataclass(kw_only=True)
class ScoredBy:
    """The fields; a run folder holds them only where they say something, as those did that were begun without them."""

    functions: ClassVar[tuple[str, ...]] = ("reward", "scorer")
    said_before: ClassVar[tuple[str, ...]] = ()

    dtype: str = "float32"
    """Type of a reward model's weights."""
    max_length: int | None = None
    """Most tokens of a text for a reward model; its own limit by default."""
    reward_chat: bool | None = None
    """Whether a reward model's texts are written by its chat template; by default what its folder tells."""
    reward_eos: bool | None = None
    """Whether a reward model's plain texts end with the end token; by default what its trainer left."""
    reward_pair: bool | None = None
    """Whether a reward model (an encoder) reads prompt and text as two segments; by default what its folder tells."""
    reward_system: str | None = None
    """System text for a reward model; by default what its chat template has."""
    reward_output: str = ""
    """Of a reward model with several outputs: index or name of one, or weights, such as helpful=1,verbose=-0.2."""
    reward_device: str = ""
    """Where a reward model runs, such as cuda; by default where the Trainer puts it."""
    reward_batch: int | None = None
    """Most texts that a reward model reads at once; with 1 a reward in bfloat16 depends on nothing but its text."""

    def config(self) -> dict[str, Any]:
        """The recipe's fields, without those of a reward model that are left open."""
        found: dict[str, Any] = super().config()  # type: ignore[misc]  # a recipe's
        own = {one.name: one.default for one in fields(ScoredBy) if one.name not in self.said_before}
        return {name: value for name, value in found.items() if name not in own or value != own[name]}

    def scorer_of(self, name: str) -> Scorer:
        """The reward of a name; see :func:`named_scorer`."""
        from ._named import named_scorer

        settings = {
            "dtype": self.dtype, "max_length": self.max_length, "chat": self.reward_chat, "add_eos": self.reward_eos,
            "pair": self.reward_pair, "system_prompt": self.reward_system, "label": output_of(self.reward_output),
            "device": self.reward_device or None, "batch_size": self.reward_batch,
        }  # fmt: skip
        return named_scorer(name, imports=getattr(self, "imports", ()), **settings)


def output_of(given: str) -> Any:
    """Index, name or weights of outputs, from a command line.

    Example:
        >>> output_of("2"), output_of("good"), output_of("good=1, long=-0.5"), output_of("")
        (2, 'good', {'good': 1.0, 'long': -0.5}, None)
    """
    from lightning_interp.errors import RecipeError

    if "=" in given:
        pairs = [part.rpartition("=")[::2] for part in given.split(",")]
        try:
            return {name.strip(): float(weight) for name, weight in pairs}
        except ValueError as error:
            raise RecipeError(f"{given!r}: expected names with weights, such as helpful=1,verbose=-0.2.") from error
    return int(given) if given.isdecimal() else given or None


def read_rows(scorer: Scorer, units: list[Any]) -> list[dict[str, str]]:
    """How the scorer reads the first of some units, for the plan and the report; none where that is plain."""
    return scorer.reading(units[0].prompt, units[0].text) if units else []


def told(rows: list[dict[str, str]]) -> str:
    """The same for a terminal."""
    because = [f" ({row['because']})" if row["because"] else "" for row in rows]
    return "\n".join(f"reward, {row['of']}: {row['is']}{why}" for row, why in zip(rows, because, strict=True))
