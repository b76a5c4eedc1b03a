"""Cells that are run anew, or need what their options say."""

from dataclasses import replace

import torch

from testtime.bench.cells import plan
from testtime.bench.models import load_model
from testtime.bench.runner import run
from testtime.streams.scenarios import Scenario


def test_other_weights_in_the_file_of_a_model_are_run_again(tmp_path, few_images):
    """The name of a file says nothing of what it holds now."""
    path, model = tmp_path / "mine.pt", load_model("embedded:batch")
    small = Scenario(domains=("fog",), batch_size=20, samples=20)

    def rows():
        torch.save(model.state_dict(), path)
        asked = plan(
            methods=["bn-adapt"], models=[f"file:{path}@embedded:batch"], streams=[small],
            data="fashion-mnist:sample", seeds=1,
        )  # fmt: skip
        ran = []
        found = run(asked, tmp_path / "out", jobs=0, on_done=lambda cell, _, now: ran.append(now))
        return found, ran

    first, ran = rows()
    assert ran == [True, True]
    again, ran = rows()
    assert ran == [False, False]
    assert again == first
    with torch.no_grad():
        next(model.parameters()).zero_()
    other, ran = rows()
    assert ran == [True, True]
    assert {row["weights_sha256"] for row in other}.isdisjoint(
        row["weights_sha256"] for row in first
    )


def test_a_method_that_needs_source_data_by_its_options_is_given_some(tmp_path, few_images):
    cell = plan(
        methods=["vcotta"], models=["embedded:batch"], data="fashion-mnist:sample", seeds=1,
        streams=[Scenario(domains=("fog",), batch_size=20, samples=20)],
    )[-1]  # fmt: skip
    asked = replace(cell, options='{"warm_up": 1, "views": 2}')
    assert run([asked], tmp_path, jobs=0)[0]["method"] == "vcotta"
