"""The study's report: tables (markdown) and figures from the cells' JSON files, and from nothing else.

Differences are paired: two arms of one seed start from the same weights, see the same batches in the same order with
the same masks, and are tested on the same tokens. Intervals are 95 % t-intervals over seeds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage import atomic_write, write_part
from .cells import CHOICES, CURVE_WINDOW, RATES, Choice, preset_cells
from .estimates import Estimate, Values, difference, estimate
from .figures import plot_curves, plot_differences, plot_story
from .rates import Points, at_own_rate, at_rate_of, chosen_rates, curve, curves, tokens_to_reach, trial_losses, waiting
from .results import Results
from .wording import ARM_TEXT, LONGER, NOTEBOOK, OWN_SCHEDULE, PUBLISHED_LOSS, Setting, factor_text, setting_text


def _cell(value: Estimate | None, form: str = ".3f") -> str:
    """A measure, or with a sign in its form a difference."""
    if value is None:
        return "–"
    return value.verdict(form) if form.startswith("+") else value.text(form)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def section_arms(results: Results, setting: Setting) -> str:
    """Every arm of one setting: loss, accuracies, parameters."""
    rows = []
    for arm, text in ARM_TEXT.items():
        loss = estimate(results.values(arm, **setting))
        if loss is not None:
            accuracy = estimate(results.values(arm, "accuracy", **setting))
            change = estimate(results.values(arm, "change_accuracy", **setting))
            parameters = f"{results.parameters(arm, **setting):,}"
            rows.append([text, _cell(loss), _cell(accuracy, ".1%"), _cell(change, ".1%"), parameters])
            if setting["schedule"] == "notebook":
                rows[-1].append(f"{loss.mean - PUBLISHED_LOSS[arm]:+.3f}" if arm in PUBLISHED_LOSS else "")
    copy = next(iter(results.having(**setting).values()))["test"]
    copied = [f"{copy[name]:.1%}" for name in ("copy_accuracy", "change_copy_accuracy")]
    rows.append(["copying the neighbour", "", *copied, ""])
    header = ["", "test loss", "accuracy", "at pitch changes", "parameters"]
    if setting["schedule"] == "notebook":
        header.append("loss against the published")
        rows[-1].append("")
    return markdown_table(header, rows)


# (what is compared, arm, minus arm)
_EFFECTS = (
    ("as published against absolute: the reversal", "relative.published.normal", "absolute"),
    ("as published against no positions at all", "relative.published.normal", "none"),
    ("repair the skew alone", "relative.normal", "relative.published.normal"),
    ("small tables alone", "relative.published", "relative.published.normal"),
    ("repair both", "relative", "relative.published.normal"),
    ("small tables, once the skew is right", "relative", "relative.normal"),
    ("right skew, once the tables are small", "relative", "relative.published"),
    ("keep absolute positions, nothing else", "both.published.normal", "relative.published.normal"),
    ("repaired relative against absolute", "relative", "absolute"),
    ("both against absolute", "both", "absolute"),
    ("both against repaired relative", "both", "relative"),
)


def section_effects(results: Results, setting: Setting) -> str:
    """Paired differences of loss between arms of one setting; negative: the first is better."""
    rows = []
    for text, one, other in _EFFECTS:
        loss, change = (
            difference(results.values(one, metric, **setting), results.values(other, metric, **setting))
            for metric in ("loss", "change_accuracy")
        )
        if loss is not None:
            rows.append([text, _cell(loss, "+.3f"), _cell(change, "+.1%")])
    return markdown_table(["", "difference of loss", "of accuracy at pitch changes"], rows) if rows else ""


def section_settings(results: Results) -> str:
    """The three main arms in every setting, and what relative positions gain there."""
    rows = []
    for setting in results.settings():
        values = {arm: results.values(arm, **setting) for arm in ("absolute", "relative", "both")}
        if values["absolute"] and values["relative"]:
            losses = [_cell(estimate(v)) for v in values.values()]
            gains = [_cell(difference(values[arm], values["absolute"]), "+.3f") for arm in ("relative", "both")]
            rows.append([setting_text(setting), *losses, *gains])
    header = ["test loss", "absolute", "relative", "both", "relative - absolute", "both - absolute"]
    return markdown_table(header, rows) if rows else ""


def section_changes(results: Results) -> str:
    """Accuracy where copying fails, for every setting."""
    rows = []
    for setting in results.settings():
        values = {arm: results.values(arm, "change_accuracy", **setting) for arm in ("absolute", "relative", "both")}
        if values["absolute"] and values["relative"]:
            copy = Estimate.over(results.values("absolute", "change_copy_accuracy", **setting))
            gain = difference(values["relative"], values["absolute"])
            accuracies = [_cell(estimate(v), ".1%") for v in values.values()]
            rows.append([setting_text(setting), f"{copy.mean:.1%}", *accuracies, _cell(gain, "+.1%")])
    header = ["accuracy at pitch changes", "copying", "absolute", "relative", "both", "relative - absolute"]
    return markdown_table(header, rows) if rows else ""


# (field of the setting, from, to): a change of one factor
_CHANGES: tuple[tuple[str, Any, Any], ...] = (
    ("masking", "time", "step"),
    ("masking", "step", "token"),
    ("masking", "step", "span"),
    ("phase", "beats", "steps"),
    ("phase", "steps", "any"),
    ("voice", False, True),
    ("schedule", "short", "long"),
    *(("window", 16, window) for window in (64, 128, 256, 512)),
)


_PLAIN = {"voice": "not given", "schedule": "short"}


def section_factors(results: Results) -> str:
    """One factor changed, the rest kept: what it does to each arm, and to the distance between them; paired by seed."""
    rows = []
    settings = results.settings()
    for field, before, after in _CHANGES:
        for setting in settings:
            changed = setting | {field: after}
            if setting[field] != before or changed not in settings:
                continue
            changes = {}
            for arm in ("absolute", "relative"):
                of, to = results.values(arm, **setting), results.values(arm, **changed)
                changes[arm] = {seed: to[seed] - of[seed] for seed in sorted(to.keys() & of.keys())}
            gap = difference(changes["relative"], changes["absolute"])
            if gap is not None:
                words = [factor_text(field, value) or f"{field} {_PLAIN[field]}" for value in (before, after)]
                kept = setting_text(setting, leave_out=field)
                cells = [_cell(estimate(values), "+.3f") for values in changes.values()]
                rows.append([f"{words[0]} → {words[1]}; {kept}", *cells, _cell(gap, "+.3f")])
    return markdown_table(["change of loss", "absolute", "relative", "relative - absolute"], rows) if rows else ""


def section_longer(results: Results) -> str:
    """Trained on one window, tested on a longer one."""
    rows = []
    for setting in results.settings():
        for arm, text in ARM_TEXT.items():
            longer = results.values(arm, part="longer", **setting)
            if longer:
                own = results.values(arm, **setting)
                size = next(iter(results.values(arm, "window", part="longer", **setting).values()))
                marked = text + (" *" if arm.startswith(("absolute", "both")) else "")
                row = [f"{marked}; {setting_text(setting)}", _cell(estimate(own)), f"{size}: {_cell(estimate(longer))}"]
                rows.append([*row, _cell(difference(longer, own), "+.3f")])
    if not rows:
        return ""
    note = (
        "\\* Absolute positions end with the training window. The longer test gives these models as many positions as "
        "it needs; those beyond the training window are fresh N(0, 0.02), as in a model built with all of them and "
        "trained on short windows only."
    )
    return markdown_table(["", "trained window", "longer window", "difference"], rows) + "\n\n" + note


def verdicts(results: Results, one: str, other: str) -> dict[str, list[str]]:
    """{"wins": ..., "loses": ..., "not told apart": ..., "one seed": ...}: settings by the interval of one - other."""
    found: dict[str, list[str]] = {"wins": [], "loses": [], "not told apart": [], "one seed": []}
    for setting in results.settings():
        gap = difference(results.values(one, **setting), results.values(other, **setting))
        if gap is not None:
            kind = "one seed" if gap.n == 1 else {-1: "wins", 1: "loses", 0: "not told apart"}[gap.sign]
            found[kind].append(f"{setting_text(setting)} ({gap.text('+.3f')})")
    return found


def section_verdicts(results: Results) -> str:
    """In words: where relative positions win, where they do not."""
    lines = []
    for one, other in (("relative", "absolute"), ("both", "absolute"), ("both", "relative")):
        lines.append(f"**{one} against {other}**, difference of loss:")
        found = verdicts(results, one, other)
        lines += [f"- {kind}: {'; '.join(settings)}" for kind, settings in found.items() if settings]
        lines.append("")
    return "\n".join(lines).strip()


def section_reversal(results: Results, setting: Setting) -> str:
    """Sentences on the reversal in one setting, as far as its cells are there."""
    loss: Callable[[str], Values] = lambda arm: results.values(arm, **setting)  # noqa: E731
    published = difference(loss("relative.published.normal"), loss("absolute"))
    if published is None:
        return "The published comparison has not run yet."
    lines = [f"As published, the relative arm's loss is {published.verdict()} against absolute positions."]

    def add(text: str, one: str, other: str) -> None:
        gap = difference(loss(one), loss(other))
        if gap is not None:
            share = ""
            if published.sign > 0 and gap.sign and other == "relative.published.normal":
                percent = f"{abs(gap.mean) / published.mean:.0%}"
                effect = f"closes {percent} of the gap" if gap.mean < 0 else f"widens the gap by {percent}"
                share = f", which {effect}"
            lines.append(f"{text}: {gap.verdict()}{share}.")

    add("The same arm against a model with no positions at all", "relative.published.normal", "none")
    add("Repairing only the skew changes it by", "relative.normal", "relative.published.normal")
    add("Small tables alone change it by", "relative.published", "relative.published.normal")
    add("Both repairs change it by", "relative", "relative.published.normal")
    add("What then remains against absolute positions", "relative", "absolute")
    return " ".join(lines)


def section_rates(results: Results) -> str:
    """The trials of every arm's learning rate, what the rule chose, and the arms at these rates."""
    rows = []
    chosen = chosen_rates(results.cells)
    for choice in CHOICES:
        losses = trial_losses(results.cells, choice)
        if not losses:
            continue
        own = _losses(at_own_rate(results, choice))
        usual = _losses(at_rate_of(results, choice, "2e-3"))
        absolute = _losses(at_own_rate(results, choice._replace(positions="absolute")))
        budget = choice.cell(choice.schedule, "2e-3").settings.tokens or 0
        rows.append(
            [
                f"window {choice.window}, {budget // 1_000_000} M tokens, {choice.positions}",
                *(f"{losses[rate]:.3f}" if rate in losses else "–" for rate in RATES),
                chosen.get(choice, "–"),
                _cell(estimate(own)),
                "the same runs" if chosen.get(choice) == "2e-3" else _cell(difference(own, usual), "+.3f"),
                "" if choice.positions == "absolute" else _cell(difference(own, absolute), "+.3f"),
            ]
        )
    header = ["", *(f"trial at {rate}" for rate in RATES), "chosen", "test loss there", "against 2e-3", "against absolute"]
    return markdown_table(header, rows) if rows else ""


_RATES_NOTE = (
    "The rule, for every arm alike: trained with seed 0 for a third of the budget, on a schedule of that length, at each of the "
    "three rates, it takes the one of the lowest validation loss. Last column: each arm at its own rate."
)


def _losses(results: dict[int, dict]) -> Values:
    return {seed: result["test"]["loss"] for seed, result in results.items()}


def section_curve(results: Results) -> str:
    """Validation loss against tokens at the window where absolute positions begin late, and where they stand at the end."""
    runs = {arm: at_own_rate(results, Choice("curve", CURVE_WINDOW, arm)) for arm in ("absolute", "relative")}
    by_arm = {arm: {seed: curve(result) for seed, result in found.items()} for arm, found in runs.items()}
    if not any(by_arm.values()):
        return ""
    rows = []
    for number, tokens in _tokens_shown(next(points for found in by_arm.values() for points in found.values())):
        at = {arm: {seed: points[number][1] for seed, points in found.items()} for arm, found in by_arm.items()}
        gap = difference(at["relative"], at["absolute"])
        rows.append([f"{tokens / 1e6:.1f} M", *(_cell(estimate(values)) for values in at.values()), _cell(gap, "+.3f")])
    last = _losses(runs["absolute"]), _losses(runs["relative"])
    rows.append(["test loss at the end", *(_cell(estimate(v)) for v in last), _cell(difference(last[1], last[0]), "+.3f")])
    parts = [markdown_table(["tokens seen", "absolute", "relative", "relative - absolute"], rows), _where_it_stands(by_arm)]
    return "\n\n".join(part for part in parts if part)


def _tokens_shown(points: Points) -> list[tuple[int, float]]:
    """(index, tokens) of the evaluations at the end, at half of it, a quarter, ..."""
    indices = []
    at = len(points)
    while at:
        indices.append(at - 1)
        at //= 2
    return [(index, points[index][0]) for index in reversed(indices)]


def _where_it_stands(by_arm: dict[str, dict[int, Points]]) -> str:
    """What the last quarter of the tokens still gained, and an extrapolation where the absolute arm lies behind."""
    falls = {
        arm: {seed: points[-1][1] - points[len(points) * 3 // 4 - 1][1] for seed, points in found.items()} for arm, found in by_arm.items()
    }
    changed = " and ".join(f"{_cell(estimate(values), '+.3f')} ({arm})" for arm, values in falls.items() if values)
    lines = [f"Over the last quarter of the tokens the validation loss changed by {changed}."]
    goals = {seed: points[-1][1] for seed, points in by_arm["relative"].items()}
    reach = {seed: tokens_to_reach(points, goals[seed]) for seed, points in by_arm["absolute"].items() if seed in goals}
    behind = {seed: tokens for seed, tokens in reach.items() if by_arm["absolute"][seed][-1][1] > goals[seed]}
    if behind:
        each = ", ".join(f"{tokens / 1e6:,.0f} M tokens (seed {seed})" for seed, tokens in sorted(behind.items()))
        lines.append(
            f"Extrapolated, not measured: a power law through the second half of its curve brings the absolute arm to the relative "
            f"arm's last loss at {each}. The rate decays to 0 at the end of the curve, which makes its end steep, so this "
            f"errs in favour of absolute positions."
        )
    return " ".join(lines)


def section_missing(results: Results) -> str:
    """The cells of the presets that have no result here."""
    lines = []
    chosen = chosen_rates(results.cells)
    for preset in ("grid", "seed", "rates"):
        left: dict[str, list[int]] = {}
        for cell in preset_cells(preset, chosen=chosen):
            if cell not in results.cells:
                left.setdefault(cell.group, []).append(cell.seed)
        groups = [f"{group} ({', '.join(map(str, seeds))})" for group, seeds in left.items()]
        if preset == "rates":
            groups += [f"what waits for a rate of {text}" for text in waiting(chosen)]
        if groups:
            lines.append(f"- `--preset {preset}`: {'; '.join(groups)}")
    return "Cells without a result here, and their seeds:\n\n" + "\n".join(lines) if lines else ""


def render(results: Results) -> str:
    """The report as markdown."""
    seeds = sorted({cell.seed for cell in results.cells})
    one = next(iter(results.cells.values()))
    versions = ", ".join(f"{name} {value}" for name, value in one["environment"].items())
    parts = [
        "# The study's results",
        f"Written by `python -m examples.chorales.study report` from {len(results.cells)} finished cells, "
        f"seeds {', '.join(map(str, seeds))}. Numbers are mean ± half the 95 % t-interval over seeds (n); "
        "a number with (1) has one seed and no interval. Loss is in nats per "
        "masked token of the test set; differences are paired by seed, negative where the first is better. Intervals "
        "are not widened for the number of comparisons. Data fingerprint "
        f"{one['data_fingerprint']}; {versions}.",
        "![the published pair, its repairs one by one, every window](story.png)",
    ]

    def add(title: str, *sections: str) -> None:
        if any(sections):
            parts.extend([f"## {title}", *(section for section in sections if section)])

    settings = results.settings()
    if OWN_SCHEDULE in settings:
        add(
            "The notebook's schedule",
            "Published test losses: absolute 0.4014, relative 0.4865, one run each.",
            section_arms(results, OWN_SCHEDULE),
            section_effects(results, OWN_SCHEDULE),
        )
    if NOTEBOOK in settings:
        add(
            "The published comparison, repaired step by step",
            f"{setting_text(NOTEBOOK)}, as in the notebook; a fixed budget of tokens.",
            section_reversal(results, NOTEBOOK),
            section_arms(results, NOTEBOOK),
            section_effects(results, NOTEBOOK),
        )
    if LONGER in settings:
        add(f"A longer window: {setting_text(LONGER)}", section_arms(results, LONGER), section_effects(results, LONGER))
    if table := section_settings(results):
        add("Every setting", "![differences](differences.png)", table)
        factors = section_factors(results)
        add(
            "One factor at a time",
            factors
            and "A negative number in the last column: the change favours relative positions. Changes of masks, "
            "windows and phase change the task too, so read that column, not the first two.",
            factors,
        )
        add("Where relative attention wins, and where it does not", section_verdicts(results))
    if table := section_rates(results):
        add("A learning rate for each arm", _RATES_NOTE, table)
    if curves(results):
        add(f"Loss against tokens: window {CURVE_WINDOW}", "![loss against tokens](curves.png)", section_curve(results))
    add("Where copying fails", section_changes(results))
    add("Longer than trained", section_longer(results))
    add("Missing", section_missing(results))
    return "\n\n".join(parts) + "\n"


def readme_part(results: Results) -> str:
    """What a README shows of the report."""
    seeds = len({cell.seed for cell in results.cells})
    parts = [f"{len(results.cells)} cells of up to {seeds} seeds; mean ± half the 95 % interval over seeds (n)."]
    if OWN_SCHEDULE in results.settings():
        parts += ["The notebook's schedule:", section_arms(results, OWN_SCHEDULE)]
    if NOTEBOOK in results.settings():
        parts += [
            "The same window and masks, two million tokens:",
            section_arms(results, NOTEBOOK),
            section_reversal(results, NOTEBOOK),
        ]
    if table := section_settings(results):
        parts += ["Every setting:", table]
    if table := section_rates(results):
        parts += ["A learning rate for each arm:", table, _RATES_NOTE]
    if text := section_curve(results):
        parts += [f"Validation loss against tokens, window {CURVE_WINDOW}, each arm at its own rate:", text]
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path, readme: Path | None = None) -> None:
    """report.md and its figures beside the JSON files in `folder`; in `readme`, the part that is marked "study"."""
    results = Results(folder)
    if readme:
        write_part(readme, "study", readme_part(results))
    with atomic_write(folder / "report.md") as file:
        file.write(render(results))
    plot_story(folder / "story.png", results)
    written = ["report.md", "story.png"]
    if curves(results):
        plot_curves(folder / "curves.png", results)
        written.append("curves.png")
    if section_settings(results):
        plot_differences(folder / "differences.png", results)
        written.append("differences.png")
    print(f"{len(results.cells)} cells; written: {', '.join(str(folder / name) for name in written)}")
