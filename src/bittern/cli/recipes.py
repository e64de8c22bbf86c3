"""`bittern recipes`: what there is, and what one of them says."""

from __future__ import annotations

from typing import Annotated

import typer

from bittern.cli.options import Json
from bittern.cli.output import Output, table


def recipes(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A name or a .yaml file to show.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes, or show one in full."""
    with Output(json) as out:
        from bittern import recipes as library

        if recipe is not None:
            import yaml

            content = library.load(recipe).dump()
            out.result(content, yaml.safe_dump(content, sort_keys=False).rstrip())
            return
        found = [library.load(name) for name in library.names()]
        payload = [{"name": r.name, "summary": r.summary, **_numbers(r)} for r in found]
        columns = ("recipe", "weights", "group", "rank", "activations", "summary")
        rows = [
            (p["name"], p["weight"], p["group_size"] or "row", p["rank"], f"{p['activations']} bit", p["summary"])
            for p in payload
        ]
        out.result({"recipes": payload}, table(columns, rows, left=len(columns)))


def _numbers(recipe: object) -> dict[str, object]:
    default = recipe.default  # type: ignore[attr-defined]
    return {name: getattr(default, name) for name in ("weight", "group_size", "rank", "activations")}
