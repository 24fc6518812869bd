"""Who rewrites in an audit: what each of them is told, in types, and the rewriter that is made of it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.errors import RecipeError

if TYPE_CHECKING:
    from lightning_interp.rate import Prices, RewriteRun
    from lightning_interp.rate.rewriting.templates import Kind


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A finished store; asks nobody."""

    store: str
    whose: str = ""
    passes: int = 2


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules that set the attribute, and others that are applied whichever way it goes."""

    data: str
    toggle: str
    always: list[str] = field(default_factory=list)
    store: str = ""
    passes: int = 2

    def rewriter(self, source: str, seed: int) -> Any:
        """The rewriter."""
        from lightning_interp.rate import RuleRewriter

        from ._named import named_rule, named_toggle

        return RuleRewriter(named_toggle(self.toggle), always=[named_rule(rule) for rule in self.always])


@dataclass(frozen=True, kw_only=True)
class Local:
    """A language model of this machine."""

    data: str
    template: str
    model: str = ""
    kind: Kind = "text"
    temperature: float = 0.7
    max_calls: int | None = None
    store: str = ""
    draws: int = 1
    passes: int = 2

    def rewriter(self, source: str, seed: int) -> Any:
        """The rewriter."""
        from lightning_interp.rate import LocalRewriter

        from ._named import named_template

        template = named_template(self.template, self.kind)
        return LocalRewriter(source, template, temperature=self.temperature, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A language model that answers over the network, and may cost money."""

    data: str
    template: str
    model: str
    kind: Kind = "text"
    temperature: float = 0.7
    base_url: str = ""
    requests_per_minute: float | None = None
    max_calls: int | None = None
    max_cost: float | None = None
    price_read: float | None = None
    price_written: float | None = None
    store: str = ""
    draws: int = 1
    passes: int = 2

    def __post_init__(self) -> None:
        if (self.price_read is None) != (self.price_written is None) or (self.max_cost and self.price_read is None):
            raise RecipeError(
                f"max_cost={self.max_cost}, price_read={self.price_read}, price_written={self.price_written}: expected "
                "both prices, for a million tokens each."
            )

    @property
    def prices(self) -> Prices | None:
        """What tokens cost, if that is known."""
        from lightning_interp.rate import Prices

        if self.price_read is None or self.price_written is None:
            return None
        return Prices(self.price_read, self.price_written)

    def rewriter(self, source: str, seed: int) -> Any:
        """The rewriter."""
        from lightning_interp.rate import OpenAICompatibleRewriter

        from ._named import named_template

        return OpenAICompatibleRewriter(
            self.model, named_template(self.template, self.kind), base_url=self.base_url or None,
            temperature=self.temperature, seed=seed, requests_per_minute=self.requests_per_minute,
        )  # fmt: skip


Told = Replay | Rules | Local | Endpoint
REWRITERS: dict[str, type[Told]] = {"rules": Rules, "replay": Replay, "local": Local, "endpoint": Endpoint}


def rewriter_settings(recipe: Any, defaults: dict[str, Any]) -> Told | None:
    """What the recipe's fields tell the rewriter that it names; a field that it has no use for is refused.

    Args:
        recipe: Has ``rewriter``, and the fields of all rewriters.
        defaults: Values of fields that say nothing.

    Returns:
        The settings; None if nobody rewrites.

    Raises:
        RecipeError: If a field would be ignored, one that is needed is missing, or the prices are half known.
    """
    own = REWRITERS.get(recipe.rewriter)
    users: dict[str, list[str]] = {}
    for name, kind in REWRITERS.items():
        for entry in fields(kind):
            users.setdefault(entry.name, []).append(name)
    for name, by in users.items():
        value = getattr(recipe, name)
        if name != "data" and recipe.rewriter not in by and value != defaults[name]:
            raise RecipeError(
                f"{name}={value!r} has no use with rewriter={recipe.rewriter!r}: it is for {' and '.join(by)}. Leave "
                "it out, or choose the rewriter."
            )
    if own is None:
        return None
    needed = [entry.name for entry in fields(own) if entry.default is MISSING and entry.default_factory is MISSING]
    lacking = [name for name in needed if getattr(recipe, name) == defaults[name]]
    if lacking and not (recipe.smoke and lacking == ["model"]):
        wanted = ", ".join(f"--{name}=..." for name in lacking)
        raise RecipeError(f"rewriter={recipe.rewriter!r} needs {wanted}; see --help.")
    return own(**{entry.name: getattr(recipe, entry.name) for entry in fields(own)})


def first_plan(folder: Path, job: RewriteRun) -> tuple[str, int]:
    """What was planned, and how many texts of this writer there were, before the first was asked for.

    It is kept in the phase's folder, so that a run that was killed and goes on says the same as one that was not.
    """
    path = folder / "plan.json"
    if not path.exists():
        atomic_write_json(path, {"plan": str(job.plan()), "there": written(job)})
    found = read_json(path, own=True)
    return str(found["plan"]), int(found["there"])


def written(job: RewriteRun) -> int:
    """How many texts of a writer are in its store."""
    return sum(record.by == job.by for record in job.store.records(job.attr))
