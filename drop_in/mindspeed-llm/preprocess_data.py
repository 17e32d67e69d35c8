"""MindSpeed-LLM's preprocess_data.py, done by tessel: docs/FLAGS.md says what becomes of each flag."""

import sys

from tessel.cli import main

if __name__ == "__main__":
    sys.exit(main(["drop-in", "mindspeed", "preprocess_data.py", *sys.argv[1:]]))
