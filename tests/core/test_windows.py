"""Windows of prompt and new tokens, and masks at the head, under padding, caches, beams and trimmed logits."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Generated, GenerationSteps, Last, Prompt, Span, StepContext
from lightning_interp.errors import PositionError
from lightning_interp.testing import byte_tokenizer, tiny_model


class Watch(Intervention):
    """Keep the mask of every pass at a site."""

    def __init__(self, positions, site):
        self.positions, self.site, self.masks = positions, site, []

    def sites(self, model_map):
        return [self.site]

    def transform(self, site, x, step):
        self.masks.append(step.choose(self.positions, x))
        return x


def prompts(texts=("ab", "abcd")):
    return byte_tokenizer()(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)


def watched(positions, site=None, new=3, **options):
    model, watch = tiny_model("llama"), Watch(positions, site or Site("resid_post", 0))
    with watch.attach(model):
        model.generate(**prompts(), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return [mask.tolist() for mask in watch.masks]


@pytest.mark.parametrize("site", [Site("resid_post", 0), Site("unembed_in")])
def test_windows_follow_a_generation(site):
    steps = watched(GenerationSteps(0, 2), site)
    generated = watched(Generated(1), site)
    # the first pass reads both prompts, left padded; the head sees its last column only
    head = site.kind == "unembed_in"
    assert steps[0] == ([[True]] * 2 if head else [[False, False, False, True]] * 2)
    assert steps[1:] == [[[True]] * 2, [[False]] * 2]
    assert not any(map(any, generated[0]))
    assert generated[1:] == [[[False]] * 2, [[True]] * 2]


def test_prompt_is_the_first_pass_of_a_generation():
    masks = watched(Prompt())
    assert masks == [[[False, False, True, True], [True] * 4], [[False]] * 2, [[False]] * 2]


def test_windows_under_beams():
    masks = watched(Generated(0, 1), num_beams=3)
    assert [len(mask) for mask in masks] == [6, 6, 6]
    assert masks[1:] == [[[True]] * 6, [[False]] * 6]


def test_prompt_lengths_tell_a_pass_over_prompt_and_answer():
    model, watch = tiny_model("llama"), Watch(Generated(0, 2), Site("resid_post", 0))
    with watch.attach(model) as attachment:
        attachment.prompt_lengths = torch.tensor([1, 2])
        model(**prompts())
        attachment.prompt_lengths = None
        attachment.batch = {"prompt_lengths": torch.tensor([2, 4])}
        model(**prompts())
    assert watch.masks[0].tolist() == [[False, False, False, True], [False, False, True, True]]
    assert not watch.masks[1].any()


def test_one_length_a_prompt_serves_its_beams():
    step = StepContext(4, 3, known_prompt_lengths=torch.tensor([1, 2]))
    assert step.prompt_lengths.tolist() == [1, 1, 2, 2]
    assert step.rows([1, 2]).prompt_lengths.tolist() == [1, 2]


def test_rows_of_a_decoding_step_know_their_prompt():
    prompt = StepContext(2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    step = StepContext(2, 1, 3, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), prompt=prompt)
    assert step.generation_steps.tolist() == [[1], [1]]
    assert step.rows([0]).prompt_lengths.tolist() == [2]


def test_a_decoding_step_without_its_prompt_is_an_error():
    with pytest.raises(PositionError, match="decoding step of 2 rows after 3 tokens"):
        Generated().mask(StepContext(2, 1, 3))


def test_prompt_lengths_of_another_batch_are_an_error():
    with pytest.raises(PositionError, match="prompt_lengths has 2 entries, but the pass has 3 rows"):
        Prompt().mask(StepContext(3, 2, known_prompt_lengths=torch.tensor([1, 2])))


@pytest.mark.parametrize("window", [(-1, None), (2, 2), (3, 1)])
@pytest.mark.parametrize("kind", [Generated, GenerationSteps])
def test_an_empty_window_is_an_error(kind, window):
    with pytest.raises(PositionError, match=rf"{kind.__name__}\(start={window[0]}, stop={window[1]}\)"):
        kind(*window)


@pytest.mark.parametrize("keep", [0, 1, 2, torch.tensor([0, 3]), torch.tensor([1])])
def test_masks_at_the_head_follow_the_logits_that_are_kept(keep):
    model = tiny_model("llama")
    for selector, columns in ((Last(), [3]), (Span(0, 2), [0, 1]), (All(), [0, 1, 2, 3])):
        watch = Watch(selector, Site("unembed_in"))
        with watch.attach(model):
            model(torch.arange(5, 9)[None], logits_to_keep=keep)
        seen = keep.tolist() if isinstance(keep, torch.Tensor) else list(range(4))[-keep:]
        assert watch.masks[0].tolist() == [[column in columns for column in seen]]


def test_a_call_without_trimming_forgets_the_one_before():
    model, watch = tiny_model("llama"), Watch(Span(0, 1), Site("unembed_in"))
    with watch.attach(model):
        model(torch.arange(5, 9)[None], logits_to_keep=torch.tensor([0]))
        model(torch.arange(5, 9)[None])
    assert [mask.tolist() for mask in watch.masks] == [[[True]], [[True, False, False, False]]]


def test_unembed_in_is_what_the_head_multiplies():
    from lightning_interp import ActivationCapture

    for family in ("llama", "gpt2", "gpt_neox", "opt"):
        model = tiny_model(family)
        capture = ActivationCapture([Site("unembed_in"), Site("logits")])
        with capture.attach(model):
            model(torch.arange(5, 9)[None])
        found = capture.activations
        with torch.no_grad():
            assert torch.equal(model.get_output_embeddings()(found[Site("unembed_in")]), found[Site("logits")])
