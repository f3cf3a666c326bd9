"""Entry point: ``python train.py {fit,validate,test,predict,chat,export,layers} --config conf/memlong.yaml``."""

import sys

from lightning_memlong.__main__ import main

if __name__ == "__main__":
    sys.exit(main(program="python train.py"))
