"""The table of `benchmarks/gpu.py`, in Markdown, with its targets met or missed."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# what 60,000 updates of 5-way 1-shot may take, and the accuracy they are to reach (transductive)
UPDATES, SECONDS, ACCURACY = 60_000, 360.0, 98.5


def table(results: dict[str, Any]) -> str:
    """All that is known so far."""
    stages = results["stages"]
    steps = latest(stages, "step", "workload", "implementation", "variant", "precision")
    omniglot = latest(stages, "omniglot", "ways", "shots")
    parts = [
        heading(results),
        stage_table(stages),
        step_table(steps),
        model_table(latest(stages, "model", "workload", "where")),
        omniglot_table(omniglot),
        target_table(steps, omniglot, dry_run=results["dry_run"]),
    ]
    return "\n\n".join(part for part in parts if part)


def latest(stages: dict[str, Any], kind: str, *key: str) -> list[Row]:
    """Results of a kind; of those that were written down more than once, the last."""
    found: dict[tuple[Any, ...], Row] = {}
    for stage in stages.values():
        for row in stage["results"]:
            if row["kind"] == kind:
                found[tuple(row[name] for name in key)] = row
    return list(found.values())


def heading(results: dict[str, Any]) -> str:
    machines = latest(results["stages"], "machine")
    dry = (
        "**A dry run: sizes are tiny, and no figure means anything.** "
        if results["dry_run"]
        else ""
    )
    if not machines:
        return f"{dry}{results['date']}, no stage has run."
    machine = machines[-1]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    where = f"{machine['device']}{driver}, Python {machine['python']}, {versions}"
    return f"{dry}{results['date']}, {where}."


def stage_table(stages: dict[str, Any]) -> str:
    lines = ["| stage | | seconds | limit | |", "| --- | --- | --- | --- | --- |"]
    for name, stage in stages.items():
        remark = stage["reason"]
        for row in stage["results"]:
            if row["kind"] == "tests":
                remark = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
                remark = "; ".join([remark, *row["failures"]])
        lines.append(
            f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {stage['limit']:.0f} "
            f"| {cell(remark)} |"
        )
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def number(value: Any, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def step_table(steps: list[Row]) -> str:
    """Times are medians; `update of fit` has everything that `fit` does around the step."""
    if not steps:
        return ""
    lines = [
        "| workload | | | precision | step, ms | update of `fit`, ms | gradient error | peak, MB "
        "| waits of the host | first steps, s | |",
        "| --- " * 11 + "|",
    ]
    for row in steps:
        ms = number(row["ms"], ".3f")
        if row["status"] == "timed":
            low, high = row["quartiles_ms"]
            ms += f" ({low:.3f} to {high:.3f})"
        elif row["implementation"] == "planted" and row["status"] == "wrong gradient":
            ms = "wrong gradient, as it is meant to be"
        else:
            ms = f"**{row['status']}**"
        cells = [
            row["workload"], row["implementation"], row["variant"], row["precision"], ms,
            number(row["fit_ms"], ".3f"), number(row["gradient_error"], ".0e"),
            number(row["peak_mb"], ".0f"), number(row["synchronisations"], "d"),
            number(row["setup_seconds"], ".1f"),
            cell("; ".join(filter(None, [row["ran_as"], row["reason"]]))),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(models: list[Row]) -> str:
    if not models:
        return ""
    lines = [
        "| default model | multiply-adds | on the | updates | fit, s | update, ms | adapt, ms "
        "| predict, ms | error | predictions differ by |",
        "| --- " * 10 + "|",
    ]
    for row in models:
        cells = [
            row["workload"], number(row["work"], ".1e"), row["where"],
            f"{row['updates']:,}{', ended' if row['ended'] else ''}",
            *(number(row[name], ".2f")
              for name in ("fit_seconds", "update_ms", "adapt_ms", "predict_ms")),
            *(number(row[name], ".4f") for name in ("error", "difference")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def omniglot_table(results: list[Row]) -> str:
    if not results:
        return ""
    lines = [
        "| Omniglot | updates | of planned | fit, s | updates a second "
        "| one query row of a class at once, as published, % | 15 at once, % | inductive, % |",
        "| --- " * 8 + "|",
    ]
    for row in results:
        scores = [
            f"{row[norm][0]:.2f} ± {row[norm][1]:.2f}" if row[norm] else "not evaluated"
            for norm in ("as_published", "transductive", "inductive")
        ]
        lines.append(
            f"| {row['ways']}-way {row['shots']}-shot | {row['updates']:,} | {row['planned']:,} "
            f"| {row['fit_seconds']:.0f} | {row['updates_per_second']:.1f} | {' | '.join(scores)} |"
        )
    return "\n".join(lines)


def target_table(steps: list[Row], omniglot: list[Row], *, dry_run: bool) -> str:
    """Targets beside the figures. The library's time is that of an update of a fit."""

    def best(workload: str, implementation: str, field: str = "ms", variant: str = "") -> Any:
        values = [
            row[field]
            for row in steps
            if (row["workload"], row["implementation"]) == (workload, implementation)
            and row["precision"] == "full"
            and row["status"] == "timed"
            and row[field] is not None
            and variant in ("", row["variant"])
        ]
        return min(values, default=None)

    fitted = "as fit runs it"
    lines = ["| target | bound | found | |", "| --- | --- | --- | --- |"]

    def line(
        what: str, bound: float, a: Any, b: Any, *, at_least: bool = False, also: Any = None
    ) -> None:
        ratio = None if a is None or b is None else a / b
        if ratio is None:
            verdict = "not measured"
        elif dry_run:
            verdict = "means nothing"
        else:
            verdict = "met" if (ratio >= bound if at_least else ratio <= bound) else "missed"
        found = number(ratio, ".2f")
        if ratio is not None and also is not None:
            found += f" (the step alone {also:.2f})"
        sign = "at least" if at_least else "at most"
        lines.append(f"| {what} | {sign} {bound:g} | {found} | {verdict} |")

    for workload, bound in (("W1", 1.0), ("W2", 0.8), ("W3", 0.8)):
        jax, step = best(workload, "JAX"), best(workload, "library", variant=fitted)
        also = None if jax is None or step is None else step / jax
        fit = best(workload, "library", "fit_ms", fitted)
        line(f"{workload}: time, as a ratio to JAX", bound, fit, jax, also=also)
    loop, fit, step = (
        best("W3", "plain loop"),
        best("W3", "library", "fit_ms", fitted),
        best("W3", "library", variant=fitted),
    )
    also = None if loop is None or step is None else loop / step
    line("W3 (conv4): speed, as a ratio to the plain loop", 10, loop, fit, at_least=True, also=also)
    line("W1: speed of a graph replay, as a ratio to eager", 3,
         best("W1", "library", variant="eager"), best("W1", "library", variant="CUDA graph"),
         at_least=True)  # fmt: skip
    row = next((row for row in omniglot if row["ways"] == 5), None)
    seconds = None if row is None else UPDATES / row["updates_per_second"]
    line("60,000 updates of Omniglot 5-way 1-shot, as a ratio to six minutes", 1.0, seconds,
         SECONDS)  # fmt: skip
    accuracy = row["as_published"][0] if row is not None and row["as_published"] else None
    line("accuracy there, as published, as a ratio to 98.5 %", 1.0, accuracy, ACCURACY,
         at_least=True)  # fmt: skip
    return "\n".join(lines)
