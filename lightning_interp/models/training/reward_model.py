"""The LightningModule that trains a reward model, on preferences or on ratings, and scores texts with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.models.scoring.input_contract import settle_text
from lightning_interp.models.scoring.reward_sources import LoadedReward, complete_folder, in_memory, load_reward_model
from lightning_interp.models.scoring.reward_text import ANY_TEXT, RewardEncoder, RewardText
from lightning_interp.models.scoring.score_head import DecoderWithScore, needs_score_head, scoring_model
from lightning_interp.models.scoring.text_scorer import ScoresTexts, TextScorer, read_scores
from lightning_interp.models.sources.pretrained import Quantization
from lightning_interp.models.training.finetuning import FINETUNING, SETTINGS, Finetuned, base_source
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.optimisation import Optimisation, no_more, plain, settings_of
from lightning_interp.models.training.reward_metric import PairScores, PointScores, log_scores, pair_losses

__all__ = ["RewardModel"]


class RewardModel(ScoresTexts, Finetuned):
    """Trains a model that scores texts, and scores texts with it.

    Batches come from :class:`PreferenceDataModule`. On pairs the loss is that of Bradley and Terry (with a margin
    where the data has one), on rated texts the squared error. A decoder is read at its last real token. With an
    adapter, its weights and the score head are trained, saved and restored; the rest is as in :class:`CausalLM`.

    Logs ``train/loss``, ``train/accuracy`` (pairs), ``val/loss``, ``val/accuracy`` and ``val/pairs``, their number
    (``val/texts`` for ratings); ``test/...`` likewise. Every pair weighs the same, across batches and processes.

    Args:
        model: A source for :func:`load_reward_model`, or a loaded model, which is changed in place. A language model
            gets a fresh score head.
        tokenizer: Writes the texts; taken from the source if that is a name.
        text: How texts are written and which output is the reward: settings, or some of them as a dict.
        lora: Put in an adapter and train it: settings, or the same as a dict.
        optimisation: How its weights are trained: settings, or some of them as a dict.
        quantization: Load a named source with a ``"4bit"`` or ``"8bit"`` base; needs an adapter.
        dtype: Type of a named source's frozen weights.
        seed: Root seed of a fresh head, of the adapter's start and of dropout.
        **flat: Fields of :class:`RewardText` and :class:`Optimisation` under their own names, as checkpoints hold them.

    Attributes:
        model: The model; its output has ``logits`` of shape ``[batch, labels]``.
        source: Where its base came from: a name, or an absolute path.
        fresh: Whether the score head started at random.

    Raises:
        RecipeError: If an argument has a wrong value.
        QuantizedModelError: If a quantised base is to be trained in full.
        IncompatibleModelError: If the model cannot score a text, has no such ``label``, or the adapter does not fit.

    Example:
        >>> module = RewardModel("tiny:llama", lora=LoraSettings(r=2))
        >>> module.score(["2+2=", "2+2="], ["4", "five"]).shape, module.fresh, module.training
        (torch.Size([2]), True, True)
    """

    _task = "SEQ_CLS"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: RewardText | Mapping[str, Any] = ANY_TEXT,
        lora: LoraSettings | Mapping[str, Any] | None = None,
        optimisation: Optimisation | Mapping[str, Any] = FINETUNING,
        quantization: Quantization | None = None,
        dtype: str = "float32",
        seed: int = 0,
        **flat: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=SETTINGS, logger=False)
        adapter = self._keep(lora, optimisation, flat)
        asked = plain(settings_of(ANY_TEXT, text, flat))
        no_more(self, flat)
        if isinstance(model, str):
            self.hparams.update(model=model)
            loaded = load_reward_model(model, dtype=dtype, quantization=quantization, seed=seed)
            self.source = base_source(loaded.model, model)
        else:
            fresh, left = needs_score_head(model), in_memory(model)
            loaded = LoadedReward(scoring_model(model, seed=seed), tokenizer, "", fresh, left)
            self.source = base_source(model, "")
        self.tokenizer, self.seed = tokenizer or loaded.tokenizer, seed
        self.model, self.fresh = loaded.model, loaded.fresh
        self.token_budget, self.batch_size = asked.pop("token_budget"), asked.pop("batch_size")
        self._text, self._why = settle_text(
            asked, loaded.left, self.model, self.tokenizer, fresh=self.fresh, named=isinstance(model, str)
        )
        self.hparams.update(self._text, token_budget=self.token_budget, batch_size=self.batch_size)
        self.label: int | list[float] = self._text["label"]
        self._prepare(adapter)
        self.val_pairs, self.test_pairs = PairScores(), PairScores()
        self.val_points, self.test_points = PointScores(), PointScores()
        # transformers loads in evaluation mode, which Lightning would keep: dropout would stay off.
        self.train()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Score a batch of token ids.

        Args:
            input_ids: Token ids of shape ``[batch, time]``.
            attention_mask: 1 for tokens and 0 for padding, of the same shape.
            token_type_ids: Which segment a token belongs to, of the same shape, for an encoder that reads pairs.

        Returns:
            Rewards of shape ``[batch]``, float32.
        """
        return read_scores(self.model, input_ids, attention_mask, self.label, token_type_ids)

    @property
    def scorer(self) -> TextScorer:
        """The model as it is now, as a scorer of texts; it goes on changing as the model is trained.

        Raises:
            RecipeError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RecipeError(
                f"{self._title} has no tokenizer, so it cannot read texts. Pass RewardModel(..., tokenizer=...)."
            )
        sizes: dict[str, Any] = {"token_budget": self.token_budget, "batch_size": self.batch_size}
        scorer = TextScorer(self.model, self.tokenizer, name=self.source, **sizes, **self._text)
        scorer.why = self._why
        return scorer

    @property
    def encoder(self) -> RewardEncoder:
        """How texts are written; the data module of its training needs it.

        Raises:
            RecipeError: If there is no tokenizer.
        """
        return self.scorer.encoder

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            DataError: If the batch holds neither pairs nor ratings.
        """
        with self._own_dropout(batch_idx):
            rewards = self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        losses = self._losses(rewards, batch, batch_idx)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(losses), sync_dist=True)
        if "margin" in batch:
            chosen, rejected = rewards.detach().chunk(2)
            self.log("train/accuracy", (chosen > rejected).float().mean(), batch_size=len(losses), sync_dist=True)
        return loss

    def _log_epoch(self, stage: str) -> None:
        log_scores(self, stage, getattr(self, f"{stage}_pairs"), getattr(self, f"{stage}_points"))

    def _prepare(self, settings: LoraSettings | None) -> None:
        decoder = isinstance(self.model, DecoderWithScore)
        if settings is not None and not decoder:
            raise IncompatibleModelError(
                f"RewardModel puts adapters into decoders only, and {type(self.model).__name__} of {self.source!r} "
                "reads its score in another way. Leave lora out and train it in full."
            )
        super()._prepare(settings)
        if self.has_adapter and decoder:
            self.model.score.requires_grad_(True)

    def _losses(self, rewards: Tensor, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of each pair or rated text, ``[n]``."""
        losses = pair_losses(rewards, batch, batch_idx)
        return (rewards - batch["reward"]) ** 2 if losses is None else losses

    def _measure(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        rewards = self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        losses = self._losses(rewards, batch, batch_idx)
        if "margin" in batch:
            chosen, rejected = rewards.chunk(2)
            getattr(self, f"{stage}_pairs").update(chosen, rejected, losses, batch.get("real"))
        else:
            getattr(self, f"{stage}_points").update(losses, batch.get("real"))

    def _complete(self, folder: Path) -> None:
        complete_folder(folder, self.model, text=self._text, tokenizer=self.tokenizer, adapter=self.has_adapter)
