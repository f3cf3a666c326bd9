"""Entry point: ``python train.py {fit,validate,test} --config conf/memlong.yaml``."""

import sys

from lightning_memlong.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
