"""``npeff query RUN_DIR ...``: queries of the components of a run. Each command writes the result of one query."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import npeff
from npeff.cli.app import HELP, Application, app
from npeff.cli.help_texts import GroupWithHelp
from npeff.cli.options import Factorization, File, Format
from npeff.cli.output import write_answer
from npeff.storage.location import location

_OPTION = "--factorization"

OUTDATED = "npeff: the names are of components that have been fitted again since, and are not shown"
"""The line about annotations of former components."""


class _Group(GroupWithHelp):
    """The group of the queries, whose option ``--factorization`` may be given anywhere after ``query``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        moved: list[str] = []
        rest = list(args)
        while places := [place for place, word in enumerate(rest) if word.partition("=")[0] == _OPTION]:
            stop = places[0] + (1 if "=" in rest[places[0]] else 2)
            moved += rest[places[0] : stop]
            del rest[places[0] : stop]
        return super().parse_args(ctx, moved + rest)


query_app = Application(cls=_Group, help="Query the components of a run.")
app.add_typer(query_app, name="query", context_settings=HELP)

Component = Annotated[int, typer.Option("--component", "-c", help="Number of the component.")]
Example = Annotated[str, typer.Option("--example", "-e", help="Id or number of the example.")]
Split = Annotated[str | None, typer.Option(help="Only examples of this split: fit or held_out.")]
Where = Annotated[
    str | None,
    typer.Option(
        help='Only examples that meet this SQL condition on their columns: "label = 2 and not correct". A column name '
        "with spaces is put in double quotes.",
    ),
]
By = Annotated[
    Literal["coefficient", "evidence", "direction_evidence"],
    typer.Option(
        help="Rank examples by their coefficients, or by the evidence: how strong a component, or its direction, is in "
        "an example's Fisher, whatever the other components are."
    ),
]
NumberOfExamples = Annotated[int, typer.Option("-n", min=1, help="Maximum number of examples.")]
NumberOfComponents = Annotated[int, typer.Option("-n", min=1, help="Maximum number of components.")]


@query_app.callback()
def query(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(parser=location, metavar="RUN_DIR", help="Directory of a run.")],
    factorization: Factorization = None,
) -> None:
    context.obj = run_dir, factorization  # opened by the command, so that --help needs no run


def _store(context: typer.Context) -> npeff.ComponentStore:
    return npeff.ComponentStore.open(*context.obj)


@query_app.command()
def top(
    context: typer.Context,
    component: Component,
    n: NumberOfExamples = 20,
    split: Split = None,
    where: Where = None,
    by: By = "coefficient",
    output: Format = None,
    file: File = None,
) -> None:
    """Show the examples with a component's largest coefficients, or with the largest evidence."""
    write_answer(_store(context).top_examples(component, n=n, split=split, where=where, by=by), output, file)


@query_app.command()
def example(
    context: typer.Context, example: Example, by: By = "coefficient", output: Format = None, file: File = None
) -> None:
    """Show the components of an example, largest coefficient (or evidence) first."""
    write_answer(_store(context).example(example, by=by), output, file)


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
    write_answer(_store(context).neighbours(example, n=n, split=split, where=where), output, file)


@query_app.command()
def similar(
    context: typer.Context,
    component: Component,
    n: NumberOfComponents = 10,
    other: Annotated[
        Path | None,
        typer.Option(
            parser=location,
            metavar="RUN_DIR",
            help="Search the components of this run instead. It must have the same model, parameters, sketch and seed.",
        ),
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the components most similar to a component, in this run or another, by |cos|."""
    if other is None:
        found = _store(context).similar_components(component, n=n)
    else:
        found = _store(context).similar_components_in(npeff.ComponentStore.open(other), component, n=n)
    write_answer(found, output, file)


@query_app.command()
def enriched(
    context: typer.Context,
    where: Annotated[str, typer.Option(help='SQL condition that selects the examples: "label = 2 and not correct".')],
    n: NumberOfComponents = 20,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="An example has a component if it is one of this many top examples. Default: if its coefficient is "
            "above 0.",
        ),
    ] = None,
    split: Split = None,
    by: By = "coefficient",
    output: Format = None,
    file: File = None,
) -> None:
    """Show the components that are over-represented in a subset of the examples, by Fisher's exact test."""
    write_answer(_store(context).enriched(where, split=split, top=top, n=n, by=by), output, file)


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
    """Show in which parameters or layers a direction lies, as fractions of its squared norm."""
    write_answer(_store(context).layer_energy(component, by=by), output, file)


@query_app.command()
def verification(context: typer.Context, component: Component, output: Format = None, file: File = None) -> None:
    """Show the effect of steps along a component's direction, with the controls."""
    write_answer(_store(context).verification(component), output, file)


@query_app.command()
def inputs(
    context: typer.Context,
    example: Annotated[
        str | None,
        typer.Option("--example", "-e", help="Id or number of an example: show the shares of its positions."),
    ] = None,
    component: Annotated[
        int | None,
        typer.Option("--component", "-c", help="Show the mean shares over the top examples of this component."),
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show on which inputs predictions depend: one row for each explained example, or for each position."""
    if example is not None and component is not None:
        raise typer.BadParameter("give --example or --component, not both")
    write_answer(_store(context).inputs(example, component), output, file)


@query_app.command()
def paths(
    context: typer.Context,
    component: Annotated[
        int | None, typer.Option("--component", "-c", help="Show only the paths of this component.")
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Show the lengths of the paths of `npeff scale`, one row for each path and prediction."""
    write_answer(_store(context).paths(component), output, file)


@query_app.command()
def components(context: typer.Context, output: Format = None, file: File = None) -> None:
    """Show the table of components, one row for each."""
    store = _store(context)
    write_answer(store.components_table(), output, file)
    if store.annotations.outdated:
        print(OUTDATED, file=sys.stderr)


@query_app.command()
def selection(context: typer.Context, output: Format = None, file: File = None) -> None:
    """Show the results of `npeff select`, one row for each number of components."""
    write_answer(_store(context).table("selection"), output, file)


@query_app.command()
def spectrum(context: typer.Context, output: Format = None, file: File = None) -> None:
    """Show the statistics of the spectrum of the mean Fisher, with 95% intervals."""
    write_answer(_store(context).table("spectrum_statistics"), output, file)


@query_app.command()
def sql(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="One SELECT statement over the tables. SHOW TABLES lists the tables.")],
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86400, help="Time in seconds after which the query is stopped.")
    ] = 300,
    output: Format = None,
    file: File = None,
) -> None:
    """Run a SQL query over the tables of the run."""
    write_answer(_store(context).sql(query, timeout_s=timeout), output, file)
