"""`python -m pyfast info | selftest | demo`."""

from pyfast.cli import main

raise SystemExit(main())
