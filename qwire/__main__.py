"""`python -m qwire` is the `qwire` command."""

from qwire.cli import main

if __name__ == "__main__":
    main()
