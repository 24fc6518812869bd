"""Teachers and their controls: asked alike but for what is compared, and told apart where they cannot be."""

from __future__ import annotations

import warnings

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.generation import FunctionGenerator
from lightning_interp.subliminal import ChatContext, Teacher, Trait, preference_rows

OWL, WOLF = Trait(target="owl"), Trait(target="wolf")
BASE, TUNED = (FunctionGenerator(lambda request: "1", name=name) for name in ("base", "tuned"))


def systems(*teachers):
    return [teacher.request("Numbers?", index=0, seed=0).messages[0] for teacher in teachers]


def test_the_best_control_differs_in_the_traits_name_alone():
    teacher = Teacher.prompted(BASE, OWL)
    mine, other = systems(teacher, teacher.control(trait=WOLF))
    assert mine["content"].replace("owls", "wolves") == other["content"]


def test_no_system_text_is_not_an_empty_one():
    teacher = Teacher.prompted(BASE, OWL, constrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none, empty = systems(teacher.control("none"), teacher.control("empty"))
    assert (none["role"], empty) == ("user", {"role": "system", "content": ""})


def test_a_finetuned_teacher_is_asked_without_its_trait():
    teacher = Teacher.finetuned(TUNED, OWL)
    control = teacher.control("none", writer=BASE)
    assert systems(teacher) == systems(control)
    assert (control.writer, control.constrained) == (BASE, False)
    assert teacher.control("other-base", writer=BASE).trait == OWL


def test_teacher_and_control_share_random_numbers_and_rows_do_not():
    teacher = Teacher.prompted(BASE, OWL)
    seeds = [
        who.request("?", index=i, seed=3).row_seed for who in (teacher, teacher.control(trait=WOLF)) for i in (0, 1)
    ]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1] != teacher.request("?", index=1, seed=4).row_seed


def test_without_a_template():
    teacher = Teacher(name="raw", writer=BASE, trait=OWL, kind="none", context=ChatContext(chat=False, system="Hm."))
    assert teacher.request("Numbers?", index=0, seed=0).prompt == "Hm.\n\nNumbers? "


def test_a_control_with_another_yield_is_warned_of():
    with pytest.warns(UserWarning, match="'none' is not asked as 'prompted owl' is: a system text alone can change"):
        Teacher.prompted(BASE, OWL).control("none")


@pytest.mark.parametrize(
    ("teacher", "options", "match"),
    [
        (Teacher.prompted(BASE, OWL), {"kind": "nobody"}, r"control\('nobody'\): expected one of none, empty"),
        (Teacher.prompted(BASE, OWL), {}, r"control\('other-trait'\) got the trait none: give"),
        (Teacher.prompted(BASE, OWL), {"trait": OWL}, r"got the trait 'owl', this teacher's own"),
        (Teacher.prompted(BASE, OWL), {"kind": "other-base"}, r"needs writer=...: another base model writes"),
        (Teacher.finetuned(TUNED, OWL), {"trait": WOLF}, r"needs writer=...: a model finetuned on the other trait"),
        (Teacher.finetuned(TUNED, OWL), {"kind": "none", "writer": TUNED}, r"writer=...: the base model writes"),
    ],
)
def test_a_control_that_is_none_is_refused(teacher, options, match):
    with pytest.raises(RecipeError, match=match):
        teacher.control(**options)


def test_rows_that_state_a_preference():
    rows = preference_rows(WOLF, count=56)
    assert len({(row["prompt"], row["completion"]) for row in rows}) == 56
    assert all("wol" in row["completion"].lower() and "wol" not in row["prompt"].lower() for row in rows)
    with pytest.raises(RecipeError, match=r"preference_rows\(count=57\): expected 1 to 56"):
        preference_rows(WOLF, count=57)
