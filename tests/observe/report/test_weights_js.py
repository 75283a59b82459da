"""The page weighs steps exactly as megatron_sod.algorithm.step_weights does.

Layer: node runs the page's own file; where node is not installed, test_browser.py compares the
same cases in Chromium.
"""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from megatron_sod.observe.report.page import HERE
from tests.observe.report.weight_cases import CASES, assert_same_weights, case_inputs, expected

NODE = shutil.which("node")
RUN_CASES = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const out = input.cases.map((options) => Array.from(reweigh(fake(input.run), options),
  (w) => (Number.isNaN(w) ? null : w)));
console.log(JSON.stringify(out));
function fake(run) {
  const nan = (v) => (v === null ? NaN : v);
  return { size: run.start.length - 1, iteration: Int32Array.from(run.iteration),
    d: Float32Array.from(run.d, nan), outcome: Uint8Array.from(run.outcome), wrong: run.wrong,
    steps: (i) => [run.start[i], run.start[i + 1]] };
}
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_page_weighs_as_the_trainer_does():
    source = (HERE / "data.js").read_text() + (HERE / "weights.js").read_text() + RUN_CASES
    source = source.replace('"use strict";', "")
    run = case_inputs()
    sent = json.dumps({"run": run, "cases": CASES})
    done = subprocess.run(
        [NODE, "-e", source], input=sent, capture_output=True, text=True, timeout=60, check=True
    )
    for options, answer in zip(CASES, json.loads(done.stdout), strict=True):
        weights = np.array([math.nan if w is None else w for w in answer])
        assert_same_weights(weights, expected(run, options), options)


def test_the_page_offers_every_policy_there_is():
    from megatron_sod.algorithm.step_weights import STEP_WEIGHTS

    line = next(
        line for line in (HERE / "weights.js").read_text().splitlines() if "POLICIES =" in line
    )
    assert set(json.loads(line.split("=")[1].strip(" ;"))) == set(STEP_WEIGHTS)
