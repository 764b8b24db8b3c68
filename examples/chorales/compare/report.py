"""What a comparison leaves behind: results.json, loss.png and a table."""

from pathlib import Path

from ..reporting import aligned, draw_curves, save_figure
from ..storage import write_json


def write_results(folder: Path, results: dict) -> None:
    """results.json and loss.png in `folder`, each complete or absent."""
    write_json(folder / "results.json", results)
    plot_losses(folder / "loss.png", results)


def plot_losses(path: Path, results: dict) -> None:
    """Training (thin) and validation (thick) loss of every arm over optimizer steps, and the copy baseline's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    baseline = results["baseline"]["valid"]["loss"]
    draw_curves(axes, results["arms"])
    axes.axhline(baseline, color="black", linestyle="--", linewidth=1.2, label="copy baseline, valid")
    axes.set(xlabel="optimizer step", ylabel="loss on masked tokens (nats)", xlim=(0, None))
    # A logarithmic scale keeps apart the arms' last losses, which are what is compared, under the steep start.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    config = results["config"]
    axes.set_title("Bach chorales: window {window}, stride {stride}, masking by {masking}".format(**config))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    save_figure(figure, path, dpi=130)


def table(results: dict) -> str:
    """Arms and baseline on the test set, then one sentence on which arms beat copying."""
    rows = [("", "test loss", "accuracy", "valid loss", "parameters", "tokens/s")]
    for arm, result in results["arms"].items():
        best = min(point["loss"] for point in result["validation"])
        speed = result["tokens_per_second"]
        rows.append(
            (
                arm,
                f"{result['test']['loss']:.4f}",
                f"{result['test']['accuracy']:.2%}",
                f"{best:.4f}",
                f"{result['parameters']:,}",
                "-" if speed is None else f"{speed:,.0f}",
            )
        )
    copy = results["baseline"]
    test, valid = copy["test"], copy["valid"]
    rows.append(("copy neighbour", f"{test['loss']:.4f}", f"{test['accuracy']:.2%}", f"{valid['loss']:.4f}", "", ""))
    return "\n".join([*aligned(rows), "", verdict(results)])


def verdict(results: dict) -> str:
    """Which arms predict more masked test tokens than copying does."""
    copy = results["baseline"]["test"]["accuracy"]
    phrases = []
    for arm, result in results["arms"].items():
        gain = 100 * (result["test"]["accuracy"] - copy)
        phrases.append(
            f"{arm} beats the copy baseline by {gain:.1f} points"
            if gain > 0
            else f"{arm} does NOT beat the copy baseline ({gain:.1f} points)"
        )
    count = results["baseline"]["test"]["masked_tokens"]
    return f"Accuracy on the same {count:,} masked test tokens: {'; '.join(phrases)}."
