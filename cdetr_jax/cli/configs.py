"""`cdetr configs`."""

import argparse
import ast

from cdetr_jax.cli.settings import RECIPES, read_config, recipe_names


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for every recipe, or every field of one.

    Raises: FileNotFoundError, ValueError, as `read_config`.
    """
    if arguments.recipe:
        from cdetr_jax.config_check import flat_fields  # imports JAX

        for field, value in flat_fields(read_config(arguments.recipe, [])).items():
            print(f"config.{field} = {value!r}")
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        said = ast.get_docstring(ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))) or ""
        print(f"{name:<{width}}  {said.splitlines()[0] if said else ''}".rstrip())
