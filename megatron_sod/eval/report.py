"""Sample records -> the numbers of an evaluation, per data source and overall."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from typing import Any

from megatron_sod.eval.metrics import bootstrap_interval, maj_at_k, mean, pass_at_k

RIGHT = 1.0


def summarise_samples(records: list[dict], *, num_samples: int) -> dict[str, Any]:
    """{"overall": numbers, "sources": {name: numbers}}; rates are fractions, avg@k and its interval
    None without a graded sample."""
    by_source: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        by_source[record["data_source"] or "unnamed"].append(record)
    sources = {name: _numbers(rows, num_samples) for name, rows in sorted(by_source.items())}
    return {"overall": _numbers(records, num_samples), "sources": sources}


def _numbers(records: list[dict], num_samples: int) -> dict[str, Any]:
    groups: dict[tuple[int, str], list[dict]] = defaultdict(list)
    for record in records:
        groups[record["seed"], record["prompt_id"]].append(record)
    graded = {key: [r for r in rows if r["is_valid"]] for key, rows in groups.items()}
    graded = {key: rows for key, rows in graded.items() if rows}
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
        "num_prompts": len({prompt_id for _, prompt_id in groups}),
        "num_samples": num_samples,
        "num_graded": sum(len(rows) for rows in graded.values()),
        "num_infra_errors": sum(not r["is_valid"] for r in records),
        f"avg@{num_samples}": mean(per_prompt) if per_prompt else None,
        "interval": list(bootstrap_interval(per_prompt)) if per_prompt else None,
        "per_seed": per_seed,
        "seed_std": statistics.stdev(per_seed) if len(per_seed) > 1 else None,
        "pass": {str(k): _over_prompts(graded, k, _pass) for k in ks},
        "maj": {str(k): _over_prompts(graded, k, _maj) for k in ks},
        **_behaviour([r for r in records if r["is_valid"]]),
    }


def _ks(num_samples: int) -> list[int]:
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    return powers if powers[-1] == num_samples else [*powers, num_samples]


def _over_prompts(graded: dict, k: int, of_group) -> float | None:
    """Mean over prompts with at least k graded samples; None without one."""
    values = [of_group(rows, k) for rows in graded.values() if len(rows) >= k]
    values = [value for value in values if value is not None]
    return mean(values) if values else None


def _score(record: dict) -> float:
    return max(0.0, min(1.0, record["score"]))


def _pass(rows: list[dict], k: int) -> float:
    return pass_at_k(len(rows), sum(_score(r) >= RIGHT for r in rows), k)


def _maj(rows: list[dict], k: int) -> float | None:
    """None for programs, which cannot vote. All right answers are one answer, however spelled."""
    if any(r["prediction"] is None for r in rows):
        return None
    num_correct = sum(_score(r) >= RIGHT for r in rows)
    wrong = Counter(r["prediction"] for r in rows if _score(r) < RIGHT)
    num_empty = wrong.pop("", 0)
    return maj_at_k(num_correct, tuple(sorted(wrong.values())), num_empty, k)


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
