"""`python -m synthkit`: the command line, where no console script is installed."""

from synthkit.cli import main

if __name__ == "__main__":
    main(prog_name="synthkit")
