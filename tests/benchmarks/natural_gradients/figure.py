"""The picture of docs/step.md: the loss after one step along each direction."""

from __future__ import annotations

from typing import Any

WIDTH, LEFT, TOP, ROW = 560, 210, 58, 30
NAMES = {
    "start": "no step",
    "gradient": "gradient",
    "diagonal": "diagonal",
    "low_rank": "low_rank, 16 directions",
    "kfac": "kfac",
    "exact": "exact",
}


def figure(found: dict[str, Any]) -> str:
    """Return the picture. A dot is a seed, and a line the mean over the seeds."""
    all_losses = [loss for row in found.values() for loss in row["loss_of_seeds"]]
    low, high = min(all_losses) - 0.01, max(all_losses) + 0.01

    def x(loss: float) -> float:
        return LEFT + (loss - low) / (high - low) * (WIDTH - LEFT - 70)

    marks = []
    for number, (kind, name) in enumerate(NAMES.items()):
        row, y = found[kind], TOP + ROW * number
        colour = "#6b6b6b" if kind in ("start", "gradient") else "#1f5fa8"
        marks += [
            f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{name}</text>',
            *(
                f'<circle cx="{x(loss):.1f}" cy="{y}" r="4" fill="{colour}" opacity="0.5"/>'
                for loss in row["loss_of_seeds"]
            ),
            f'<path d="M{x(row["loss"]):.1f} {y - 9}v18" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{WIDTH - 12}" y="{y + 4}" text-anchor="end">{row["loss"]:.3f}</text>',
        ]
    height = TOP + ROW * len(NAMES)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            '<text x="12" y="20">Test loss in nats after one step of an untrained network on 150 digits.</text>',
            '<text x="12" y="36">Dots: five seeds; lines and numbers: their mean. Lower is better.</text>',
            *marks,
            "</svg>\n",
        ]
    )
