"""``npeff query RUN_DIR ...``: questions to a run's component store; each parses, asks and gives the answer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import npeff
from npeff.cli.app import HELP, app
from npeff.cli.output import OutputFormat, write_answer
from npeff.storage.location import location

query_app = typer.Typer(help="Ask a run's component store.")
app.add_typer(query_app, name="query", context_settings=HELP)

Component = Annotated[int, typer.Option("--component", "-c", help="Number of the component.")]
Example = Annotated[str, typer.Option("--example", "-e", help="Id or number of the example.")]
Split = Annotated[str | None, typer.Option(help="Only fit or held_out examples.")]
Where = Annotated[
    str | None,
    typer.Option(help='Only examples that meet this, in SQL over their columns: "label = 2 and not correct".'),
]
Format = Annotated[
    OutputFormat | None,
    typer.Option("--format", help="Of the answer; else that of FILE's ending, else a table.", show_default=False),
]
File = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Write the answer to this file.")
]
NumberOfExamples = Annotated[int, typer.Option("-n", min=1, help="How many examples.")]
NumberOfComponents = Annotated[int, typer.Option("-n", min=1, help="How many components.")]


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
    """The examples with a component's largest coefficients."""
    write_answer(context.obj.top_examples(component, n=n, split=split, where=where), output, file)


@query_app.command()
def example(context: typer.Context, example: Example, output: Format = None, file: File = None) -> None:
    """One example's components, largest first."""
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
    """The examples most like one, by the cosine of their coefficients."""
    write_answer(context.obj.neighbours(example, n=n, split=split, where=where), output, file)


@query_app.command()
def similar(
    context: typer.Context,
    component: Component,
    n: NumberOfComponents = 10,
    other: Annotated[
        Path | None,
        typer.Option(parser=location, metavar="RUN_DIR", help="Components of this run, of the same model and sketch."),
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """The components most like one, of this run or another, by |cos|."""
    if other is None:
        found = context.obj.similar_components(component, n=n)
    else:
        found = context.obj.similar_components_in(npeff.ComponentStore.open(other), component, n=n)
    write_answer(found, output, file)


@query_app.command()
def enriched(
    context: typer.Context,
    where: Annotated[
        str, typer.Option(help='The examples in question, in SQL over their columns: "label = 2 and not correct".')
    ],
    n: NumberOfComponents = 20,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="An example has a component if it is among its so many top examples, not by W > 0."),
    ] = None,
    split: Split = None,
    output: Format = None,
    file: File = None,
) -> None:
    """The components that some examples have more often than the others, by Fisher's exact test."""
    write_answer(context.obj.enriched(where, split=split, top=top, n=n), output, file)


@query_app.command()
def energy(
    context: typer.Context,
    component: Component,
    by: Annotated[Literal["parameter", "layer"], typer.Option(help="Sum over the parameters of a layer or not.")] = (
        "parameter"
    ),
    output: Format = None,
    file: File = None,
) -> None:
    """Where in the model a component's direction is: its share of squared norm in each parameter or layer."""
    write_answer(context.obj.layer_energy(component, by=by), output, file)


@query_app.command()
def verification(context: typer.Context, component: Component, output: Format = None, file: File = None) -> None:
    """What moving the model along a component's direction did, with the controls."""
    write_answer(context.obj.verification(component), output, file)


@query_app.command()
def components(context: typer.Context, output: Format = None, file: File = None) -> None:
    """All components, a row each."""
    write_answer(context.obj.components_table(), output, file)


@query_app.command()
def selection(context: typer.Context, output: Format = None, file: File = None) -> None:
    """What `npeff select` found, a row for every number of components tried."""
    write_answer(context.obj.table("selection"), output, file)


@query_app.command()
def sql(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="A SELECT over the tables; SHOW TABLES lists them.")],
    output: Format = None,
    file: File = None,
) -> None:
    """SQL over all tables of the run."""
    write_answer(context.obj.sql(query), output, file)
