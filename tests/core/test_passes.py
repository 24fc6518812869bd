"""A pass that leaves a hooked module out is refused, and so is a second thread in the middle of a first one's."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from changes import IDS, VECTOR, Add, close, logits

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.hooks.passes import OneThread
from lightning_interp.core.model.own_hooks import suspended
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.positions import Generated, Last
from lightning_interp.errors import IncompatibleModelError, UnsupportedStrategyError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import tiny_model, tiny_pair


def bypass(parent, name, when=lambda *x: True):
    """Let ``parent.name(x)`` work past the module's hooks, as a fused kernel that reads its weights does."""
    child = getattr(parent, name)
    parent.__dict__[name] = lambda *x, **named: (child.forward if when(*x) else child)(*x, **named)


# Hooks that never fire


@pytest.mark.parametrize(
    ("place", "child", "intervention"),
    [
        ("model.layers.1.mlp", "gate_proj", GraftPlan.at(Last(), "FFN")),
        ("model.layers.2.self_attn", "k_proj", GraftPlan.at(Last(), "ATTN", layers="Q3")),
        ("model.layers.0", "post_attention_layernorm", GraftPlan.whole()),
        ("model", "norm", GraftPlan.whole()),
        ("model", "embed_tokens", GraftPlan.at(Last())),
        ("model.layers.3", "mlp", Add(Site("mlp_out", 3))),
        ("model.layers.1.mlp", "down_proj", Add(Site("linear:down", 1))),
        ("model.layers.1", "self_attn", Compose(Add(Site("resid_post", 0)), Add(Site("attn_in", 1)))),
        ("model", "norm", ActivationCapture([Site("final_norm")])),
        ("", "lm_head", Add(Site("logits"), torch.ones(261))),
        ("", "lm_head", GraftPlan.whole()),
    ],
)
def test_a_module_that_is_never_called_is_named(place, child, intervention):
    recipient, donor = tiny_pair("llama")
    intervention = Graft(donor, intervention) if isinstance(intervention, GraftPlan) else intervention
    name = f"{place}.{child}".strip(".")
    with intervention.attach(recipient):
        bypass(recipient.get_submodule(place), child)
        with pytest.raises(
            IncompatibleModelError, match=rf"^{name} of LlamaForCausalLM should have acted .* never called"
        ):
            logits(recipient)


def test_only_decoding_or_training_may_go_past_a_module():
    model = tiny_model("llama")
    attached = Add(Site("mlp_out", 1), positions=Generated()).attach(model)
    bypass(model.model.layers[1], "mlp", when=lambda x: x.shape[1] == 1)
    with attached, pytest.raises(IncompatibleModelError, match=r"^model\.layers\.1\.mlp of"):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    with Add(Site("mlp_out", 2)).attach(model):
        bypass(model.model.layers[2], "mlp", when=lambda x: model.training)
        logits(model)
        with pytest.raises(IncompatibleModelError, match=r"^model\.layers\.2\.mlp of"):
            logits(model.train())


def test_the_backbone_alone_has_no_head_to_call():
    model = tiny_model("llama")
    with Add(Site("logits"), torch.ones(261)).attach(model), torch.no_grad():
        model.model(IDS)
        assert (logits(model) != 0).any()


def test_blocks_that_are_left_out_on_purpose():
    model = tiny_model("opt").train()
    model.config.layerdrop = model.model.decoder.layerdrop = 1.0
    with Add(Site("resid_post", 1)).attach(model):
        dropped = logits(model)
    close(dropped, logits(model))


def test_nothing_is_asked_after_the_first_pass_of_a_kind():
    model = tiny_model("llama")
    with Add(Site("mlp_out", 1)).attach(model) as attachment:
        logits(model)
        assert attachment._watch.due == set()
        attachment._watch.hooks[False][0][0].fired = None
        logits(model)
    assert attachment._watch.hooks[False][0][0].fired is True


# Threads


def in_thread(function):
    """What a function returns or raises in a thread of its own."""
    found = SimpleNamespace(value=None, error=None)

    def run():
        try:
            found.value = function()
        except Exception as error:
            found.error = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    return found


def test_a_second_thread_beside_a_running_pass_is_refused():
    model, errors = tiny_model("llama"), []
    reading = lambda *_: errors.append(in_thread(lambda: logits(model, IDS[:, :3])).error)  # noqa: E731
    with Add(Site("resid_post", 1)).attach(model):
        expected = logits(model)
        handle = model.model.layers[0].register_forward_hook(reading)
        close(logits(model), expected, 0)
        handle.remove()
        close(in_thread(lambda: logits(model)).value, expected, 0)
    assert [type(error) for error in errors] == [UnsupportedStrategyError]
    assert "Another thread is running a pass" in str(errors[0])


def test_a_pass_that_failed_is_over():
    model = tiny_model("llama")
    with Add(Site("resid_post", 1)).attach(model):
        expected = logits(model)
        handle = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        close(in_thread(lambda: logits(model)).value, expected, 0)


def test_a_generation_may_not_go_on_after_another_threads_prompt():
    model = tiny_model("llama")
    short, long = IDS[:, :3], IDS
    with Add(Site("resid_post", 1), positions=Generated()).attach(model), torch.no_grad():
        cache = cache_of(model(short, use_cache=True))
        assert in_thread(lambda: logits(model, long)).error is None
        with pytest.raises(UnsupportedStrategyError, match="Another thread has begun a text of its own"):
            model(short[:, :1], **cache_argument(model, cache))
        cache = cache_of(model(short, use_cache=True))  # a new beginning
        model(short[:, :1], **cache_argument(model, cache))


def test_one_thread_may_hand_a_text_to_another():
    model = tiny_model("llama")
    with Add(Site("resid_post", 1), positions=Last()).attach(model), torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(in_thread(lambda: model.generate(IDS, max_new_tokens=4, do_sample=False)).value, expected)
        cache = cache_of(model(IDS, use_cache=True))
        assert in_thread(lambda: model(IDS[:, :1], **cache_argument(model, cache))).error is None


def test_many_threads_are_right_or_refused():
    gate, refused = OneThread(), []
    prompt, start = SimpleNamespace(past=0), threading.Barrier(8)

    def passes():
        start.wait()
        for _ in range(200):
            try:
                gate.enter(prompt)
            except UnsupportedStrategyError:
                refused.append(True)
                continue
            assert gate.owner is threading.current_thread()
            gate.running = False
        return True

    threads = [threading.Thread(target=passes) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not gate.running


# Hooks that are set aside


def test_suspended_hooks_do_nothing_and_new_ones_act():
    model, capture = tiny_model("llama"), ActivationCapture([Site("resid_post", 1)], keep="all")
    plain = logits(model)
    with Add(Site("resid_post", 0)).attach(model), capture.attach(model):
        changed = logits(model)
        with suspended(model):
            close(logits(model), plain, 0)
            with Add(Site("resid_post", 1), -VECTOR).attach(model):
                assert (logits(model) != plain).any()
        close(logits(model), changed, 0)
    assert len(capture.history[Site("resid_post", 1)]) == 2


def test_hooks_come_back_after_an_error_and_grafts_are_set_aside_too():
    recipient, donor = tiny_pair("gpt2")
    plain = logits(recipient)
    with Graft(donor, GraftPlan.whole()).attach(recipient):
        with suppress(ZeroDivisionError), suspended(recipient):
            close(logits(recipient), plain, 0)
            with Graft(donor, GraftPlan.at(Last(), "FFN")).attach(recipient):
                assert (logits(recipient) != logits(donor)).any()
            raise ZeroDivisionError
        close(logits(recipient), logits(donor), 0)
    close(logits(recipient), plain, 0)


@pytest.mark.parametrize("other", ["generate", "forward"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_second_thread_beside_a_generation_is_refused(other, use_cache):
    model, errors, how = tiny_model("llama"), [], {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache}
    ask = {"generate": lambda: model.generate(IDS[:, :3], **how), "forward": lambda: logits(model, IDS[:, :3])}[other]

    def between(ids, scores):  # after a pass of the generation, before the next one
        errors.append(in_thread(ask).error)
        return scores

    with Add(Site("resid_post", 1), positions=Generated()).attach(model):
        expected = model.generate(IDS, **how)
        assert torch.equal(model.generate(IDS, logits_processor=[between], **how), expected)
        assert in_thread(ask).error is None
    assert [type(error) for error in errors] == [UnsupportedStrategyError] * 3
    assert "Another thread generates" in str(errors[0])
