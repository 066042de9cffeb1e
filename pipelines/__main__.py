"""`python -m pipelines` is the `pipelines` command."""

from pipelines.cli import main

main()
