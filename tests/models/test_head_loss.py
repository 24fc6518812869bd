from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_interp.models import CausalLM, LoraSettings
from lightning_interp.models.training.head_loss import ChunkedHead, labelled_logps, row_sums, scored_positions
from lightning_interp.models.training.metric import completion_loss
from lightning_interp.testing import FAMILIES, tiny_model

SHAPE = (3, 12)


@pytest.fixture
def batch():
    ids = torch.randint(5, 261, SHAPE, generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = labels[1, 9:] = -100
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def chunked(model, batch, chunk=7):
    head, positions = ChunkedHead(model, chunk=chunk), scored_positions(batch["labels"])
    return head.logps(lambda: logits_of(model, batch), batch["labels"], positions)


def plain(model, batch):
    return -completion_loss(logits_of(model, batch), batch["labels"])[0]


def gradients(model, total):
    model.zero_grad()
    (total / 20).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def both(model, batch, **options):
    """Value and gradients from all logits, and from chunks of them."""
    results = []
    for total in (lambda: plain(model, batch), lambda: chunked(model, batch, **options).sum()):
        value = total()
        results.append((value.detach(), gradients(model, value)))
    return results


def close(a, b, atol=1e-6):
    assert a[1].keys() == b[1].keys()
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-6)
    for name, gradient in a[1].items():
        torch.testing.assert_close(b[1][name], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_all_logits(family, trained, batch):
    model = tiny_model(family, num_hidden_layers=1)
    model.get_output_embeddings().weight.requires_grad_(trained)
    assert ChunkedHead(model)._plain_head() is not None
    close(*both(model, batch))


@pytest.mark.parametrize(
    ("trained", "scale", "softcap", "bias"),
    [(True, 1.0, None, True), (True, 0.25, 3.0, True), (False, 2.0, 5.0, False), (False, 0.125, None, True)],
)
def test_scale_softcap_and_bias(trained, scale, softcap, bias):
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 6, generator=draw, requires_grad=True)
    weight = torch.randn(13, 6, generator=draw, requires_grad=trained)
    shift = torch.randn(13, generator=draw, requires_grad=trained) if bias else None
    targets, pull = torch.randint(0, 13, (9,), generator=draw), torch.randn(9, generator=draw)

    def slow():
        logits = scale * (hidden @ weight.T + (0 if shift is None else shift))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1)[torch.arange(9), targets]

    found = labelled_logps(hidden, weight, targets, bias=shift, scale=scale, softcap=softcap, chunk=4)
    torch.testing.assert_close(found, slow())
    inputs = [x for x in (hidden, weight, shift) if x is not None and x.requires_grad]
    expected = torch.autograd.grad((slow() * pull).sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad((found * pull).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_bias_alone_may_be_trained():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    bias, targets = torch.zeros(7, requires_grad=True), torch.arange(5)
    found = torch.autograd.grad(labelled_logps(hidden, weight, targets, bias=bias).sum(), [hidden, bias])
    expected = torch.autograd.grad((hidden @ weight.T + bias).log_softmax(-1)[targets, targets].sum(), [hidden, bias])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def scaled(model, factor):
    """A model that multiplies its logits, as granite does."""
    run = model.forward

    def forward(*args, **options):
        output = run(*args, **options)
        output.logits = output.logits * factor
        return output

    model.forward = forward
    return model


def test_a_factor_behind_the_head_is_found_by_running_the_model(batch):
    model = scaled(tiny_model(), 0.125)
    close(*both(model, batch))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_in_autocast_the_products_are_bfloat16_and_the_sums_float32(trained, batch):
    model = tiny_model("gemma2", num_hidden_layers=1)
    model.get_output_embeddings().weight.requires_grad_(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (total, expected), (mine, found) = both(model, batch)
    assert mine.dtype == torch.float32
    exact = float(plain(model, batch).detach())
    assert abs(float(mine) - exact) < max(2 * abs(float(total) - exact), 0.1)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("why", ["adapter on the head", "hook on the head", "unreadable"])
def test_other_heads_make_all_logits_and_the_numbers_are_the_same(why, batch):
    model = tiny_model("llama", num_hidden_layers=1)
    if why == "adapter on the head":
        CausalLM(model, lora=LoraSettings(r=2, target_modules=["lm_head", "v_proj"]))
        torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    elif why == "hook on the head":
        model.lm_head.register_forward_hook(lambda _, args, out: out * 1.5)
    else:
        run = model.forward

        def forward(*args, **options):
            output = run(*args, **options)
            output.logits = output.logits.sin()
            return output

        model.forward = forward
    assert ChunkedHead(model)._plain_head() is None
    close(*both(model, batch))


def test_quantised_blocks_under_a_plain_head(batch):
    from lightning_interp.models import load_causal_lm

    model = load_causal_lm("tiny:llama", quantization="8bit").model
    assert ChunkedHead(model)._plain_head() is not None
    with torch.no_grad():
        torch.testing.assert_close(chunked(model, batch).sum(), plain(model, batch))


def test_without_gradients_and_in_inference_mode(batch):
    model = tiny_model("gemma2")
    expected = plain(model, batch)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            torch.testing.assert_close(chunked(model, batch).sum(), expected.detach())


def test_the_head_reads_one_column_and_no_hook_stays(batch):
    model, widths = tiny_model(), []
    head = model.get_output_embeddings()
    run = head.forward
    head.forward = lambda states: widths.append(states.shape[1]) or run(states)
    reader, positions = ChunkedHead(model), scored_positions(batch["labels"])
    for _ in range(2):
        reader.logps(lambda: logits_of(model, batch), batch["labels"], positions)
    assert widths[-2:] == [1, 1]
    assert not head._forward_pre_hooks


def test_positions_and_sums_by_row(batch):
    labels = batch["labels"]
    positions = scored_positions(labels)
    expected = [row * 12 + t - 1 for row in range(3) for t in range(1, 12) if labels[row, t] != -100]
    assert positions.tolist() == expected
    sums = row_sums(torch.ones(len(positions)), positions, labels.shape)
    assert sums.tolist() == [(labels[row, 1:] != -100).sum() for row in range(3)] == [7, 8, 11]


def test_no_labelled_token_gives_nothing(batch):
    batch["labels"][:] = -100
    assert chunked(tiny_model(), batch).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_peak_memory_is_at_most_a_quarter(trained):
    """2,048 tokens and 49,152 words, in anonymous resident memory."""
    hidden = torch.randn(2048, 32, requires_grad=True)
    weight = (torch.randn(49_152, 32) / 6).requires_grad_(trained)
    targets = torch.randint(0, 49_152, (2048,))

    def whole():
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

    def chunks():
        (-labelled_logps(hidden, weight, targets).sum()).backward()

    peaks = [peak(run) for run in (chunks, whole)]
    assert peaks[0] <= peaks[1] / 4, peaks


def peak(run):
    """Highest anonymous resident memory (MB) above what was there before."""

    def now():
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return float(line.split()[1]) / 1024

    before, highest, done = now(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            highest.append(now())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(highest) - before
