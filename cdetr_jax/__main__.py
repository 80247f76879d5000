"""`python -m cdetr_jax`."""

from cdetr_jax.cli.main import run

run()
