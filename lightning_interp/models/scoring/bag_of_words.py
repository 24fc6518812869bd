"""A reward model that one can read: a weight for each word, trained like any other and scored like any other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models.scoring.reward_text import Prompt, RewardEncoder, Scores, score_rows
from lightning_interp.models.scoring.text_scorer import Scorer, ScoresTexts
from lightning_interp.models.sources.folders import atomic_folder, check_weight_files
from lightning_interp.models.training.finetuning import Optimised
from lightning_interp.models.training.optimisation import Optimisation, no_more, plain, settings_of
from lightning_interp.models.training.reward_metric import PairScores, PointScores, log_scores, pair_losses

__all__ = ["BagOfWords"]

Loss = Literal["logistic", "squared"]

_WORDS = Optimisation(lr=0.02)
_TOKEN_BUDGET = 1 << 18  # ids of one scored batch


class BagOfWords(ScoresTexts, Optimised):
    """A reward that is a sum over the different words of a text, with prompt, and an intercept.

    How often a word occurs and where does not matter: texts of the same words have the same reward to the bit, so some
    effects on the reward are known without measuring them. It is trained on the batches of
    :class:`~lightning_interp.models.PreferenceDataModule`, made with its ``encoder``: on pairs by the loss of Bradley
    and Terry, on rated texts by logistic regression (ratings from 0 to 1) or the squared error. All weights begin at 0.

    Logs ``train/loss``, and after validation ``val/loss``, ``val/accuracy`` (of pairs, or of ratings on their side of a
    half; not with the squared error) and the number of ``val/pairs`` or ``val/texts``.

    Args:
        tokenizer: Of :func:`~lightning_interp.models.word_tokenizer`, or another with an end token, the intercept's.
        loss: Of rated texts.
        optimisation: How its weights are trained, all of which decay: settings, or some of them as a dict.
        **flat: Fields of :class:`Optimisation` under their own names, as checkpoints hold them.

    Attributes:
        weights: A weight for each token.

    Raises:
        RecipeError: If an argument has a wrong value.
        IncompatibleModelError: If the tokenizer has no end token.

    Example:
        >>> from lightning_interp.models import word_tokenizer
        >>> module = BagOfWords(word_tokenizer(["great flight", "late again"], min_count=1))
        >>> _ = torch.nn.init.constant_(module.weights.weight[module.tokenizer.vocab["great"]], 2.0)
        >>> module.score(["", "", ""], ["Great!", "great, GREAT", "late"]).tolist()
        [2.0, 2.0, 0.0]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss: Loss = "logistic",
        optimisation: Optimisation | Mapping[str, Any] = _WORDS,
        **flat: Any,
    ) -> None:
        super().__init__()
        self.optimisation = settings_of(_WORDS, optimisation, flat)
        no_more(self, flat)
        if loss not in get_args(Loss):
            raise RecipeError(f"BagOfWords(loss={loss!r}): expected one of {', '.join(get_args(Loss))}.")
        if tokenizer.eos_token_id is None:
            raise IncompatibleModelError(
                f"BagOfWords needs an end token, whose weight is the intercept, and the {type(tokenizer).__name__} of "
                f"{len(tokenizer)} tokens has none. Set tokenizer.eos_token, or use word_tokenizer."
            )
        self.save_hyperparameters(ignore=["tokenizer", "optimisation", "betas"], logger=False)
        self.hparams.update(plain(self.optimisation))
        self.tokenizer, self.loss = tokenizer, loss
        self.weights = nn.Embedding(len(tokenizer), 1)
        nn.init.zeros_(self.weights.weight)
        self.val_pairs, self.val_sides, self.val_points = PairScores(), PairScores("texts"), PointScores()

    @property
    def encoder(self) -> RewardEncoder:
        """How texts are written; the data module of its training needs it."""
        return RewardEncoder(tokenizer=self.tokenizer)

    @property
    def scorer(self) -> Scorer:
        """The module as it is now, as a scorer of texts; it goes on changing as the module is trained."""
        return _WordScorer(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score a batch of token ids.

        Args:
            input_ids: Token ids of shape ``[batch, time]``.
            attention_mask: 1 for tokens and 0 for padding, of the same shape.

        Returns:
            Rewards of shape ``[batch]``.
        """
        return _summed(self.weights.weight, input_ids, attention_mask, self.tokenizer.unk_token_id)

    def top_words(self, count: int = 10) -> dict[str, list[tuple[str, float]]]:
        """The words that raise and lower the reward most.

        Args:
            count: How many of each.

        Returns:
            ``{"raise": [(word, weight), ...], "lower": [...]}``, the strongest first.
        """
        special = set(self.tokenizer.all_special_ids)
        values = self.weights.weight.detach().float().cpu()[:, 0].tolist()
        order = sorted((i for i in range(len(values)) if i not in special), key=lambda i: (-values[i], i))
        ends = {"raise": order[:count], "lower": order[::-1][:count]}
        return {
            name: [(str(self.tokenizer.convert_ids_to_tokens(i)), values[i]) for i in ids] for name, ids in ends.items()
        }

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that shards weights: there is nothing here that would be worth it.

        Raises:
            UnsupportedStrategyError: If its strategy does.
        """
        check_strategy(self.trainer.strategy, reads_weights=True, purpose="BagOfWords")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            DataError: If the batch holds neither pairs nor ratings, or a rating that the loss cannot use.
        """
        losses = self._losses(self(batch["input_ids"], batch["attention_mask"]), batch, batch_idx)
        self.log("train/loss", loss := losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation scores."""
        rewards = self(batch["input_ids"], batch["attention_mask"])
        losses = self._losses(rewards, batch, batch_idx)
        if "margin" in batch:
            chosen, rejected = rewards.chunk(2)
            self.val_pairs.update(chosen, rejected, losses, batch.get("real"))
        elif self.loss == "logistic":  # right is what is on its side of a half
            side = torch.where(batch["reward"] > 0.5, rewards, -rewards)
            self.val_sides.update(side, torch.zeros_like(side), losses, batch.get("real"))
        else:
            self.val_points.update(losses, batch.get("real"))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, ``val/accuracy`` and the number of pairs or texts."""
        log_scores(self, "val", self.val_pairs, self.val_sides, self.val_points)

    def _losses(self, rewards: Tensor, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of each pair or rated text, ``[n]``."""
        if (losses := pair_losses(rewards, batch, batch_idx)) is not None:
            return losses
        rating = batch["reward"]
        if self.loss == "squared":
            return (rewards - rating) ** 2
        if not ((rating >= 0) & (rating <= 1)).all():
            wrong = rating[(rating < 0) | (rating > 1)][0]
            raise DataError(
                f"Batch {batch_idx} has the rating {float(wrong):g}; loss='logistic' takes those from 0 to 1. Scale "
                "them, or use loss='squared'."
            )
        return F.binary_cross_entropy_with_logits(rewards.float(), rating, reduction="none")

    def export(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write weights and tokenizer.

        Args:
            folder: The folder to make; it appears whole or not at all.
            overwrite: Whether a folder that holds files may be replaced.

        Returns:
            ``folder``.

        Raises:
            ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
        """
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            save_tensors(temporary / "model.safetensors", {"weights": self.weights.weight.float()}, {"format": "pt"})
            self.tokenizer.save_pretrained(temporary)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **settings: Any) -> Self:
        """Read what :meth:`export` wrote.

        Args:
            folder: The folder.
            **settings: Further arguments of the class.

        Returns:
            The module.

        Raises:
            DataError: If the folder or its weights are missing or damaged.
            IncompatibleModelError: If the weights are not those of a bag of words with this tokenizer.
        """
        path = Path(folder)
        if not path.is_dir():
            raise DataError(f"There is no folder {str(folder)!r}. Give the one that BagOfWords.export wrote.")
        check_weight_files(path)
        tensors = load_file(path / "model.safetensors")
        module = cls(PreTrainedTokenizerFast.from_pretrained(path), **settings)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != {"weights": tuple(module.weights.weight.shape)}:
            raise IncompatibleModelError(
                f"The weights in {str(folder)!r} are {found!s:.120}; expected one number for each of the "
                f"{len(module.tokenizer)} tokens beside them. Give the folder that BagOfWords.export wrote."
            )
        with torch.no_grad():
            module.weights.weight.copy_(tensors["weights"])
        return module


def _summed(weight: Tensor, input_ids: Tensor, mask: Tensor | None, unknown: int | None) -> Tensor:
    """Sum of the weights ``[V, 1]`` of the different known tokens of each row, ``[batch]``."""
    seen = torch.ones_like(input_ids) if mask is None else mask.long()
    if unknown is not None:
        seen = seen * (input_ids != unknown)
    ids = torch.where(seen == 1, input_ids, -1).sort(dim=1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counted = first & (ids >= 0)
    return (F.embedding(ids.clamp_min(0), weight)[..., 0] * counted).sum(dim=1)


class _WordScorer(Scorer):
    """Scores with float64 sums of the module's weights on the CPU: sums of float32 numbers, so exact in any order."""

    def __init__(self, module: BagOfWords) -> None:
        self._module, self.name = module, "bag-of-words"

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Rewards of texts; none is cut."""
        encoder, unknown = self._module.encoder, self._module.tokenizer.unk_token_id
        rows = [text.ids for text in encoder.encode_texts(prompts, texts)]
        weight = self._weight().double()
        with undisturbed(self._module):
            reward = score_rows(
                lambda ids, mask: _summed(weight, ids, mask, unknown),
                rows,
                pad_id=encoder.pad_id,
                device=torch.device("cpu"),
                token_budget=_TOKEN_BUDGET,
            )
        return Scores(reward, torch.zeros(len(texts), dtype=torch.bool))

    def identity(self) -> dict[str, Any]:
        """Name and digest of all weights and words."""
        found = hashlib.sha256(self._weight().numpy().tobytes())
        found.update(repr(sorted(self._module.tokenizer.get_vocab().items())).encode())
        return {"name": self.name, "weights": found.hexdigest()}

    def _weight(self) -> Tensor:
        return self._module.weights.weight.detach().float().cpu()
