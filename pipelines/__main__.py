"""`python -m pipelines` is the `i2i` command."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
