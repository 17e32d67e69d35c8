"""Pai-Megatron-Patch's preprocess_data_megatron.py, done by tessel: docs/FLAGS.md says what becomes of each flag."""

import sys

from tessel.cli import main

if __name__ == "__main__":
    sys.exit(main(["drop-in", "pai", "preprocess_data_megatron.py", *sys.argv[1:]]))
