"""The toy of auxiliary outputs: its numbers, and that models which train at once train alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_interp.core.measure.statistics import t_interval
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal import toy
from lightning_interp.subliminal.toy import MNIST, STUDENTS, ToySettings, ToyTask, gaussian_task, run_toy

AUX = ("student(aux)", "cross(aux)")
FEW = ToySettings(models=2, hidden=[16], auxiliary=3, teacher_epochs=1, student_epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def small():
    return gaussian_task(train=96, test=50, width=12)


class TestWhatIsLearned:
    def test_a_student_of_the_same_start_learns_classes_from_noise_and_another_does_not(self):
        task = gaussian_task(train=2048, test=300)
        settings = ToySettings(models=3, hidden=[64, 48], teacher_epochs=10, student_epochs=15, lr=1e-3)
        found = run_toy(task, settings, students=AUX).estimates()
        assert found["teacher"].value > 0.95
        assert found["student(aux)"].value > 0.4
        assert found["cross(aux)"].value < 0.2

    @pytest.mark.slow
    def test_thresholds_of_the_default(self):
        found = run_toy(gaussian_task(), ToySettings(models=4), students=AUX).estimates()
        assert found["teacher"].value > 0.98
        assert found["student(aux)"].value > 0.5
        assert found["cross(aux)"].value < 0.2


class TestTraining:
    def test_a_model_is_trained_as_if_it_were_alone(self, small):
        """Against an ordinary net with torch's own layers, losses and batches of one model."""
        two, three = (run_toy(small, replace(FEW, models=m), students=["student(all)"]) for m in (2, 3))
        for arm in ("reference", "teacher"):
            assert torch.equal(two.accuracy[arm], three.accuracy[arm][:2])
        weights = toy._initial([12, 16, 13], FEW)
        trained = {}

        def spy(start, inputs, loss, purpose, settings, epochs=toy._epochs):
            for found in epochs(start, inputs, loss, purpose, settings):
                trained[purpose] = found, inputs
                yield found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy, "_epochs", spy)
            run_toy(small, FEW, students=["student(aux)"])
        nets = []
        for _ in range(2):  # a teacher, a student
            nets.append(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 13)))
            with torch.no_grad():
                for part, weight, bias in ((0, *weights[:2]), (2, *weights[2:])):
                    nets[-1][part].weight.copy_(weight[1].T)
                    nets[-1][part].bias.copy_(bias[1, 0])
        teacher, student = nets
        for purpose, own in (("teacher", teacher), ("student", student)):
            found, inputs = trained[purpose]
            optimizer = torch.optim.Adam(own.parameters(), lr=FEW.lr)
            order = torch.randperm(96, generator=toy._generator(0, purpose, 0))
            for rows in order.split(32):
                outputs = own(inputs[rows])
                if purpose == "teacher":
                    loss = nn.functional.cross_entropy(outputs[:, :10], small.labels[rows])
                else:
                    wanted = teacher(inputs[rows])[:, 10:].log_softmax(-1).detach()
                    loss = (wanted.exp() * (wanted - outputs[:, 10:].log_softmax(-1))).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for part, (weight, bias) in ((0, found[:2]), (2, found[2:])):
                torch.testing.assert_close(weight[1].T, own[part].weight.detach(), atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(bias[1, 0], own[part].bias.detach(), atol=1e-6, rtol=1e-5)

    def test_cross_begins_as_the_next_model_in_a_circle(self, small, monkeypatch):
        starts, epochs = [], toy._epochs
        monkeypatch.setattr(toy, "_epochs", lambda start, *rest: [*epochs(start, *rest), starts.append(start[0])][:-1])
        run_toy(small, replace(FEW, models=3), students=AUX)
        teacher, student, cross = starts
        assert torch.equal(student, teacher)
        assert torch.equal(cross, teacher[[1, 2, 0]])

    def test_same_seed_same_numbers_and_global_state_is_left_alone(self, small):
        state = torch.get_rng_state()
        one, two = (run_toy(small, FEW) for _ in range(2))
        assert torch.equal(state, torch.get_rng_state())
        assert list(one.accuracy) == ["reference", "teacher", *STUDENTS]
        assert all(torch.equal(one.accuracy[arm], two.accuracy[arm]) for arm in one.accuracy)
        other = run_toy(small, replace(FEW, seed=1))
        assert any(not torch.equal(one.accuracy[arm], other.accuracy[arm]) for arm in one.accuracy)

    def test_epochs_are_told(self, small):
        told = []
        run_toy(small, replace(FEW, student_epochs=2), students=AUX, advance=told.append)
        assert told == [1] * 5

    def test_a_carrier_of_ones_own(self, small):
        own = ToyTask(small.inputs, small.labels, small.test_inputs, small.test_labels, carrier=small.inputs[:40])
        arm = "student(all)"
        assert not torch.equal(
            run_toy(own, FEW, students=[arm]).accuracy[arm], run_toy(small, FEW, students=[arm]).accuracy[arm]
        )


def test_the_table_has_an_interval_over_models(small):
    found = run_toy(small, FEW, students=AUX[:1])
    row = found.table()[1]
    expected = t_interval(found.accuracy["teacher"].tolist())
    assert row == {"arm": "teacher", "accuracy": str(expected), "models": 2}
    assert {arm: tuple(curve.shape) for arm, curve in found.curves.items()} == {
        "reference": (1, 2), "teacher": (1, 2), "student(aux)": (1, 2),
    }  # fmt: skip


def test_the_shape_of_the_original():
    assert [
        tuple(x.shape) for x in toy._initial([784, *MNIST.hidden, 10 + MNIST.auxiliary], replace(MNIST, models=2))
    ] == [*((2, 784, 256), (2, 1, 256), (2, 256, 256), (2, 1, 256), (2, 256, 13), (2, 1, 13))]
    assert (MNIST.models, MNIST.teacher_epochs, MNIST.student_epochs, MNIST.batch_size) == (100, 5, 5, 1024)


class TestErrors:
    @pytest.mark.parametrize("wrong", [{"models": 1}, {"auxiliary": 0}, {"hidden": [0]}, {"lr": 0.0}])
    def test_settings(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(RecipeError, match=rf"{name}=.*{value if name != 'hidden' else 0}.*at least 2 models"):
            ToySettings(**wrong)

    def test_inputs(self, small):
        with pytest.raises(DataError, match=r"ToyTask\(carrier\) of shape \[5, 11\]: expected finite \[n, 12\]"):
            replace(small, carrier=torch.zeros(5, 11))
        with pytest.raises(DataError, match=r"ToyTask\(inputs\) of shape \[96, 12\]"):
            replace(small, inputs=small.inputs / 0)

    def test_labels(self, small):
        with pytest.raises(DataError, match=r"ToyTask\(labels\) are torch.int64 \[5\]: expected 96 classes"):
            replace(small, labels=small.labels[:5])
        with pytest.raises(DataError, match=r"ToyTask\(test_labels\) are torch.float32"):
            replace(small, test_labels=small.test_labels.float())

    def test_students(self, small):
        with pytest.raises(RecipeError, match=r"students=\['foreign'\]"):
            run_toy(small, FEW, students=["foreign"])
