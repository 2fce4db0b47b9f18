"""The charts of the documentation, drawn from what `measure` and the study of speed have written."""

from collections.abc import Mapping
from typing import Any

from clusterguard.detection import wilson_interval

from benchmarks.reporting import PAPER
from benchmarks.studies.pictures._svg import COLOURS, Chart, Scale, picture

_SHARES = {value / 5: f"{value / 5:g}" for value in range(6)}


def draw_radii(rows: list[Mapping[str, Any]]) -> str:
    """ASR by radius of two guards that ship, and what the certificate of one of them allows at most."""
    blue, orange, _ = COLOURS
    legend = [
        (blue, "", "guards/mnist: broken by APGD"),
        (orange, "", "guards/mnist-certified: broken by APGD"),
        (orange, "5 4", "guards/mnist-certified: at most, proved"),
    ]
    x = Scale("radius of the attack, ℓ∞", 0, 0.5, {value / 10: f"{value / 10:g}" for value in range(6)})
    chart = Chart(x, Scale("attack success rate", 0, 1, _SHARES), legend)
    parts = chart.frame()
    for name, colour in (("mnist", blue), ("mnist-certified", orange)):
        of_guard = [row for row in rows if row["guard"] == name]
        parts.append(chart.band([(row["eps"], *wilson_interval(row["broken"], row["of"])) for row in of_guard], colour))
        parts.append(chart.line([(row["eps"], row["broken"] / row["of"]) for row in of_guard], colour, dots=True))
        proved = [(row["eps"], row["unproved"] / row["of"]) for row in of_guard if "unproved" in row]
        parts += [chart.line(proved, colour, "5 4")] if proved else []
    at = {row["guard"]: f"{row['broken']} of {row['of']}" for row in rows if row["eps"] == 0.3}
    text = (
        f"At a radius of 0.3, APGD breaks {at['mnist']} images of guards/mnist and {at['mnist-certified']} of "
        "guards/mnist-certified. Beyond it the first guard breaks at once, and the certificate rises."
    )
    return picture("radii", "Attack success rate by radius", text, parts)


def draw_paper(rows: list[Mapping[str, Any]]) -> str:
    """ASR by radius of Ours and L-Ben under the paper's attack, with the figures that the paper prints."""
    names = {"ours": "Ours", "l-ben": "L-Ben"}
    colours = dict(zip(names, COLOURS, strict=False))
    legend = [(colours[key], "", f"{name}, measured here") for key, name in names.items()]
    legend.append(("none", "", "what the paper prints"))
    x = Scale("radius of PGD with 100 steps of 0.01, ℓ∞", 0, 0.5, {value / 10: f"{value / 10:g}" for value in range(6)})
    chart = Chart(x, Scale("attack success rate", 0, 1, _SHARES), legend)
    parts, said = [*chart.frame(), _ring(chart.place(0, 0)[0] + 14, 54, "currentColor")], []
    printed = PAPER["table2-mnist"]
    for key, colour in colours.items():
        ours = [row for row in rows if row["detector"] == key]
        parts.append(chart.band([(row["eps"], *wilson_interval(row["broken"], row["of"])) for row in ours], colour))
        parts.append(chart.line([(row["eps"], row["broken"] / row["of"]) for row in ours], colour, dots=True))
        for eps in (0.3, 0.4):
            share = printed[f"PGD linf {eps} U"]["ASR-1"][printed["detectors"].index(key)]
            parts.append(_ring(*chart.place(eps, share), colour))
            (row,) = (row for row in ours if row["eps"] == eps)
            said.append(f"{names[key]} at {eps}: {row['broken']} of {row['of']} here, {share:g} in the paper.")
    return picture("paper", "The paper's attack by radius", " ".join(said), parts)


def _ring(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="{colour}" stroke-width="2"/>'


def draw_thresholds(rows: list[Mapping[str, Any]]) -> str:
    """The false-positive rate asked for against the realised one."""
    blue = COLOURS[0]
    legend = [
        (blue, "", "realised, mean; the band holds 90 % of the halves"),
        ("currentColor", "5 4", "as asked for"),
    ]
    ticks = {value / 20: f"{5 * value} %" for value in range(5)}
    asked, realised = Scale("false-positive rate asked for", 0, 0.2, ticks), Scale("realised rate", 0, 0.22, ticks)
    chart = Chart(asked, realised, legend)
    parts = [
        *chart.frame(),
        chart.line([(0, 0), (0.2, 0.2)], "currentColor", "5 4"),
        chart.band([(row["asked"], row["low"], row["high"]) for row in rows], blue),
        chart.line([(row["asked"], row["mean"]) for row in rows], blue, dots=True),
    ]
    text = "The mean of the realised rate lies on the diagonal or just below it at every rate asked for."
    return picture("thresholds", "False-positive rate: asked for and realised", text, parts)


def draw_drift(drift: Mapping[str, Any], every: int = 50) -> str:
    """The monitor's evidence on a stream that drifts and on one that does not."""
    blue, orange, _ = COLOURS
    moved = f"the camera moves by {drift['shift']} pixels at image {drift['begins']:,}"
    legend = [(blue, "", "no drift"), (orange, "", moved)]
    evidence = {10.0**power: text for power, text in ((0, "1"), (2, "100"), (4, "10⁴"), (6, "10⁶"), (8, "10⁸"))}
    ticks = {float(value): f"{value:,}" for value in range(0, 10_001, 2500)}
    chart = Chart(Scale("images seen", 0, 10_000, ticks), Scale("evidence", 1, 1e8, evidence, log=True), legend)
    lines = {
        name: [(every * (index + 1), value) for index, value in enumerate(drift[name])]
        for name in ("unchanged", "drifting")
    }
    alarm = next(seen for seen, value in lines["drifting"] if value >= drift["run_length"])
    left, level = chart.place(0, drift["run_length"])
    across, top = chart.place(drift["begins"], 1e8)
    right, bottom = chart.place(10_000, 1)
    parts = [
        *chart.frame(),
        f'<path d="M{left} {level}H{right}" stroke="currentColor" stroke-width="1.5"/>',
        f'<text x="{left + 4}" y="{level - 6}">alarm above this line</text>',
        f'<path d="M{across} {top}V{bottom}" stroke="currentColor" stroke-dasharray="2 4"/>',
        chart.line(lines["unchanged"], blue),
        chart.line(lines["drifting"], orange),
    ]
    text = (
        f"Digits move by {drift['shift']} pixels from image {drift['begins']:,} on. The alarm comes by image "
        f"{alarm:,}. Without a drift the evidence stays far below the line."
    )
    return picture("drift", "Evidence of the monitor over time", text, parts)


def draw_cost(rows: Mapping[str, Any]) -> str:
    """The time of detection as a share of the time of the network alone."""
    bars = [
        ("ResNet-50, one image", rows["detection, ResNet-50 at 224, batch 1, against the bare backbone"]["ratio"]),
        ("ResNet-50, eight images", rows["detection, ResNet-50 at 224, batch 8, against the bare backbone"]["ratio"]),
    ]
    ticks = {value / 4: f"{25 * value} %" for value in range(5)}
    scale = Scale("processor time, network alone = 100 %", 0, 1.1, ticks)
    left, right, row_height, foot = 16, 440, 66, 190
    parts, texts = [], []
    for index, (name, ratio) in enumerate(bars):
        y, share = 16 + row_height * index, 1 / ratio["median"]
        end = left + scale.share(share) * (right - left)
        whisker = [left + scale.share(1 / ratio[edge]) * (right - left) for edge in ("high", "low")]
        said = f"{100 * share:.1f} %, 95 % interval {100 / ratio['high']:.1f} to {100 / ratio['low']:.1f}"
        parts += [
            f'<text x="{left}" y="{y + 8}">{name}: {said}</text>',
            f'<rect x="{left}" y="{y + 16}" width="{end - left:.1f}" height="22" fill="{COLOURS[0]}"/>',
            f'<path d="M{whisker[0]:.1f} {y + 27}H{whisker[1]:.1f}" stroke="currentColor" stroke-width="3"/>',
        ]
        texts.append(f"{name}: {said}.")
    for value, label in scale.ticks.items():
        x = left + scale.share(value) * (right - left)
        parts.append(f'<path d="M{x:.1f} 12V{foot - 38}" stroke="currentColor" opacity=".25"/>')
        parts.append(f'<text x="{x:.1f}" y="{foot - 22}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{foot - 2}" text-anchor="middle">{scale.label}</text>')
    return picture("cost", "What detection costs", " ".join(texts), parts, height=foot + 6)
