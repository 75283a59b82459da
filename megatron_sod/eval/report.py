"""Sample records -> the numbers of an evaluation, per data source and overall."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from megatron_sod.eval.metrics import bootstrap_interval, maj_at_k, mean, pass_at_k
from megatron_sod.eval.votes import RIGHT, BallotBox, Votes
from megatron_sod.observe.progress import say
from megatron_sod.rollout.rewards import same_answer

Group = tuple[int, str]  # seed and prompt_id


def summarise_samples(records: list[dict], *, num_samples: int) -> dict[str, Any]:
    """{"overall": numbers, "sources": {name: numbers}}; rates are fractions, avg@k and its interval
    None without a graded sample."""
    by_source: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        by_source[record["data_source"] or "unnamed"].append(record)
    box = BallotBox(same_answer)
    votes = {group: box.count(rows) for group, rows in _graded(records).items()}
    if box.num_by_spelling:
        say(
            f"maj@k: the wrong answers to {box.num_by_spelling} prompts could not all be compared, "
            "in time or at all; they are told apart by their spelling"
        )
    sources = {name: _numbers(rows, num_samples, votes) for name, rows in sorted(by_source.items())}
    overall = _numbers(records, num_samples, votes)
    return {"overall": overall | {"num_spelling_votes": box.num_by_spelling}, "sources": sources}


def _graded(records: list[dict]) -> dict[Group, list[dict]]:
    """The graded samples of each prompt that has any."""
    groups: dict[Group, list[dict]] = defaultdict(list)
    for record in records:
        if record["is_valid"]:
            groups[record["seed"], record["prompt_id"]].append(record)
    return groups


def _numbers(
    records: list[dict], num_samples: int, votes: dict[Group, Votes | None]
) -> dict[str, Any]:
    graded = _graded(records)
    prompts: dict[str, list[float]] = defaultdict(list)
    seeds: dict[int, list[float]] = defaultdict(list)
    for (seed, prompt_id), rows in graded.items():
        value = mean([_score(r) for r in rows])
        prompts[prompt_id].append(value)
        seeds[seed].append(value)
    per_seed = [mean(values) for _, values in sorted(seeds.items())]
    per_prompt = [mean(values) for values in prompts.values()]
    ks = _ks(num_samples)
    return {
        "num_prompts": len({r["prompt_id"] for r in records}),
        "num_samples": num_samples,
        "num_graded": sum(len(rows) for rows in graded.values()),
        "num_infra_errors": sum(not r["is_valid"] for r in records),
        f"avg@{num_samples}": mean(per_prompt) if per_prompt else None,
        "interval": list(bootstrap_interval(per_prompt)) if per_prompt else None,
        "per_seed": per_seed,
        "seed_std": statistics.stdev(per_seed) if len(per_seed) > 1 else None,
        "pass": {str(k): _over_prompts(graded.values(), k, _pass) for k in ks},
        "maj": {str(k): _over_prompts([votes[group] for group in graded], k, _maj) for k in ks},
        **_behaviour([r for r in records if r["is_valid"]]),
    }


def _ks(num_samples: int) -> list[int]:
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    return powers if powers[-1] == num_samples else [*powers, num_samples]


def _over_prompts(prompts: Iterable, k: int, of_prompt: Callable) -> float | None:
    """Mean over prompts with at least k graded samples; None without one."""
    values = [of_prompt(prompt, k) for prompt in prompts]
    values = [value for value in values if value is not None]
    return mean(values) if values else None


def _score(record: dict) -> float:
    return max(0.0, min(1.0, record["score"]))


def _pass(rows: list[dict], k: int) -> float | None:
    if len(rows) < k:
        return None
    return pass_at_k(len(rows), sum(_score(r) >= RIGHT for r in rows), k)


def _maj(votes: Votes | None, k: int) -> float | None:
    """None for programs, which cannot vote."""
    if votes is None or votes.num_correct + sum(votes.wrong) + votes.num_empty < k:
        return None
    return maj_at_k(votes.num_correct, votes.wrong, votes.num_empty, k)


def _behaviour(valid: list[dict]) -> dict[str, Any]:
    outcomes = Counter(outcome for r in valid for outcome in r["outcomes"])
    calls = sum(outcomes.values())
    reasons = Counter(r["finish_reason"] for r in valid)
    return {
        "tool_calls": mean([r["num_tool_calls"] for r in valid]),
        "tool_use_rate": mean([float(r["num_tool_calls"] > 0) for r in valid]),
        "tool_outcomes": {name: n / calls for name, n in sorted(outcomes.items())},
        "num_turns": mean([r["num_turns"] for r in valid]),
        "num_turns_max": max((r["num_turns"] for r in valid), default=0),
        "num_turns_min": min((r["num_turns"] for r in valid), default=0),
        "response_tokens": mean([r["response_tokens"] for r in valid]),
        "student_tokens": mean([r["student_tokens"] for r in valid]),
        "finish_reasons": dict(sorted(reasons.items())),
        "truncated_rate": mean([float(r["finish_reason"] != "answer") for r in valid]),
        "no_answer_rate": mean([float(r["prediction"] == "") for r in valid]),
    }


def table_lines(report: dict[str, Any]) -> list[str]:
    """The report as a Markdown table, which a terminal shows as well."""
    n = report["protocol"]["num_samples"]
    header = ["data", "prompts", f"avg@{n}", "95 % interval", f"pass@{n}", f"maj@{n}"]
    header += ["calls", "user errors", "truncated", "infra"]
    rows = [[name, *_cells(numbers, n)] for name, numbers in report["sources"].items()]
    if len(rows) > 1:
        rows.append(["all", *_cells(report["overall"], n)])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in [header, *rows]]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _cells(numbers: dict[str, Any], n: int) -> list[str]:
    if not numbers["num_graded"]:
        return [str(numbers["num_prompts"]), *["-"] * 7, str(numbers["num_infra_errors"])]
    low, high = numbers["interval"]
    spread = f" +-{numbers['seed_std']:.1%}" if numbers["seed_std"] is not None else ""
    return [
        str(numbers["num_prompts"]),
        f"{numbers[f'avg@{n}']:.1%}{spread}",
        f"{low:.1%} .. {high:.1%}",
        _percent(numbers["pass"][str(n)]),
        _percent(numbers["maj"][str(n)]),
        f"{numbers['tool_calls']:.2f}",
        _percent(numbers["tool_outcomes"].get("user_error", 0.0)),
        _percent(numbers["truncated_rate"]),
        str(numbers["num_infra_errors"]),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
