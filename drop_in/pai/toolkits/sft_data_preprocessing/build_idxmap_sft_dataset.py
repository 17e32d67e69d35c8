"""Pai-Megatron-Patch's build_idxmap_sft_dataset.py, done by tessel: docs/FLAGS.md says what becomes of each flag."""

import sys

from tessel.cli import main

if __name__ == "__main__":
    sys.exit(main(["drop-in", "pai", "build_idxmap_sft_dataset.py", *sys.argv[1:]]))
