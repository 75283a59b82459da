"""report.html from a small run directory made by hand.

Layer: pure, with files in a temporary folder. From a real run: tests/end_to_end.
"""

import html
import json
from html.parser import HTMLParser

import pytest

from megatron_sod.observe import report
from tests.helpers.tokenizers import tiny_tokenizer

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def _ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def _trajectory(iteration=1, **changes) -> dict:
    call, observation, answer = _ids("print(1)"), _ids(EVIL), _ids("done")
    steps = [1] * len(call) + [0] * len(observation) + [2] * len(answer)
    return {
        "iteration": iteration,
        "trajectory": f"tiny_world:train:1/{iteration}/0{EVIL}",
        "prompt_token_ids": _ids("question " + EVIL),
        "response_token_ids": call + observation + answer,
        "step_ids": steps,
        "log_ratios": [-2.5] + [0.75] * (len(call) + len(answer) - 1),
        "reward": 1.0,
        "finish_reason": "answer",
        "outcomes": ["user_error", "none"],
        "d": [0.3, 1.2],
        "w": [1.0, 0.25],
        **changes,
    }


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "demo"
    run.mkdir()
    metrics = [
        {"iteration": i, "rollout/reward_mean": i / 3, "sod/w_mean": 1.0, "sod/d_step_1": 0.2}
        for i in (1, 2, 3)
    ]
    _lines(run / "metrics.jsonl", metrics)
    evaluation = {"success": 0.5, "interval": [0.4, 0.6], "num_prompts": 9}
    _lines(
        run / "evals.jsonl",
        [
            {"model": "student", "iteration": 0, **evaluation},
            {"model": "teacher", "iteration": 0, **evaluation},
            {"model": "student", "iteration": 3, **evaluation},
        ],
    )
    _lines(run / "trajectories.jsonl", [_trajectory(i) for i in (1, 2, 3)])
    summary = {"student_before": 0.5, "student_before_interval": [0.4, 0.6], "method": EVIL}
    summary |= {"seed": 0, "iterations": 3, "tokens": 99, "wall_s": 1.5}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.fixture
def no_curves(monkeypatch):
    """Curves are half of a second; tests about the rest do without."""
    monkeypatch.setattr(report, "_curves", lambda metrics, evals: "<svg></svg>")


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def _page(run) -> Page:
    path = report.write_report(run, tiny_tokenizer())
    assert path == run / "report.html"
    return Page(path.read_text())


def test_the_report_shows_summary_curves_and_trajectories(run):
    page = _page(run)
    text = "".join(page.words)
    assert "demo" in text and "50.0 %" in text and "40.0 to 60.0 %" in text
    assert page.tags.count("svg") == 1
    assert "step 1" in text and "d 0.3" in text and "w 0.25" in text
    assert "print" in text and "user_error" in text


def test_hostile_text_is_shown_and_never_run(run, no_curves):
    page = _page(run)
    assert not {"script", "img", "iframe", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    source = (run / "report.html").read_text()
    assert EVIL not in source and html.escape("<script>") in source
    assert "".join(page.words).count("<script>alert(1)</script>") >= 4  # prompts and tool output


def test_the_report_needs_no_network(run):
    for name, value in _page(run).attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value is not None and value.startswith("#")


def test_only_the_first_and_the_last_iteration_are_shown(run, no_curves):
    text = "".join(_page(run).words)
    assert "iteration 1 -" in text and "iteration 3 -" in text and "iteration 2 -" not in text


def test_tokens_are_coloured_by_the_teachers_opinion(run, no_curves):
    styles = [value for name, value in _page(run).attributes if name == "style" and value]
    # strength 0.7 x min(|r| / 3, 1): 0.58 red for -2.5, 0.17 green (0.175) for +0.75
    assert any(style == "background:rgba(220,60,60,0.58)" for style in styles)
    assert any(style.startswith("background:rgba(40,160,80,0.1") for style in styles)
    titles = [value for name, value in _page(run).attributes if name == "title"]
    assert "log teacher/student -2.500" in titles


def test_a_run_that_stopped_early_still_has_a_report(run):
    for missing in ("summary.json", "evals.jsonl"):
        (run / missing).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rollout/rew')  # killed while it wrote
    assert "Curves" in "".join(_page(run).words)


def test_an_empty_run_still_has_a_report(tmp_path):
    assert "Trajectories" in "".join(_page(tmp_path).words)


def test_a_run_without_teacher_shows_steps_without_weights(run, no_curves):
    _lines(run / "trajectories.jsonl", [_trajectory(1, log_ratios=[], d=[], w=[])])
    text = "".join(_page(run).words)
    assert "step 2" in text and "d 0" not in text


def test_steps_without_a_divergence_are_shown_without_it(run, no_curves):
    _lines(run / "trajectories.jsonl", [_trajectory(1, d=[0.3, None], w=[1.0, None])])
    text = "".join(_page(run).words)
    assert "d 0.3" in text and "None" not in text
