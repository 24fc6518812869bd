"""Every member of the steering family keeps the promises of an intervention, on every family of models."""

from __future__ import annotations

import torch

from lightning_interp import Generated, Last, ModelMap, Prompt, Site
from lightning_interp.steering import (
    AddDirection,
    AffineMap,
    ClampDirection,
    EntropyGate,
    LinearDecay,
    ProbeGate,
    ProjectOut,
)
from lightning_interp.testing import InterventionContract

LAYERS = (1, 2)


def direction(model, k=0, size=1.0):
    width = model.get_output_embeddings().weight.shape[1]
    return size * torch.randn(width, generator=torch.Generator().manual_seed(k))


def at(*layers):
    return [Site("resid_post", layer) for layer in layers]


class TestAddDirection(InterventionContract):
    families = ("gemma2",)  # the blocks of each other family are written to in one of the classes below

    def make(self, model):
        return AddDirection({site: direction(model, k) for k, site in enumerate(at(*LAYERS))}, strength=2.0)

    def make_identity(self, model):
        return AddDirection(direction(model), site=at(*LAYERS), strength=0.0)


class TestStrengthsOfRows(InterventionContract):
    """One strength for each row, and the same for the rows that share a prompt; the norm is kept."""

    families = ("bloom",)

    def make(self, model):
        return AddDirection(direction(model), site=at(1), strength=[1.5], keep_norm=True)

    def make_identity(self, model):
        return AddDirection(direction(model), site=at(*LAYERS), strength=[0.0, 0.0, 0.0], keep_norm=True)


class TestProjectOut(InterventionContract):
    families = ("gpt2",)  # at sites that TestAddDirection writes to in every family

    def make(self, model):
        return ProjectOut(torch.stack([direction(model, 0), direction(model, 1)]), site=at(*LAYERS))

    def make_identity(self, model):
        return ProjectOut(direction(model), site=at(*LAYERS), strength=[0.0, 0.0, 0.0])


class TestAffineMap(InterventionContract):
    families = ("llama", "opt")

    def make(self, model):
        u, v = (torch.stack([direction(model, k, 0.2), direction(model, k + 5, 0.2)]) for k in (1, 2))
        return AffineMap((u.T, v), direction(model, 3), site="mlp_in.1" if self.has_mlp(model) else "resid_pre.1")

    def make_identity(self, model):
        return AffineMap(torch.diag(direction(model)), site=at(1), strength=[0.0, 0.0, 0.0])

    @staticmethod
    def has_mlp(model):
        return "mlp_in" in ModelMap.build(model).describe()["sites"]


class TestClampDirection(InterventionContract):
    families = ("qwen2_moe",)  # at sites that TestAddDirection writes to in every family

    def make(self, model):
        return ClampDirection(direction(model), to=3.0, site=at(*LAYERS))

    def make_identity(self, model):
        return ClampDirection(direction(model), low=-1e6, high=1e6, site=at(*LAYERS), strength=[0.0, 0.0, 0.0])


class TestGated(InterventionContract):
    """Decided at one layer, done at a later one."""

    families = ("gpt_neox",)

    def make(self, model):
        gate = ProbeGate(direction(model, 7), above=0.0, site="resid_post.0")
        return AddDirection(direction(model, size=3.0), site=at(2), positions=gate, strength=1.5)

    def make_identity(self, model):
        return AddDirection(direction(model), site=at(1), positions=ProbeGate(direction(model, 7), above=1e9))


class TestAtTheHead(InterventionContract):
    """With a gate on the distribution, also of a model that caps its logits."""

    families = ("gemma2",)

    def make(self, model):
        return AddDirection(direction(model, size=3.0), site="unembed_in", positions=EntropyGate(above=0.0))

    def make_identity(self, model):
        return AddDirection(direction(model), site="unembed_in", positions=EntropyGate(above=1e9))


class TestLastAndScheduled(InterventionContract):
    """``Last`` follows the growing sequence, so decoding is no single pass."""

    families = ("llama",)
    cache_consistent = False

    def make(self, model):
        where = Last() & (Prompt() | Generated())
        return AddDirection(
            direction(model), site=at(1), positions=where, strength=3.0, schedule=LinearDecay(8, end=0.5)
        )

    def make_identity(self, model):
        return AddDirection(direction(model), site=at(1), positions=Last(), schedule=lambda steps: 0.0 * steps)
