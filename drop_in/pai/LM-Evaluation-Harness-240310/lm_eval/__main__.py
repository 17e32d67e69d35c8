"""The harness that Pai-Megatron-Patch bundles, `python -m lm_eval`, done by tessel on local folders of questions."""

import sys

from tessel.cli import main

if __name__ == "__main__":
    sys.exit(main(["drop-in", "pai", "lm_eval", *sys.argv[1:]]))
