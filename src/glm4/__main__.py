"""`python -m glm4`."""

from glm4.cli.main import main

main()
