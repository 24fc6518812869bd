"""Chains whose texts somebody else writes, who may fail."""

from __future__ import annotations

import pytest
from chains import chain, fitting, writing

from lightning_interp.errors import InterpError
from lightning_interp.generation import FunctionGenerator


@pytest.mark.filterwarnings("ignore:The run ended at")
def test_a_writer_that_fails_ends_the_chain_which_then_goes_on(tmp_path):
    asked, down = [], [True]

    def answer(request):
        if down[0] and len(asked) == 6:
            raise ConnectionError("nobody there")
        asked.append(request.digest)
        return f"Ho, {len(asked)}."

    def run():
        writer = lambda name, folder: FunctionGenerator(answer, name=name)  # noqa: E731
        return chain(tmp_path, cycles=2, phases=[writing(n=8, slices=2), fitting()], writer=writer).run()

    for _ in range(2):
        with pytest.raises(InterpError, match=r"2 of 8 texts of .*writer failed \('ConnectionError: nobody there'\)"):
            run()
    assert len(asked) == 6
    down[0] = False
    assert len(run()["cycles"]) == 2
    assert len(asked) == len(set(asked)) == 8
