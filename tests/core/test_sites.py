"""Names of places: what is accepted, what is refused, and how it is written."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.model.sites import GLOBAL_KINDS, LAYER_KINDS, Site
from lightning_interp.errors import SiteError

LAYERS = st.integers(-200, 200)
SITES = st.one_of(
    st.builds(Site, st.sampled_from(LAYER_KINDS), LAYERS),
    st.builds(Site, st.sampled_from(GLOBAL_KINDS)),
    st.builds(Site, st.sampled_from(["linear:q", "linear:gate_up", "linear:ln_attn"]), LAYERS),
    st.builds(Site, st.sampled_from(["linear:embed", "linear:unembed"])),
)


@given(SITES)
def test_text_round_trip(site):
    assert Site.parse(str(site)) == site
    assert pickle.loads(pickle.dumps(site)) == site  # noqa: S301


@given(SITES, SITES)
def test_a_site_is_a_key(one, two):
    assert (one == two) == (str(one) == str(two))
    assert len({one, two}) == 1 + (one != two)


def test_component_of_linear_sites_only():
    assert Site("linear:q", 3).component == "q"
    assert Site("resid_post", 3).component is None
    assert Site("logits").component is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site("residual", 1), r"Unknown site kind 'residual'.*resid_pre, resid_post, .*linear:<component>"),
        (lambda: Site("linear", 1), "Unknown site kind 'linear'"),
        (lambda: Site("mlp_out"), r"Site 'mlp_out' needs a layer, as in Site\('mlp_out', 0\)"),
        (lambda: Site("logits", 2), r"Site 'logits' has no layers, but got layer=2"),
        (lambda: Site("resid_post", "3"), r"Site 'resid_post' has layer='3'; expected an index"),
        (lambda: Site("linear:q", 1.5), r"Site 'linear:q' has layer=1\.5; expected an index"),
        (lambda: Site("resid_post", True), r"Site 'resid_post' has layer=True; expected an index"),
        (lambda: Site("linear:"), r"Site 'linear:' names no component"),
        (lambda: Site.parse("resid_post.x"), r"Cannot read a site from 'resid_post\.x'"),
        (lambda: Site.parse("resid.1"), "Unknown site kind 'resid'"),
        (lambda: Site.parse("resid_post.1.5"), r"Unknown site kind 'resid_post\.1'"),
        (lambda: Site.parse(""), "Unknown site kind ''"),
    ],
)
def test_refused(make, message):
    with pytest.raises(SiteError, match=message):
        make()
