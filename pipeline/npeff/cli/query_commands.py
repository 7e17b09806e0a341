"""``npeff query RUN_DIR ...``: queries of the components of a run. Each command writes the result of one query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import npeff
from npeff.cli.app import HELP, app
from npeff.cli.output import OutputFormat, write_answer
from npeff.storage.location import location

query_app = typer.Typer(help="Query the components of a run.")
app.add_typer(query_app, name="query", context_settings=HELP)

Component = Annotated[int, typer.Option("--component", "-c", help="Number of the component.")]
Example = Annotated[str, typer.Option("--example", "-e", help="Id or number of the example.")]
Split = Annotated[str | None, typer.Option(help="Only fit or held_out examples.")]
Where = Annotated[
    str | None,
    typer.Option(help='Only examples that meet this SQL condition on their columns: "label = 2 and not correct".'),
]
Format = Annotated[
    OutputFormat | None,
    typer.Option("--format", help="Output format. Default: by the extension of FILE, else table.", show_default=False),
]
File = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Write the result to this file.")
]
NumberOfExamples = Annotated[int, typer.Option("-n", min=1, help="Number of examples.")]
NumberOfComponents = Annotated[int, typer.Option("-n", min=1, help="Number of components.")]


@query_app.callback()
def query(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(parser=location, metavar="RUN_DIR", help="Directory of a run.")],
) -> None:
    context.obj = npeff.ComponentStore.open(run_dir)


@query_app.command()
def top(
    context: typer.Context,
    component: Component,
    n: NumberOfExamples = 20,
    split: Split = None,
    where: Where = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the examples with a component's largest coefficients."""
    write_answer(context.obj.top_examples(component, n=n, split=split, where=where), output, file)


@query_app.command()
def example(context: typer.Context, example: Example, output: Format = None, file: File = None) -> None:
    """Show the components of an example, largest coefficient first."""
    write_answer(context.obj.example(example), output, file)


@query_app.command()
def neighbours(
    context: typer.Context,
    example: Example,
    n: NumberOfExamples = 20,
    split: Split = None,
    where: Where = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the examples most similar to an example, by the cosine of their coefficients."""
    write_answer(context.obj.neighbours(example, n=n, split=split, where=where), output, file)


@query_app.command()
def similar(
    context: typer.Context,
    component: Component,
    n: NumberOfComponents = 10,
    other: Annotated[
        Path | None,
        typer.Option(parser=location, metavar="RUN_DIR", help="Search this run, of the same model and sketch."),
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the components most similar to a component, in this run or another, by |cos|."""
    if other is None:
        found = context.obj.similar_components(component, n=n)
    else:
        found = context.obj.similar_components_in(npeff.ComponentStore.open(other), component, n=n)
    write_answer(found, output, file)


@query_app.command()
def enriched(
    context: typer.Context,
    where: Annotated[str, typer.Option(help='SQL condition that selects the examples: "label = 2 and not correct".')],
    n: NumberOfComponents = 20,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, help="Count an example for a component if it is one of this many top examples; default: if W > 0."
        ),
    ] = None,
    split: Split = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the components that are more frequent in some examples than in the others, by Fisher's exact test."""
    write_answer(context.obj.enriched(where, split=split, top=top, n=n), output, file)


@query_app.command()
def energy(
    context: typer.Context,
    component: Component,
    by: Annotated[Literal["parameter", "layer"], typer.Option(help="Show one row per parameter or per layer.")] = (
        "parameter"
    ),
    output: Format = None,
    file: File = None,
) -> None:
    """Show the fraction of the squared norm of a component's direction in each parameter or layer."""
    write_answer(context.obj.layer_energy(component, by=by), output, file)


@query_app.command()
def verification(context: typer.Context, component: Component, output: Format = None, file: File = None) -> None:
    """Show the effect of moving the model along a component's direction, with the controls."""
    write_answer(context.obj.verification(component), output, file)


@query_app.command()
def components(context: typer.Context, output: Format = None, file: File = None) -> None:
    """Show all components, one row each."""
    write_answer(context.obj.components_table(), output, file)


@query_app.command()
def selection(context: typer.Context, output: Format = None, file: File = None) -> None:
    """Show the results of `npeff select`, one row per number of components tried."""
    write_answer(context.obj.table("selection"), output, file)


@query_app.command()
def sql(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="A SELECT over the tables; SHOW TABLES lists them.")],
    output: Format = None,
    file: File = None,
) -> None:
    """Run a SQL query over the tables of the run."""
    write_answer(context.obj.sql(query), output, file)
