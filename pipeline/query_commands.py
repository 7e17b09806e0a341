"""``npeff query RUN_DIR ...``: questions to a run's component store; each parses, asks and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import stages
from pipeline.query_output import OutputFormat, print_table

query_app = typer.Typer(help="Ask a run's component store.")

Format = Annotated[OutputFormat, typer.Option("--format", help="How to print the answer.")]


@query_app.callback()
def query(
    context: typer.Context, run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]
) -> None:
    context.obj = stages.open_components(run_dir)


@query_app.command()
def top(
    context: typer.Context,
    component: Annotated[int, typer.Option("--component", "-c", help="Number of the component.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many examples.")] = 20,
    split: Annotated[str | None, typer.Option(help="Only fit or held_out examples.")] = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """The examples with a component's largest coefficients."""
    print_table(context.obj.top_examples(component, n=n, split=split), output)


@query_app.command()
def example(
    context: typer.Context,
    example: Annotated[str, typer.Option("--example", "-e", help="Id or number of the example.")],
    output: Format = OutputFormat.TABLE,
) -> None:
    """One example's components, largest first."""
    print_table(context.obj.example(example), output)


@query_app.command()
def similar(
    context: typer.Context,
    component: Annotated[int, typer.Option("--component", "-c", help="Number of the component.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many components.")] = 10,
    output: Format = OutputFormat.TABLE,
) -> None:
    """The components most like one, by |cos|."""
    print_table(context.obj.similar_components(component, n=n), output)


@query_app.command()
def components(context: typer.Context, output: Format = OutputFormat.TABLE) -> None:
    """All components, a row each."""
    print_table(context.obj.components_table(), output)


@query_app.command()
def selection(context: typer.Context, output: Format = OutputFormat.TABLE) -> None:
    """What `npeff select` found, a row for every number of components tried."""
    print_table(context.obj.table("selection"), output)


@query_app.command()
def sql(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="A SELECT over the tables; SHOW TABLES lists them.")],
    output: Format = OutputFormat.TABLE,
) -> None:
    """SQL over all tables of the run."""
    print_table(context.obj.sql(query), output)
