"""`python -m sae` is the command `sae`."""

from sae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
