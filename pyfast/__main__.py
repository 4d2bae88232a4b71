"""Entry point of the commands: `python -m pyfast info | selftest | demo | finetune | predict`."""

from pyfast.cli.main import main

raise SystemExit(main())
