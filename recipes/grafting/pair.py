"""Bring your own two models and prompts: which weights, at which token, make the difference?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = (
    {"text": "Ann Lee stars alongside", "target": "Bo Hill", "spans": {"FE": "Ann Lee"}, "unit": "1"},
    {"text": "Cy Ray stars alongside", "target": "Di Fox", "spans": {"FE": "Cy Ray"}, "unit": "2"},
    {"text": "The film has Ed Orr and", "target": "Flo Nye", "spans": {"FE": "Ed Orr"}, "unit": "3"},
)


@dataclass(kw_only=True)
class GraftPair(Recipe):
    """Graft a finetuned model, or an adapter, into the model it came from, on prompts of your own.

    Prompts are a JSONL file with one object a line: ``text`` (stops before the answer), ``target`` (the answer),
    ``spans`` (named pieces of the text: ``FE`` the first entity; ``R`` and ``M`` for experiment E3), and if you like
    ``unit`` (the fact; intervals are over units) and ``form`` (the wording).
    """

    donor: str = ""
    """The finetuned model, or the folder of a PEFT adapter on `model`."""
    prompts: str = ""
    """JSONL file."""
    stream: bool = False
    """Leave the donor on disk and read its weights as they are used (a folder with safetensors)."""
    missing: Literal["raise", "drop"] = "raise"
    """What to do with a prompt whose span does not occur in it."""
    experiments: list[str] = field(default_factory=list)
    """Further experiments by number: E3, E4, E5, E7, E8."""
    direction: Literal["sft2pre", "pre2sft"] = "sft2pre"
    """Graft the donor into the model, or the model into the donor."""
    head: Literal["recipient", "donor", "follow"] = "recipient"
    """Whose unembedding makes the logits of a graft."""
    final_norm: Literal["recipient", "donor", "follow"] = "recipient"
    """The same for the norm before it."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the model with a quantised base."""
    quantized: Literal["refuse", "both", "mixed"] = "refuse"
    """What a full-weight donor means where weights are quantised."""
    complete: int = 0
    """Also write so many tokens after each prompt, greedily, and report exact matches."""
    decode: Literal["recipient", "donor", "like_last", "outside"] = "recipient"
    """Weights of these tokens."""

    def study(self, run: RunFolder) -> RecipeResult:
        """Read the prompts, graft, report."""
        scored = run.phase("graft", lambda folder: self.graft(run, folder))
        return self.result(run, scored)

    def graft(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Load both models and score every plan."""
        from lightning_interp import GraftEvaluator, load_causal_lm
        from lightning_interp.grafting.generate import complete
        from lightning_interp.running.results import write_scalars

        from ._common import evaluate
        from ._pair import read_prompts

        prompts = read_prompts(self.prompts_file(folder))
        loaded = load_causal_lm(self.source, quantization=self.quantization)
        donor = self.load_donor(folder, loaded)
        plans = {**self.plans(), **self.doses()}
        evaluator = GraftEvaluator(prompts, loaded.tokenizer, plans=plans, missing=self.missing)
        found = evaluate(run, evaluator, loaded.model, donor)
        written: list[dict[str, Any]] = []
        if self.complete:
            with run.progress("writing", total=len(evaluator)) as bar:
                written = complete(
                    evaluator, loaded.model, donor, max_new_tokens=self.complete, decode=self.decode,
                    advance=bar.advance,
                )  # fmt: skip
        chances = [found.estimate(name(dose), "target_prob") for dose in DOSES]
        write_scalars(run.path / "tensorboard" / "graft", "graft/dose/target_prob", [c.value for c in chances])
        curve = [{"dose": d, "probability": c.to_dict()} for d, c in zip(DOSES, chances, strict=True)]
        return {"result": asdict(found), "curve": curve, "written": written, "label": loaded.label}

    def load_donor(self, folder: Path, loaded: Any) -> Any:
        """The donor as a graft takes it; refuses another tokenizer."""
        from lightning_interp import load_causal_lm
        from lightning_interp.errors import RecipeError
        from lightning_interp.grafting import CheckpointDonor, ModelDonor
        from lightning_interp.models import check_same_tokenizer
        from lightning_interp.models.sources.adapters import attach_adapter_folder, is_adapter_folder
        from lightning_interp.models.sources.pretrained import LoadOptions, load_tokenizer_files

        source = self.donor or (str(self.example_donor(folder)) if self.smoke else "")
        if not source:
            raise RecipeError("grafting/pair needs --donor=...: a finetuned model, or an adapter folder.")
        if is_adapter_folder(Path(source)):
            attach_adapter_folder(loaded.model, Path(source))
            return "default"
        if self.stream:
            check_same_tokenizer(loaded.tokenizer, load_tokenizer_files(source, LoadOptions()))
            return CheckpointDonor(source)
        tuned = load_causal_lm(source, quantization=self.quantization if self.quantized == "both" else None)
        check_same_tokenizer(loaded.tokenizer, tuned.tokenizer)
        return ModelDonor(tuned.model, quantized=self.quantized)

    def prompts_file(self, folder: Path) -> Path:
        """The user's prompts; in a smoke run without any, a few of ours."""
        from lightning_interp.errors import RecipeError

        from ._common import write_jsonl

        if self.prompts:
            return Path(self.prompts)
        if not self.smoke:
            raise RecipeError("grafting/pair needs --prompts=FILE.jsonl with text, target and spans; see --help.")
        write_jsonl(folder, {"prompts": EXAMPLES})
        return folder / "prompts.jsonl"

    def example_donor(self, folder: Path) -> Path:
        """A tiny donor, for a smoke run without one."""
        from lightning_interp.models.sources.folders import atomic_folder
        from lightning_interp.models.sources.tiny import byte_tokenizer, tiny_pair

        with atomic_folder(folder / "donor", overwrite=True) as temporary:
            tiny_pair("llama")[1].save_pretrained(temporary)
            byte_tokenizer().save_pretrained(temporary)
        return folder / "donor"

    def plans(self) -> dict[str, Any]:
        """The standard plans and those of the experiments, in the chosen direction."""
        from lightning_interp import paper_plans
        from lightning_interp.errors import RecipeError
        from lightning_interp.grafting import EXPERIMENTS, reverse_plans

        plans = dict(paper_plans(head=self.head, final_norm=self.final_norm))
        for number in self.experiments:
            if number not in EXPERIMENTS or number == "E6":
                known = ", ".join(each for each in EXPERIMENTS if each != "E6")
                raise RecipeError(f"experiments: {number!r} cannot be run on a pair; expected some of {known}.")
            plans |= EXPERIMENTS[number]() if number not in ("E1", "E2", "E9") else {}
        return reverse_plans(plans) if self.direction == "pre2sft" else plans

    def reversed(self) -> dict[str, str]:
        """What the direction does to the meaning of the plans."""
        if self.direction == "sft2pre":
            return {}
        return {"direction": "pre2sft: all grafts but PRE and SFT are the other way round, plain weights in the donor"}

    def doses(self) -> dict[str, Any]:
        """FE+LT at doses from the recipient to the donor."""
        from lightning_interp import FromBatch, GraftPlan, Last

        return {name(dose): GraftPlan.at(FromBatch("FE") | Last(), dose=dose) for dose in DOSES}

    def result(self, run: RunFolder, scored: dict[str, Any]) -> RecipeResult:
        """Tables with intervals over units, and the curve over doses."""
        from lightning_interp.core.measure.statistics import counted
        from lightning_interp.grafting import GraftResult
        from lightning_interp.grafting.generate import exact_match

        from ._common import compact, dropped_rows, located_rows, metrics_of
        from ._explained import DOSE_CAPTION, PLANS_CAPTION, dropped_note, findings, terms
        from ._figures import dose_figure, plans_figure

        found = GraftResult(**scored["result"])
        units = len(found.values("PRE", "target_prob"))
        donor = (
            Path(self.donor).name if Path(self.donor).is_dir() and self.donor else self.donor or "a tiny random donor"
        )
        tables: dict[str, Any] = {
            "plans": [compact(found, plan) for plan in self.plans()],
            "plans_by_form": [row for form in found.forms() for row in found.summary(form=form)],
            "doses": [{"dose": row["dose"], **row["probability"]} for row in scored["curve"]],
            "prompts": found.rows,
            "located": located_rows(found),
            "dropped": dropped_rows(found),
        }
        exact = {plan: estimate.to_dict() for plan, estimate in exact_match(scored["written"]).items()}
        if scored["written"]:
            tables["completions"] = scored["written"]
            decoded = {row["plan"]: row["decode"] for row in scored["written"]}
            tables["exact"] = [{"plan": plan, "decode": decoded[plan], **estimate} for plan, estimate in exact.items()]
        return RecipeResult(
            metrics={"forms": metrics_of(found), "exact": exact, "dropped": len(found.dropped)},
            tables=tables,
            figures={"plans": plans_figure(found, title=scored["label"]), "doses": dose_figure(scored["curve"])},
            question="Which weights of the finetuned model, used at which token, make its answers?",
            findings=findings(found) if self.direction == "sft2pre" else findings(found)[:1],
            captions={"plans": PLANS_CAPTION, "doses": DOSE_CAPTION},
            terms=terms(found.plans, **self.reversed())
            | {"facts": "units of the prompts: all prompts of a unit count once"},
            caveats=[
                f"One pair of models: {donor} in {scored['label']}. Another may differ.",
                f"{counted(len(found.rows) // len(found.plans), 'prompt')} of {counted(units, 'unit')}; intervals "
                "are over units.",
                f"Grafts use the {self.head}'s unembedding and the {self.final_norm}'s final norm.",
                *dropped_note(found),
                "The target is the first token of the answer. Top-5 flatters: read it beside the probability.",
            ],
        )


def name(dose: float) -> str:
    """Plan name of a dose."""
    return f"FE+LT dose {dose:g}"
