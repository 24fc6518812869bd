from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import rig
import torch
from adapters_under_test import Waits, adapted, scale_of, updates

from lightning_interp import InterventionCallback
from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.weights.row_weights import RowWeights
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError
from lightning_interp.figures import png
from lightning_interp.lora import AdapterTracer, ablated, trace_adapter, trace_figure
from lightning_interp.models.sources.pretrained import checkpoint_blocks
from lightning_interp.testing import InterventionContract, byte_tokenizer, tiny_model

pytestmark = [
    pytest.mark.usefixtures("two_layers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def positions_of(model, mask):
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if model.config.model_type == "gpt2" else {}


def layers(model):
    return [(path, layer) for path, layer in model.named_modules() if hasattr(layer, "lora_A")]


def toggled(model, ids):
    """By module: what the adapter adds at each token of one row ``[T, d_out]``, and what the base gives there.

    Each layer is called again on its own input, token by token, with the adapter on and off.
    """
    inputs, found = {}, {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path, layer in layers(model)
    ]
    with torch.no_grad():
        model(ids[None])
        for handle in handles:
            handle.remove()
        for path, layer in layers(model):
            branches, bases = [], []
            for t in range(len(ids)):
                on = layer(inputs[path][:, t : t + 1])
                layer.enable_adapters(False)
                off = layer(inputs[path][:, t : t + 1])
                layer.enable_adapters(True)
                branches.append((on - off).double()[0, 0])
                bases.append(off.double()[0, 0])
            found[path] = torch.stack(branches), torch.stack(bases)
    return found


def basis(update, count):
    """The first output directions of a full matrix, the largest entry of each positive."""
    left = torch.linalg.svd(update, full_matrices=False).U[:, :count]
    return left * left.gather(0, left.abs().argmax(0, keepdim=True)).sign()


def same(found, expected, tolerance=1e-4):
    for name in ("norms", "bases", "scalars", "coordinates"):
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "rslora"), ("llama", "wide"), ("gpt2", "patterns"), ("gpt2", "tables"), ("gpt_neox", "biased")],
)
def test_each_token_is_what_toggling_the_adapter_says(family, kind):
    model = adapted(family, kind)
    found = trace_adapter(model, {**BATCH, **positions_of(model, MASK), "labels": IDS}, top=3)
    assert [module.path for module in found.modules] == [path for path, _ in layers(model)]
    full, ranks = updates(model), {module.path: module.rank for module in found.modules}
    for row, start in ((0, 2), (1, 0)):
        reference = toggled(model, IDS[row, start:])
        for m, module in enumerate(found.modules):
            branch, base = reference[module.path]
            count = min(3, ranks[module.path])
            torch.testing.assert_close(found.norms[row, start:, m].double(), branch.norm(dim=1), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.bases[row, start:, m].double(), base.norm(dim=1), atol=1e-5, rtol=1e-4)
            along = branch @ basis(full[module.path], count)
            torch.testing.assert_close(found.coordinates[row, start:, m, :count].double(), along, atol=2e-5, rtol=1e-3)
            assert bool(found.coordinates[row, :, m, count:].isnan().all())
    assert bool(
        found.norms[0, :2].isnan().all() & found.coordinates[0, :2].isnan().all() & found.bases[0, :2].isnan().all()
    )
    assert found.positions.tolist() == [[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert bool(found.scalars.isnan().all())
    torch.testing.assert_close(found.relative, found.norms / found.bases, equal_nan=True)


def test_of_rank_one_the_scalar_is_what_a_gives():
    model = adapted("llama", r=1, lora_alpha=3)
    found = trace_adapter(model, {"input_ids": IDS}, top=2)
    inputs = {}
    for path, layer in layers(model):
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    with torch.no_grad():
        model(IDS)
    for m, (path, layer) in enumerate(layers(model)):
        scalar = inputs[path] @ layer.lora_A["default"].weight[0]
        torch.testing.assert_close(found.scalars[..., m], scalar, atol=1e-5, rtol=1e-5)
        size = scale_of(model.peft_config["default"], path, 1) * layer.lora_B["default"].weight.norm()
        torch.testing.assert_close(found.norms[..., m], size * scalar.abs(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.coordinates[..., m, 0].abs(), found.norms[..., m], atol=1e-5, rtol=1e-4)


# Passes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_appends_rows(family, cached):
    model, tracer = adapted(family), AdapterTracer()
    with tracer.attach(model):
        text = model.generate(**BATCH, **GREEDY, use_cache=cached)
    mask = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], dim=1)[:, :-1]  # the last token is never read
    whole = trace_adapter(model, {"input_ids": text[:, :-1], "attention_mask": mask, **positions_of(model, mask)})
    assert tracer.trace.norms.shape[:2] == (2, 8)
    same(tracer.trace, whole)


def test_chunks_and_a_cache_that_is_cut_back_are_followed():
    model, tracer = adapted(), AdapterTracer()
    whole = trace_adapter(model, {"input_ids": IDS})
    with tracer.attach(model), torch.no_grad():
        cache = None
        for start, end in ((0, 3), (3, 4), (4, 6), (4, 6)):
            if start == 4 and cache.get_seq_length() == 6:
                cache.crop(-2)
            cache = cache_of(model(IDS[:, start:end], **cache_argument(model, cache), use_cache=True))
    same(tracer.trace, whole)


def test_columns_that_were_cached_before_are_not_known():
    model, tracer = adapted(), AdapterTracer()
    whole = trace_adapter(model, {"input_ids": IDS})
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :2], use_cache=True))
        with tracer.attach(model):
            model(IDS[:, 2:], **cache_argument(model, cache))
    found = tracer.trace
    assert bool(found.norms[:, :2].isnan().all())
    assert found.ids[:, :2].tolist() == [[-1, -1]] * 2
    torch.testing.assert_close(found.norms[:, 2:], whole.norms[:, 2:], atol=1e-5, rtol=1e-4)
    assert len(found.table()) == 2 * 4 * 4


def test_an_adapter_on_the_head_sees_the_columns_that_are_kept():
    model, tracer = adapted(more=["lm_head"]), AdapterTracer()
    whole = trace_adapter(model, BATCH)
    with tracer.attach(model), torch.no_grad():
        model(**BATCH, logits_to_keep=2)
    head = [module.path for module in tracer.modules].index("lm_head")
    assert tracer.modules[head].layer is None
    found = tracer.trace.norms
    assert bool(found[:, :-2, head].isnan().all())
    torch.testing.assert_close(found[:, -2:, head], whole.norms[:, -2:, head], atol=1e-5, rtol=1e-4)
    assert not bool(whole.norms[1].isnan().any())


def test_weights_that_change_are_followed():
    model, tracer = adapted(), AdapterTracer()
    with tracer.attach(model), torch.no_grad():
        for keep in ("top1", "rest"):
            with ablated(model, keep):
                model(**BATCH)
                same(tracer.trace, trace_adapter(model, BATCH))
            if keep == "top1":
                assert float(tracer.trace.coordinates[1, ..., 1:].abs().max()) < 1e-5 * float(
                    tracer.trace.norms[1].max()
                )
        model(**BATCH)
    same(tracer.trace, trace_adapter(model, BATCH))


def test_training_with_dropout_is_untouched_and_measured_without():
    model, tracer = adapted(lora_dropout=0.5).train(), AdapterTracer()
    checkpoint_blocks(model)
    found = []
    for traced in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        attachment = tracer.attach(model) if traced else None
        model(**BATCH, labels=IDS).loss.backward()
        if attachment is not None:
            attachment.remove()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    first = tracer.trace.modules[0].path  # its input has seen no dropout yet
    assert first.endswith("0.self_attn.q_proj")
    expected = trace_adapter(model, BATCH)
    torch.testing.assert_close(tracer.trace.norms[..., 0], expected.norms[..., 0], atol=1e-5, rtol=1e-4, equal_nan=True)
    assert not tracer.trace.norms.requires_grad
    assert model.training


@pytest.mark.parametrize("how", ["autocast", "inference"])
def test_it_measures_in_full_precision_and_gives_ordinary_tensors(how):
    model, tracer = adapted(), AdapterTracer()
    mode = torch.inference_mode() if how == "inference" else torch.autocast("cpu", torch.bfloat16)
    with tracer.attach(model), mode, torch.no_grad():
        model(**BATCH)
    found, whole = tracer.trace, trace_adapter(model, BATCH)
    assert found.norms.dtype == torch.float32
    assert not found.norms.is_inference()
    tolerance = 2e-2 if how == "autocast" else 1e-5
    torch.testing.assert_close(found.norms, whole.norms, atol=tolerance, rtol=0.1, equal_nan=True)


def test_the_host_does_not_wait_and_no_full_matrix_is_built():
    model, counts = adapted(r=2), []
    for tracer in (None, AdapterTracer()):
        attachment = tracer.attach(model) if tracer else None
        with torch.no_grad(), Waits() as watch:
            model(IDS)
        counts.append((watch.waits, watch.largest))
        if attachment is not None:
            attachment.remove()
    assert counts[0] == counts[1]


class TestTracer(InterventionContract):
    families = ("llama",)
    changes_output = False

    def model(self, family, dtype=torch.float32):
        return adapted(family, dtype=dtype)

    def make(self, model):
        return AdapterTracer()


# Beside others


def test_under_a_choice_of_rows_it_tells_what_the_adapter_would_add():
    model, tracer = adapted(target_modules=["q_proj"]), AdapterTracer()
    rows = RowWeights("default", torch.zeros(2, 6, dtype=torch.long))
    with Compose(rows, tracer).attach(model), torch.no_grad():
        model(**BATCH)
    first = tracer.trace
    base = tiny_model("llama")
    inputs = {}
    for path, layer in base.named_modules():
        if path.endswith("q_proj"):
            layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    with torch.no_grad():
        base(**BATCH)
    for m, (path, update) in enumerate(updates(model).items()):
        expected = (inputs[path].double() @ update.T).norm(dim=-1)[1]
        torch.testing.assert_close(first.norms[1, :, m].double(), expected, atol=1e-5, rtol=1e-4)
    rows.codes = torch.tensor([[0, 1, 0, 1, 0, 1]] * 2)
    with rows.attach(model), tracer.attach(model), torch.no_grad():
        model(**BATCH)
    after = tracer.trace.relative[1]
    assert not bool(after.isnan().any())
    with tracer.attach(model), rows.attach(model), torch.no_grad():
        model(**BATCH)
    torch.testing.assert_close(tracer.trace.relative[1], after)
    match = r"q_proj is called with \d+ rows, but the pass has 2 x 6 tokens.*Attach a tracer after gates"
    apart = RowWeights("default", torch.tensor([[0, 1, 0, 1, 0, 1], [0] * 6]), execution="partition")
    with tracer.attach(model), apart.attach(model), pytest.raises(PositionError, match=match), torch.no_grad():
        model(**BATCH)


def test_in_a_lightning_run(tmp_path):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted()

        def predict_step(self, batch, batch_idx):
            return self.model(**batch).logits

    module, tracer = Module(), AdapterTracer()
    run = rig.trainer(tmp_path, InterventionCallback(tracer, when=["predict"]))
    run.predict(module, torch.utils.data.DataLoader([BATCH], batch_size=None))
    same(tracer.trace, trace_adapter(module, BATCH))


# Refusals


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(IncompatibleModelError, match=r"A trace .* rescales the rows of the base \(DoRA\): model"):
        trace_adapter(adapted(kind="dora"), BATCH)
    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj
    layer.set_adapter([])
    with pytest.raises(IncompatibleModelError, match=r"'default' is not active in .*q_proj \(\[\] are\).*set_adapter"):
        trace_adapter(model, BATCH)
    layer.set_adapter(["default"])
    layer.enable_adapters(False)
    with pytest.raises(IncompatibleModelError, match=r"is disabled in .*Enable adapters first"):
        AdapterTracer().attach(model)
    layer.enable_adapters(True)
    layer.merge()
    with pytest.raises(IncompatibleModelError, match=r"is merged into .*Unmerge first"):
        AdapterTracer().attach(model)
    with pytest.raises(RecipeError, match="top=-1"):
        AdapterTracer(top=-1)
    with pytest.raises(PositionError, match="has seen no pass"):
        _ = AdapterTracer().trace


def test_beams_are_refused():
    model, tracer = adapted(), AdapterTracer()
    with tracer.attach(model), pytest.raises(PositionError, match=r"a generation of beams \(2\)"):
        model.generate(**BATCH, **GREEDY, num_beams=2)
    ids = torch.tensor([[5, 6, 7, 8] * 4])
    more = {"attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 3}
    with tracer.attach(model), pytest.raises(PositionError, match=r"candidates for new tokens, some of them rejected"):
        model.generate(ids, **more, max_new_tokens=8, do_sample=False)


# Table and figure


def test_the_table_has_a_row_for_each_real_token_and_module():
    model, tokenizer = adapted(r=1), byte_tokenizer()
    batch = tokenizer(["red fox", "a \u00e9"], return_tensors="pt", padding=True)
    found = trace_adapter(model, dict(batch), top=2)
    table = found.table(tokenizer)
    words = [row["token"] for row in table if row["layer"] == 0 and row["module"] == "self_attn.q_proj"]
    assert "".join(words[:7]) == "red fox"
    assert len(table) == 4 * int(batch.attention_mask.sum())
    second = [row for row in table if row["row"] == 1]
    assert [row["position"] for row in second[::4]] == list(range(len(second) // 4))
    assert second == found.table(tokenizer, rows=[1])
    start = found.positions.shape[1] - len(second) // 4
    for column, m in itertools.product(range(len(second) // 4), range(4)):
        row = second[4 * column + m]
        numbers = [row[key] for key in ("norm", "relative", "scalar", "coordinate_1")]
        tensors = [found.norms, found.relative, found.scalars, found.coordinates[..., 0]]
        assert numbers == [float(tensor[1, start + column, m]) for tensor in tensors]
        assert row["coordinate_2"] is None
    assert found.table()[0]["token"] == int(batch.input_ids[0, found.positions[0] == 0][0])
    blind = trace_adapter(model, {"inputs_embeds": torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))})
    with pytest.raises(PositionError, match=r"trace of \(1, 3\) rows and columns are not known \(ids: none\). Pass"):
        blind.table()
    assert blind.table(ids=torch.tensor([[5, 6, 7]]))[-1]["token"] == 7


def test_the_figure_shows_layers_over_the_text():
    model, tokenizer = adapted(r=1), byte_tokenizer()
    found = trace_adapter(model, dict(tokenizer(["the", "red fox"], return_tensors="pt", padding=True)))
    figure = trace_figure(found, tokenizer, row=0, value="norm")
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (2, 3)  # layers and real tokens
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["t", "h", "e"]
    expected = found.norms[0, -3:, 2:].square().sum(-1).sqrt()
    torch.testing.assert_close(torch.tensor(shown[1]), expected.double(), atol=1e-6, rtol=1e-6)
    one = trace_figure(found, tokenizer, row=1, value="scalar", module="mlp.down_proj").axes[0].images[0]
    torch.testing.assert_close(torch.tensor(one.get_array()[0]).float(), found.scalars[1, :, 1])
    assert one.get_clim()[0] == -one.get_clim()[1]
    relative = trace_figure(found, row=0, module="mlp.down_proj").axes[0].images[0].get_array()
    torch.testing.assert_close(torch.tensor(relative[1]).float(), found.relative[0, -3:, 3])
    assert png(figure)[:4] == b"\x89PNG"
    ids = torch.tensor([[300, *range(2, 8)]]).expand(2, -1)
    spelled = {300: "\u4f60 $", **dict.fromkeys(range(2, 9), "\n")}
    odd = trace_figure(found, SimpleNamespace(decode=lambda ids, **_: "".join(spelled[i] for i in ids)), ids, row=1)
    assert [text.get_text() for text in odd.axes[0].get_xticklabels()][:2] == ["\\u4f60\u2423\\$", "\u21b5"]
    for settings, match in (
        ({"value": "size"}, "value='size'.: expected relative, norm"),
        ({"module": "mlp"}, "module='mlp'.: the adapter sits on mlp.down_proj, self_attn.q_proj"),
        ({"value": "coordinate"}, "value='coordinate'. has a sign: name one module=, of mlp.down_proj"),
    ):
        with pytest.raises(RecipeError, match=match):
            trace_figure(found, **settings)
