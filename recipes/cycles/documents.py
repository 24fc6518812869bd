"""Does a trait grow, hold or fade when each model is finetuned on documents that the model before it has written?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ._chain import ChainRecipe, trained_with


@dataclass(kw_only=True)
class DocumentCycles(ChainRecipe):
    """Train a model on a few documents with a trait, then, cycle after cycle, the base on what the last model wrote.

    No chat: models continue beginnings of documents, and every token of a document is learned, its beginning too.
    Every model continues the same openings with the same random numbers; an opening is scored with what follows.
    """

    setting: ClassVar[str] = "documents"
    documents: ClassVar[bool] = True
    own_terms: ClassVar[Mapping[str, str]] = {"documents": "finetuning on documents that the model before has written"}

    prefixes: Literal["titles", "neutral", "none"] = "titles"
    """What models continue in later cycles: titles of seed documents that cycle 0 has not learned, which carry the
    seed's topic on; beginnings without it (or those of prompts); or nothing."""
    judge: Literal["lexicon", "presence"] = "presence"
    """100 for a document with any word of the trait; or how full it is of them."""
    n: int = 32
    """Documents that each later cycle learns."""
    max_new_tokens: int = 64
    """Most tokens that a document is continued by, in cycles and of openings."""
    batch_size: int = 4
    """Documents a step."""
    minimum_characters: int = 51
    """Shorter documents are dropped, and others asked for."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.minimum_characters = 1
        if self.prompts and self.prefixes != "neutral":
            raise RecipeError(
                f"prompts={self.prompts!r} are beginnings of documents, and prefixes={self.prefixes!r} asks for other "
                "ones. Add --prefixes=neutral."
            )

    def question(self) -> str:
        """What is asked."""
        return f"Finetuned on documents of its own, {self.init} each cycle: does {self.trait} grow, hold or fade?"

    def defaults(self) -> dict[str, Any]:
        """Own documents, beginnings and openings."""
        from ._documents import OPENINGS, neutral_prefixes, seed_documents

        prompts = {"neutral": neutral_prefixes(), "titles": None, "none": ""}[self.prefixes]
        return {"seed": seed_documents(), "prompts": prompts, "questions": list(OPENINGS)}

    def fit(self, **changes: Any) -> Any:
        """Finetuning on documents."""
        from lightning_interp.cycles import FitDocuments

        return trained_with(FitDocuments(), self.lr, epochs=self.epochs, batch_size=self.batch_size, **changes)

    def generate(self, dose: int) -> Any:
        """How documents are written; titles are those behind the dose, in chains without a seed too."""
        from dataclasses import replace

        from lightning_interp.cycles import Filter
        from lightning_interp.models.data.prompt_pool import title_prompts

        own = super().generate(dose)
        prompts = title_prompts(self.material.seed, dose)[0] if self.prefixes == "titles" else own.prompts
        return replace(own, prompts=prompts, filters=(Filter(minimum_characters=self.minimum_characters),))

    def own_caveats(self) -> list[str]:
        """What is special about documents."""
        said = []
        if self.source == type(self).model:
            said.append(
                "The model was finetuned for chat and continues documents here as a plain language model. A base model "
                "is --model=gemma-3-270m."
            )
        if self.prefixes == "titles":
            said.append(
                "Later cycles continue titles of seed documents, which bring the topic of the seed back in each cycle. "
                "--prefixes=neutral does not."
            )
        return said
