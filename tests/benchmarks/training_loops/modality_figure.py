"""The tables of the comparison of regularizers, and the picture of the documentation."""

from __future__ import annotations

from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 340, 56, 50, 48
COLOURS = {
    "none": "#6b6b6b",
    "reciprocal": "#a03b6e",
    "balance": "#8a6d1f",
    "dropout": "#b4531f",
    "share": "#1f5fa8",
}
COLUMNS = ("biased", "unbiased", "grey", "share")


def show(found: dict[str, Any]) -> None:
    for cue in ("colour", "caption"):
        print(f"{cue}:\n| method | options | biased | unbiased | of seeds | grey | share of the image | ", end="")
        print("minus none | minus dropout |\n" + "|---" * 9 + "|")
        for method, row in found[cue].items():
            mean, options = row["mean"], ", ".join(f"{name} {value:g}" for name, value in row["options"].items())
            of_seeds = [each["unbiased"] for each in row["of_seeds"]]
            differences = " | ".join(_interval(row.get(f"minus {other}")) for other in ("none", "dropout"))
            print(
                f"| {method} | {options} | {mean['biased']:.3f} | {mean['unbiased']:.3f} | {min(of_seeds):.3f} to "
                f"{max(of_seeds):.3f} | {mean['grey']:.3f} | {mean['share']:.2f} | {differences} |"
            )
        print()
    print("| λ of reciprocal | validation | biased | unbiased | grey | share of the image |\n" + "|---" * 6 + "|")
    for row in found["colour"].get("reciprocal", {"trials": []})["trials"]:
        values = [f"{row['test'][name]:.3f}" for name in COLUMNS]
        print(f"| {row['options']['weight']:.0e} | {row['validation']:.3f} | {' | '.join(values)} |")


def show_cost(found: dict[str, Any]) -> None:
    print("| cue | draws | ms per step | relative to the plain step |\n|---|---|---|---|")
    for cue, row in found.items():
        for samples, ms in row["ms"].items():
            median, low, high = row["relative"][samples]
            print(f"| {cue} | {samples} | {ms:.2f} | {median:.2f} ({low:.2f} to {high:.2f}) |")


def _interval(values: list[float] | None) -> str:
    return "" if values is None else "{:.3f} ({:.3f} to {:.3f})".format(*values)


def figure(found: dict[str, Any]) -> str:
    """Return the picture: the share of the image and the unbiased accuracy of each seed, by method."""

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - 16)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - accuracy * (HEIGHT - BOTTOM - TOP)

    marks = []
    for number, (method, colour) in enumerate(COLOURS.items()):
        row = found["colour"][method]
        marks += [
            f'<circle cx="{x(each["share"]):.1f}" cy="{y(each["unbiased"]):.1f}" r="5" fill="{colour}" opacity="0.7"/>'
            for each in row["of_seeds"]
        ]
        at = TOP + 130 + 18 * number
        marks += [
            f'<circle cx="{LEFT + 16}" cy="{at - 4}" r="5" fill="{colour}" opacity="0.7"/>',
            f'<text x="{LEFT + 28}" y="{at}">{method}: {row["mean"]["unbiased"]:.2f}</text>',
        ]
    ticks = [f'<text x="{x(v):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{v:g}</text>' for v in (0, 0.5, 1)]
    ticks += [f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in (0, 0.5, 1)]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{LEFT}" y="20">Digits whose colour gives 99.5% of the training images away.</text>',
            f'<text x="{LEFT}" y="36">Dots: five seeds of each regularizer, tuned alike; numbers: mean accuracy</text>',
            f'<path d="M{LEFT} {TOP}V{y(0):.1f}H{WIDTH - 16}" fill="none" stroke="#888"/>',
            *marks,
            *ticks,
            f'<text x="{x(0.5):.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
            "share of the information that comes from the image</text>",
            f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            "accuracy with random colours</text>",
            "</svg>\n",
        ]
    )
