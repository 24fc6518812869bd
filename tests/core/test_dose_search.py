"""The search for doses against brute force, in as few trainings as halving takes, and what it does with odd scores."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.cycles import calibrate_dose, dose_grid
from lightning_interp.errors import DataError, RecipeError


def estimate(value, error=1.0):
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, 12, 0.95, "test")


class Trainer:
    """Scores by dose, and which were asked for."""

    def __init__(self, scores, error=1.0):
        self.scores, self.error, self.trained = scores, error, []

    def __call__(self, dose):
        self.trained.append(dose)
        return estimate(self.scores[dose], self.error)


def brute_force(grid, scores, threshold):
    return next((dose for dose in grid if scores[dose] >= threshold), None)


@st.composite
def rising(draw, least=1, most=60):
    n = draw(st.integers(least, most))
    steps = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    grid = dose_grid(draw(st.integers(1, 4)), 10**6)[:n]
    return grid, dict(zip(grid, np.cumsum(steps).astype(float).tolist(), strict=True))


class TestSearch:
    @given(rising(), st.lists(st.integers(-5, 1500), min_size=1, max_size=6, unique=True))
    def test_finds_what_brute_force_finds(self, made, thresholds):
        grid, scores = made
        trainer = Trainer(scores)
        found = calibrate_dose(trainer, grid, thresholds=thresholds)
        for threshold in thresholds:
            wanted = brute_force(grid, scores, threshold)
            assert found.reached[threshold] == (wanted is not None)
            assert found.doses[threshold] == (grid[-1] if wanted is None else wanted)
        assert list(found.doses) == sorted(thresholds)
        assert len(trainer.trained) == len(set(trainer.trained)), "a dose was trained twice"
        assert found.warnings == ()
        assert {dose: each.value for dose, each in found.scored.items()} == {
            dose: scores[dose] for dose in sorted(trainer.trained)
        }

    @given(rising(least=8, most=200), st.integers(0, 3000))
    def test_halves_what_is_left(self, made, threshold):
        grid, scores = made
        trainer = Trainer(scores)
        calibrate_dose(trainer, grid, thresholds=[threshold])
        assert len(trainer.trained) <= math.floor(math.log2(len(grid))) + 1

    @given(rising(least=8, most=200), st.lists(st.integers(0, 3000), min_size=2, max_size=5, unique=True))
    def test_thresholds_share_trainings(self, made, thresholds):
        grid, scores = made
        together, apart = Trainer(scores), 0
        calibrate_dose(together, grid, thresholds=thresholds)
        for threshold in thresholds:
            alone = Trainer(scores)
            calibrate_dose(alone, grid, thresholds=[threshold])
            apart += len(alone.trained)
        assert len(together.trained) <= apart

    def test_the_authors_grid_and_thresholds(self):
        scores = {n: 100 / (1 + math.exp(-(n - 60) / 10)) for n in dose_grid()}
        trainer = Trainer(scores)
        found = calibrate_dose(trainer)
        assert found.doses == {t: brute_force(dose_grid(), scores, t) for t in (5, 20, 40, 60, 80)}
        assert len(dose_grid()) == 100
        assert len(trainer.trained) == len(found.scored) <= 20

    def test_a_short_grid_is_scanned_from_below(self):
        trainer = Trainer({n: float(n) for n in range(1, 8)})
        found = calibrate_dose(trainer, range(1, 8), thresholds=[3, 4])
        assert trainer.trained == [1, 2, 3, 4]
        assert found.doses == {3: 3, 4: 4}

    def test_one_of_eight_is_halved(self):
        trainer = Trainer({n: float(n) for n in range(1, 9)})
        calibrate_dose(trainer, range(1, 9), thresholds=[3])
        assert trainer.trained[0] == 4

    @pytest.mark.parametrize("n", [7, 40])
    def test_what_is_never_reached_takes_the_largest(self, n):
        found = calibrate_dose(Trainer(dict.fromkeys(range(1, n + 1), 3.0)), range(1, n + 1), thresholds=[2, 5, 90])
        assert found.doses == {2: 1, 5: n, 90: n}
        assert found.reached == {2: True, 5: False, 90: False}
        assert {row["chosen for"] for row in found.rows()} == {"2", ""}

    @pytest.mark.filterwarnings("ignore:n_seed")
    @given(
        st.lists(st.integers(0, 100), min_size=1, max_size=60), st.lists(st.integers(0, 110), min_size=1, unique=True)
    )
    def test_scores_in_any_order_still_give_doses_that_do_what_is_said(self, scores, thresholds):
        scores = dict(enumerate(map(float, scores), start=1))
        trainer = Trainer(scores)
        found = calibrate_dose(trainer, list(scores), thresholds=thresholds)
        assert all((scores[found.doses[t]] >= t) == found.reached[t] for t in thresholds)
        chosen = [dose for t, dose in found.doses.items() if found.reached[t]]
        assert chosen == sorted(chosen)
        assert set(trainer.trained) == set(found.scored)


class TestResume:
    def test_known_scores_are_not_trained_again(self):
        scores = {n: float(n) for n in dose_grid()}
        first = Trainer(scores)
        whole = calibrate_dose(first)
        for cut in range(len(first.trained) + 1):
            rest = Trainer(scores)
            again = calibrate_dose(rest, known={dose: estimate(scores[dose]) for dose in first.trained[:cut]})
            assert again == whole
            assert rest.trained == first.trained[cut:]

    def test_a_search_whose_scores_are_phases_goes_on_where_it_was_stopped(self, tmp_path):
        scores = {n: float(n) for n in dose_grid()}
        whole = calibrate_dose(Trainer(scores))

        def search(most):
            trainer = Trainer(scores)

            def trained(folder, dose):
                if len(trainer.trained) == most:
                    raise KeyboardInterrupt
                return trainer(dose).to_dict()

            with RunManifest.open(tmp_path / "run", config={}, name="dose") as run:

                def score(dose):
                    return Estimate(**run.phase(f"dose-{dose}", lambda folder: trained(folder, dose), inputs={}))

                return trainer.trained, calibrate_dose(score)

        with pytest.raises(KeyboardInterrupt):
            search(3)
        trained, found = search(-1)
        assert found == whole
        assert len(trained) == len(whole.scored) - 3

    def test_known_scores_off_the_grid_are_kept(self):
        found = calibrate_dose(Trainer({2: 2.0, 4: 4.0}), [2, 4], thresholds=[3], known={3: estimate(3.0)})
        assert found.doses == {3: 4}
        assert list(found.scored) == [2, 3, 4]


class TestOddScores:
    def test_a_larger_dose_that_scored_clearly_less_is_told(self):
        with pytest.warns(UserWarning, match="n_seed=3 scored 10, more than two standard errors below 20 at n_seed=2"):
            found = calibrate_dose(Trainer({1: 0.0, 2: 20.0, 3: 10.0}), [1, 2, 3], thresholds=[15, 30])
        assert len(found.warnings) == 1
        assert [row["n_seed"] for row in found.rows()] == [1, 2, 3]
        assert found.rows()[1] == {
            "n_seed": 2, "score": 20.0, "low": pytest.approx(18.04), "high": pytest.approx(21.96), "n": 12,
            "chosen for": "15",
        }  # fmt: skip

    def test_noise_is_not(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calibrate_dose(Trainer({1: 0.0, 2: 20.0, 3: 18.0}), [1, 2, 3], thresholds=[15, 30])  # 2 < 2 sqrt(2)

    def test_no_score(self):
        with pytest.raises(DataError, match=r"n_seed=1 has the score nan"):
            calibrate_dose(lambda dose: estimate(math.nan), [1, 2], thresholds=[5])

    def test_without_an_interval_nothing_is_told(self):
        bare = {1: Estimate(9.0, math.nan, math.nan, 1, 0.95, ""), 2: Estimate(1.0, math.nan, math.nan, 1, 0.95, "")}
        assert calibrate_dose(bare.__getitem__, [1, 2], thresholds=[5, 20]).warnings == ()


class TestErrors:
    @pytest.mark.parametrize("grid", [[], [2, 2], [4, 2]])
    def test_grid(self, grid):
        with pytest.raises(RecipeError, match=r"grid=\[.*expected doses in rising order"):
            calibrate_dose(Trainer({}), grid)

    def test_thresholds(self):
        with pytest.raises(RecipeError, match=r"thresholds=\(\)"):
            calibrate_dose(Trainer({}), [2], thresholds=())

    @pytest.mark.parametrize(("step", "largest"), [(0, 5), (4, 3)])
    def test_step(self, step, largest):
        with pytest.raises(RecipeError, match=rf"step={step}, largest={largest}"):
            dose_grid(step, largest)
