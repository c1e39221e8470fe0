"""Tokens a second against peak memory, ours and the rivals', from the rows that exist: ``python -m benchmarks.plot docs/speed.png``."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.geometries import GEOMETRIES, text_layers

OURS = ("jaxlora", "jaxlora, float8")
STYLES = {
    "jaxlora": ("#c2410c", "o", "jaxlora"),
    "jaxlora, float8": ("#d97706", "^", 'jaxlora, compute_dtype="float8"'),
    "unsloth": ("#1d4ed8", "s", "Unsloth"),
    "hf": ("#6b7280", "D", "transformers + PEFT + bitsandbytes"),
}
GC = {"on": "checkpointing", "off": "no checkpointing", "unsloth": '"unsloth"', "": "checkpointing not recorded"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One job: the rows that belong to it."""

    title: str
    model: str
    rows: int = 4
    sequence: int = 2048
    bits: int = 4

    @property
    def layers(self) -> int:
        return text_layers(GEOMETRIES[self.model])

    def holds(self, row: Mapping[str, str], bits: int) -> bool:
        same = (row["model"], row["rows"], row["sequence"]) == (self.model, str(self.rows), str(self.sequence))
        return same and bits == self.bits


PANELS = (
    Panel("Llama-3.1-8B, 4 bits, 4 x 2048 tokens", "llama-3.1-8b"),
    Panel("Qwen2-VL-7B, 4 bits, 4 x 2048 tokens with an 896 x 896 image a row", "qwen2-vl-7b"),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One system in one setting."""

    system: str
    label: str
    peak_gb: float
    tok_s: float
    device: str
    date: str


def points(panel: Panel, ours: Sequence[Mapping[str, str]], rivals: Sequence[Mapping[str, str]]) -> list[Point]:
    """The newest row of each setting; int4 stands for our 4 bits."""
    found: dict[tuple[str, str], Point] = {}
    for row in ours:
        bits = {"int4": 4, "bf16": 16}.get(row["weights"], 0)
        whole = row.get("execution", "") == "" and row["rank"] == "16" and row.get("layers") in (None, "", str(panel.layers))
        if panel.holds(row, bits) and whole:
            mode = row["remat"] if row["remat"] in ("True", "False") else f'"{row["remat"]}"'
            system = f"jaxlora, {row['compute']}" if row.get("compute") else "jaxlora"
            found[system, mode] = _point(system, mode, row)
    for row in rivals:
        if row["task"] == "train" and row["rank"] == "16" and panel.holds(row, int(row["bits"])):
            # A row that does not say its mode gives way to the first that does.
            found.pop((row["system"], ""), None)
            found[row["system"], row["gc"]] = _point(row["system"], GC[row["gc"]], row)
    return list(found.values())


def _point(system: str, label: str, row: Mapping[str, str]) -> Point:
    return Point(system, label, float(row["peak_gb"]), float(row["tok_s"]), row["device"], row["date"])


def draw(axes: Any, panel: Panel, shown: Sequence[Point]) -> None:
    """One panel; the points of a system are joined in the order of their memory."""
    for system, (colour, marker, name) in STYLES.items():
        own = sorted((p for p in shown if p.system == system), key=lambda p: p.peak_gb)
        if not own:
            continue
        axes.plot(
            [p.peak_gb for p in own],
            [p.tok_s for p in own],
            color=colour,
            marker=marker,
            markersize=8,
            linewidth=1.5,
            alpha=0.9,
            label=name,
        )
        for p in own:
            # Ours above its points to the left, the rivals' below theirs to the right: lines rise between them.
            offset, side = ((-6, 7), "right") if system in OURS else ((-8, -19), "left")
            axes.annotate(p.label, (p.peak_gb, p.tok_s), xytext=offset, textcoords="offset points", ha=side, fontsize=9, color=colour)
    axes.set_xscale("log", base=2)
    ticks = [8, 16, 32, 64, 128]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlim(4.8, 190)
    axes.set_ylim(0, 1.5 * max(p.tok_s for p in shown))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("peak GPU memory, GB")
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def caption(shown: Sequence[Point]) -> str:
    """Where and when, by system; that systems were measured apart is said."""
    when = {name: sorted({p.date for p in shown if (p.system in OURS) == own}) for name, own in (("jaxlora", True), ("rivals", False))}
    told = "; ".join(f"{name} {' and '.join(dates)}" for name, dates in when.items() if dates)
    apart = ", measured in different runs" if len({p.date for p in shown}) > 1 else ""
    devices = " or ".join(sorted({p.device for p in shown}))
    return f"One {devices}: random weights, LoRA r = 16 on every projection, every text token a label, optimizer included.\n{told}{apart}."


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--results", type=pathlib.Path, default=results.FOLDER)
    args = parser.parse_args()
    ours, rivals = results.read(args.results / "train_step.csv"), results.read(args.results / "rivals.csv")
    found = [(panel, shown) for panel in PANELS if (shown := points(panel, ours, rivals))]
    figure, axes = plt.subplots(1, len(found), figsize=(6.4 * len(found), 4.6), squeeze=False)
    for ax, (panel, shown) in zip(axes[0], found, strict=True):
        draw(ax, panel, shown)
    axes[0][0].set_ylabel("tokens a second")
    axes[0][0].legend(loc="upper left", frameon=False, fontsize=9)
    figure.text(0.5, 0.01, caption([p for _, shown in found for p in shown]), ha="center", fontsize=8.5, color="#4b5563")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(args.target, dpi=130)


if __name__ == "__main__":
    main()
