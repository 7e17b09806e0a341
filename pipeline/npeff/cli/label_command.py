"""The command ``label``: names and notes of components."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import ExistingRun, Factorization, File, Format
from npeff.cli.output import say, write_answer
from npeff.cli.query_commands import OUTDATED
from npeff.storage.location import location


@app.command("label")
def label_command(
    run_dir: ExistingRun,
    component: Annotated[int | None, typer.Option("--component", "-c", min=0, help="Component to name.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the component, at most 200 characters. An empty text deletes the name.")
    ] = None,
    note: Annotated[
        str | None, typer.Option(help="Note on the component, at most 4000 characters. An empty text deletes the note.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            parser=location,
            metavar="FILE",
            help="Read names and notes from this file: JSON objects, one a line, or CSV, with the keys component, name "
            "and note.",
        ),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(
            parser=location,
            metavar="MODEL",
            help="Score the components and their names by the sentence-embedding model in this local folder.",
        ),
    ] = None,
    factorization: Factorization = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Give names and notes to components, or list them. The report and queries show them.

    Without --component, --from and --score, the names and notes are listed.
    """
    texts = (name, note) != (None, None)
    if (source is not None) + (score is not None) + (component is not None or texts) > 1:
        raise typer.BadParameter("give --from, or --score, or --component with --name or --note, not several of them")
    if (component is not None) != texts:
        raise typer.BadParameter("give --component together with --name, --note or both")
    if component is not None:
        npeff.annotate(run_dir, component, name=name, note=note, factorization=factorization)
        say(f"label: component {component} of {run_dir}")
        return
    if source is not None:
        from npeff.stages.label import annotate_from

        found = annotate_from(npeff.RunDirectory.open(run_dir, factorization), source)
        say(f"label: {len(found.of_component)} components of {run_dir} have a name or a note")
        return
    if score is not None:
        from npeff.stages.label_scores import score_labels

        write_answer(score_labels(npeff.RunDirectory.open(run_dir, factorization), score), output, file)
        return
    store = npeff.ComponentStore.open(run_dir, factorization)
    write_answer(store.components_table().select(["component", "name", "note"]), output, file)
    if store.annotations.outdated:
        print(OUTDATED, file=sys.stderr)
