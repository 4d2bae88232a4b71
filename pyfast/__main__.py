"""`python -m pyfast info | selftest | demo | finetune | predict`."""

from pyfast.cli import main

raise SystemExit(main())
