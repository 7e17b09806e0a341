"""The commands ``bundle`` and ``push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npeff.cli.app import app
from npeff.cli.options import ExistingRun, Factorization
from npeff.cli.output import say
from npeff.storage.location import location

Components = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Components whose directions are included: 0,3,7. Default: none."),
]
License = Annotated[
    str,
    typer.Option("--license", metavar="ID", help="Licence in the card, such as apache-2.0, mit, cc-by-4.0 or other."),
]
NoTexts = Annotated[
    bool,
    typer.Option(
        "--no-texts", help="Leave out the texts, images and tokens of the examples, and further columns of the data."
    ),
]


@app.command("bundle")
def bundle_command(
    run_dir: ExistingRun,
    folder: Annotated[Path, typer.Argument(parser=location, metavar="OUT", help="The folder to write; new or empty.")],
    components: Components = None,
    license_id: License = "unknown",
    no_texts: NoTexts = False,
    factorization: Factorization = None,
) -> None:
    """Write a folder with the report, the tables and a card, which any static host can serve."""
    from npeff.interchange.bundle import BundleOptions, write_bundle

    options = BundleOptions(_numbers(components), not no_texts, license_id, factorization)
    say(f"bundle: complete, in {write_bundle(run_dir, folder, options)}; open index.html in a browser")


@app.command("push")
def push_command(
    run_dir: ExistingRun,
    address: Annotated[str, typer.Argument(metavar="hf://OWNER/NAME", help="A repository on the Hugging Face Hub.")],
    components: Components = None,
    license_id: License = "unknown",
    no_texts: NoTexts = False,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository. Default: private.")] = False,
    factorization: Factorization = None,
) -> None:
    """Upload the folder of `npeff bundle` to the Hugging Face Hub, as a data set repository."""
    from npeff.interchange.bundle import BundleOptions
    from npeff.interchange.push import push_bundle

    options = BundleOptions(_numbers(components), not no_texts, license_id, factorization)
    say(f"push: complete, at {push_bundle(run_dir, address, options, public=public)}")


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (-1,)
    if min(found) < 0:
        raise typer.BadParameter("--components is a list of numbers such as 0,3,7")
    return found
